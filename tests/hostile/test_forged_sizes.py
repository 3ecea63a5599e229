"""What declares more than it holds is refused before memory is taken for it, and never waited for."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_runs import DATA

HERE = Path(__file__).parent

# One process for all cases: its address space is bounded to what it has once everything is imported, and
# 200 MB more, and each case to five seconds.
PROGRAM = """
import json, resource, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hostile_runs import quiet
import marginflow.report, marginflow.theorems
cases, warm = json.loads(sys.argv[2]), sys.argv[3]
for words in (["export", warm, "--csv", "-"], ["measure", warm], ["certify", warm], ["verify", warm],
              ["report", warm], ["train", "--resume", "--out", warm, "--epochs", "42", "--quiet"]):
    assert quiet(*words).code in (0, 1), words
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for name, words in cases.items():
    signal.alarm(10)  # ends the process: a case that waits for ever is one that fails
    began = time.perf_counter()
    ended = quiet(*words)
    print(json.dumps([name, ended.code, ended.err, time.perf_counter() - began]), flush=True)
"""


def edited(run: Path, **changes: Any) -> Path:
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return run


def tensors(header: dict[str, Any] | bytes, length: int | None = None) -> bytes:
    """A safetensors file of nothing but its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def last_checkpoint(run: Path) -> Path:
    return sorted(run.glob("checkpoints/*.safetensors"))[-1]


def with_model(**model: Any) -> Callable[[Path], Path]:
    return lambda run: edited(run, model=model)


def with_file(place: str, content: bytes) -> Callable[[Path], Path]:
    def change(run: Path) -> Path:
        (run / place).write_bytes(content)
        return run

    return change


def replaced_by(make: Callable[[Path], object], *places: str) -> Callable[[Path], Path]:
    def change(run: Path) -> Path:
        for place in places:
            for path in run.glob(place):
                path.unlink()
                make(path)
        return run

    return change


def sparse(path: Path) -> None:
    """1 TiB of zeros that take no room."""
    with path.open("wb") as file:
        file.truncate(2**40)


def from_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


ANY = "checkpoints/*.safetensors"
HUGE = {"dtype": "F64", "shape": [10**9, 10**9], "data_offsets": [0, 8 * 10**18]}
RUNS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "10^9 widths": (with_model(kind="mlp", widths=[4, 10**9, 1]), "certify measure"),
    "10^18 weights": (with_model(kind="mlp", widths=[4, 10**9, 10**9, 1]), "certify"),
    "a page of 10^18 weights": (
        with_model(kind="mlp", widths=[4, 10**9, 10**9, 1]),
        "report verify",
    ),
    "10^6 layers": (with_model(kind="deep-linear", widths=[1] * 10**6), "certify measure"),
    "depth 10^9": (with_model(kind="diagonal-linear", features=4, depth=10**9), "certify"),
    "10^9 features": (with_model(kind="conv-linear", features=10**9, depth=2), "certify"),
    "10^9 channels": (
        with_model(kind="cnn", input_shape=[1, 8, 8], outputs=1, channels=[10**9, 2]),
        "certify measure",
    ),
    "another shape": (with_model(kind="deep-linear", widths=[4, 2, 1]), "certify measure"),
    "10^12 examples": (
        lambda run: edited(run, data="separable:n=1000000000000,d=4", examples=10**12),
        "certify measure",
    ),
    "a data file that never ends": (lambda run: edited(run, data="npz:/dev/zero"), "certify"),
    "a specification of 10^9 widths": (
        lambda run: edited(run, model_spec="mlp:1000000000"),
        "resume",
    ),
    "10^18 epochs": (lambda run: edited(run, epochs=10**18), "export verify"),
    "a header of 2^63 bytes": (
        with_file("trajectory/step-00000003.safetensors", tensors({}, 2**63)),
        "report",
    ),
    "weights of 8 exabytes": (
        with_file("trajectory/step-00000003.safetensors", tensors({"linear1.weight": HUGE})),
        "report",
    ),
    "1 TiB of run.json": (replaced_by(sparse, "run.json"), "export"),
    "1 TiB of certificate": (replaced_by(sparse, "certificate.json", "verdicts.json"), "report"),
    "checkpoints are pipes": (replaced_by(os.mkfifo, ANY), "certify resume"),
    "measurements are a pipe": (replaced_by(os.mkfifo, "metrics.jsonl"), "report resume"),
    "run.json is a pipe": (replaced_by(os.mkfifo, "run.json"), "report"),
    "all else is a pipe": (
        replaced_by(os.mkfifo, "certificate.json", "bounds.json", "verdicts.json", "audit.json"),
        "report",
    ),
    "checkpoints never end": (replaced_by(from_zeros, ANY, "checkpoints/*.json"), "certify"),
    "measurements never end": (replaced_by(from_zeros, "metrics.jsonl"), "export"),
}
FINE = {
    "10^18 epochs",
    "1 TiB of certificate",
    "a header of 2^63 bytes",
    "a page of 10^18 weights",
    "all else is a pipe",
    "checkpoints are pipes",
    "weights of 8 exabytes",
}
"""What a page can be made of all the same, or what is not read for it."""


def words_of(command: str, folder: Path) -> list[str]:
    if command == "resume":
        return ["train", "--resume", "--out", str(folder), "--quiet"]
    return [command, str(folder), *(["--csv", "-"] if command == "export" else [])]


def test_forged_sizes_pipes_and_devices(
    valid: Path, tmp_path: Path, copied: Callable[[str], Path]
) -> None:
    cases = {}
    for name, (change, commands) in RUNS.items():
        run = change(copied(name.replace("^", "").replace(" ", "-")))
        cases |= {f"{name}: {command}": words_of(command, run) for command in commands.split()}
    data = ["measure", str(valid / "weights.safetensors"), "--model", "deep-linear:3", "--data"]
    for name, path in _bombs(tmp_path).items():
        cases[name] = [*data, f"npz:{path}"]
    plan = tmp_path / "plan.toml"
    plan.write_text("a = " + "[" * 100_000)
    cases["a plan of 100,000 levels"] = ["sweep", str(plan), "--dry-run"]
    plan = tmp_path / "large.toml"
    sparse(plan)
    cases["1 TiB of plan"] = ["sweep", str(plan), "--dry-run"]
    cases["a model of 10^18 weights"] = [
        "train",
        "--data",
        DATA,
        "--model",
        "mlp:1000000000,1000000000",
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(HERE), json.dumps(cases), str(copied("warm"))],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path)},
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == list(cases), done.stderr
    for name, code, said, seconds in found:
        assert seconds < 5, name
        if name.split(":")[0] in FINE:
            assert code in (0, 2), (name, said)
        else:
            assert code == 2, (name, said)
        if code == 2:
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, (name, said)


def _bombs(folder: Path) -> dict[str, Path]:
    """Archives that unpack to more than they are, or say that they do."""
    found = {name: folder / f"{place}.npz" for place, name in enumerate(
        ("zeros that say what they are", "zeros that say they are few", "an array that is not there")
    )}  # fmt: skip
    true, forged, absent = found.values()
    with zipfile.ZipFile(true, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x.npy", "w", force_zip64=True) as file:
            file.write(_header("(8388608, 4)"))
            for _ in range(64):
                file.write(bytes(2**22))
        archive.writestr("y.npy", _header("(8,)") + bytes(64))
    with zipfile.ZipFile(absent, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x.npy", "y.npy"):
            archive.writestr(name, _header("(2000000000, 4)") + bytes(64))
    content = bytearray(true.read_bytes())
    place = 0
    for _ in range(2):
        place = content.index(b"PK\x01\x02", place) + 4
        struct.pack_into("<I", content, place + 20, 128)
    forged.write_bytes(content)
    return found


def _header(shape: str) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.encode()


@pytest.mark.parametrize("axes", [1, 3])
def test_an_idx_file_is_unpacked_no_further_than_it_declares(tmp_path: Path, axes: int) -> None:
    """16 GB of zeros behind a header that declares 8 bytes: one byte more than these is unpacked."""
    import resource

    from marginflow.datasets import _idx
    from marginflow.errors import DataError

    shape = (2,) * axes
    body = gzip.compress(struct.pack(f">BBBB{axes}I", 0, 0, 8, axes, *shape) + bytes(2**24))
    path = tmp_path / "bomb.gz"
    path.write_bytes(body + gzip.compress(bytes(2**24)) * 1000)  # members one after the other
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="got more"):
        _idx.read(path, axes)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 2**10
    assert np.prod(shape) <= 8
