"""Out of memory says which batch size to try; n = 60 000 takes memory by the batch, not by n."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import marginflow as mf
from marginflow._memory import is_out_of_memory, memory_watched
from marginflow.cli import main
from marginflow.engine import FusedEngine
from marginflow.engine._outputs import AttackedOutputs
from marginflow.errors import OutOfMemoryError, RunError
from marginflow.flow import Follower

DATA = "separable:n=40,d=6,margin=0.3"
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.20 GiB is free."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 3145728 bytes. Error code 12 (Cannot allocate memory)"
)
REFUSALS: dict[str, tuple[Callable[[], BaseException], int | None]] = {
    "cuda": (lambda: torch.OutOfMemoryError(CUDA), int(2.5 * 2**30)),
    "cpu": (lambda: RuntimeError(CPU), 3 * 2**20),
    "cublas": (lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), None),
    "python": (MemoryError, None),
    "numpy": (
        lambda: np._core._exceptions._ArrayMemoryError((1024, 1024), np.dtype("f8")),
        8 * 2**20,
    ),
}


@pytest.fixture(params=list(REFUSALS))
def refusal(request: pytest.FixtureRequest) -> tuple[BaseException, int | None]:
    make, asked = REFUSALS[request.param]
    return make(), asked


def refuse(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: BaseException, after: int = 0
) -> None:
    """``owner.name`` raises ``error`` from its call number ``after`` on."""
    real, calls = getattr(owner, name), [0]

    def refused(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise error
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, refused)


def test_each_library_is_understood(refusal: tuple[BaseException, int | None]) -> None:
    error, asked = refusal
    with (
        pytest.raises(OutOfMemoryError, match=r"while training.*try batch_size=16") as caught,
        memory_watched("training", 32),
    ):
        raise error
    assert (caught.value.batch_size, caught.value.asked) == (16, asked)
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("memory"), KeyError()]
)
def test_other_errors_pass(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, memory_watched("training", 32):
        raise error
    assert caught.value is error


def test_one_example_cannot_be_halved() -> None:
    with (
        pytest.raises(OutOfMemoryError, match="smaller network") as caught,
        memory_watched("x", 1),
    ):
        raise MemoryError
    assert caught.value.batch_size is None


def test_training_is_kept_and_goes_on(
    tmp_path: Path, refusal: tuple[BaseException, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    asked: dict[str, Any] = {"attack": "fgsm:eps=0.05", "batch_size": 8, "epochs": 6}
    with monkeypatch.context() as patched:
        refuse(patched, FusedEngine, "descend", refusal[0], after=12)
        with pytest.raises(
            OutOfMemoryError, match=r"batch_size=4;.*is kept.*resume=True"
        ) as caught:
            mf.train("mlp:8", DATA, out=out, **asked)
    assert caught.value.batch_size == 4
    assert mf.load_run(out).checkpoint().info["step"] == 10
    with pytest.raises(RunError, match="batch_size: 8 there, 4 now"):
        mf.train("mlp:8", DATA, out=out, resume=True, **asked | {"batch_size": 4})
    whole = mf.train("mlp:8", DATA, **asked)
    assert mf.train("mlp:8", DATA, out=out, resume=True, **asked).metrics == whole.metrics


def test_seeds_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from marginflow.engine import StackedEngine

    refuse(monkeypatch, StackedEngine, "look", torch.OutOfMemoryError(CUDA), after=7)
    with pytest.raises(OutOfMemoryError, match=r"try batch_size=4.*is kept"):
        mf.train_seeds("mlp:8", DATA, seeds=3, batch_size=8, epochs=6, out=tmp_path / "runs")


@pytest.mark.parametrize("job", ["margins", "bounds", "certify", "maximize", "flow"])
def test_measuring_and_the_rest(
    job: str, refusal: tuple[BaseException, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from marginflow.certified._norms import NormBounds
    from marginflow.kkt._problem import Problem

    data, model = mf.load(DATA).to(dtype=torch.float32), mf.models.mlp(6, 8, 1, seed=0)
    attack, error = mf.attacks.build("fgm:eps=0.05"), refusal[0]
    x, y = data.x, data.y
    places: dict[str, tuple[type, str, int]] = {
        "margins": (AttackedOutputs, "__call__", 0),
        "bounds": (NormBounds, "__call__", 0),
        "certify": (Problem, "survey", 0),
        "maximize": (FusedEngine, "__call__", 1),
        "flow": (Follower, "advance", 0),
    }
    jobs: dict[str, Callable[[], object]] = {
        "margins": lambda: mf.adversarial_margins(model, x, y, attack, batch_size=20),
        "bounds": lambda: mf.certified_margins(model, x, y, attack, method="norms", batch_size=20),
        "certify": lambda: mf.kkt_certificate(model, x, y, attack, batch_size=20),
        "maximize": lambda: mf.maximize(
            model, data, attack, method="spheres", batch_size=20, epochs=3
        ),
        "flow": lambda: mf.gradient_flow(model, data, log_time=2),
    }
    owner, name, after = places[job]
    refuse(monkeypatch, owner, name, error, after=after)
    with pytest.raises(OutOfMemoryError, match="out of memory while") as caught:
        jobs[job]()
    if job == "flow":
        assert "method='steps'" in str(caught.value)
    else:
        assert caught.value.batch_size == 10
        assert "try batch_size=10" in str(caught.value)
    if job == "certify":
        assert "max_support" in str(caught.value)


def test_the_command_line_says_so(
    tmp_path: Path,
    refusal: tuple[BaseException, int | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse(monkeypatch, FusedEngine, "descend", refusal[0], after=3)
    words = f"train --model mlp:8 --data {DATA} --batch-size 8 --epochs 3 --out {tmp_path}/run"
    assert main(words.split()) == 2
    assert "try batch_size=4" in capsys.readouterr().err


# ---------------------------------------------------------------------------- for real: a small machine

LIMITED = """
import contextlib, io, json, resource, sys
import torch, marginflow as mf
from marginflow.cli import main
torch.set_num_threads(1)
# What is imported and set up once is not what is measured here.
small = "train --model mlp:8 --data separable:n=20,d=6,margin=0.3 --epochs 1 --quiet --out "
main((small + sys.argv[2]).split())
main(f"measure {sys.argv[2]} --attack fgsm:eps=0.1".split())
used = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + 170 * 2**20,) * 2)
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(words.split())
    print(json.dumps([code, said.getvalue()]))
"""


def test_a_small_machine_for_real(tmp_path: Path) -> None:
    """With 170 MiB left, training and measuring fail with advice, and follow it with success."""
    out, first = f"{tmp_path}/run", f"{tmp_path}/first"
    train = "train --model mlp:1024 --data separable:n=20000,d=8,margin=0.1 --epochs 1 --quiet"
    measure = f"measure {out} --attack fgsm:eps=0.1"
    words = [
        f"{train} --out {first} --batch-size 20000",
        f"{train} --out {out} --batch-size 500",
        f"{measure} --batch-size 20000",
        f"{measure} --batch-size 500",
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(words), f"{tmp_path}/warm"], capture_output=True,
        # An arena of malloc for another thread takes 64 MiB of addresses at once.
        text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [code for code, _ in answers] == [2, 0, 2, 0], answers
    assert "out of memory while training with 20000 examples at once" in answers[0][1]
    assert "try batch_size=10000" in answers[0][1]
    assert "out of memory while measuring margins with 20000 examples at once" in answers[2][1]
    assert not any("Traceback" in said for _, said in answers)
    assert mf.load_run(first).checkpoint().info["step"] == 0


# --------------------------------------------------------------------------------------- n = 60 000

GROWTH = """
import json, os, resource, sys
import torch, marginflow as mf
torch.set_num_threads(1)
N, D = 60_000, 32
attack = mf.attacks.build("fgsm:eps=0.01")
random = torch.Generator().manual_seed(0)
x, w = torch.randn(N, D, generator=random), torch.randn(D, generator=random)
y = torch.where(x @ w > 0, 1, -1)
data = mf.Dataset(x.addr_(y.float(), w / w.norm(), alpha=0.5), y)
jobs = {
    "measure": lambda m, d, b: mf.adversarial_margins(m, d.x, d.y, attack, batch_size=b),
    "measure by autograd": lambda m, d, b: mf.adversarial_margins(
        m, d.x, d.y, attack, batch_size=b, engine="autograd"
    ),
    "train": lambda m, d, b: mf.train(m, d, attack=attack, batch_size=b, epochs=1, lr=0.01),
    "certify": lambda m, d, b: mf.kkt_certificate(
        m, d.x, d.y, attack, batch_size=b, fitted_only=True, max_support=100, derivative="detached"
    ),
    "bounds": lambda m, d, b: mf.certified_margins(
        m, d.x, d.y, attack, method="norms", batch_size=b
    ),
}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model = lambda: mf.models.mlp(D, 512, 1, seed=0)
for name, job in jobs.items():
    job(model(), data.subset(range(512)), 256)
for name, job in jobs.items():
    for n, batch in ((6_000, 256), (N, 256), (N, 8192)):
        # The peak of a forked process begins at what it has then, and its parent stays as it was.
        if not os.fork():
            some = data.subset(range(n))
            before = peak()
            job(model(), some, batch)
            print(json.dumps([name, n, batch, peak() - before]), flush=True)
            os._exit(0)
        os.wait()
"""


def test_sixty_thousand_examples_by_the_batch() -> None:
    """Ten times the examples take at most five copies more of these (6.6 MiB); larger batches, by the batch.

    512 hidden units alone would take 117 MiB for all examples at once, and n² numbers 13 GiB.
    """
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown: dict[str, dict[tuple[int, int], float]] = {}
    for name, n, batch, mebibytes in map(json.loads, done.stdout.splitlines()):
        grown.setdefault(name, {})[n, batch] = mebibytes
    assert len(grown) == 5, done.stderr
    for of in grown.values():
        assert of[60_000, 256] - of[6_000, 256] < 33, grown
        assert 16 < of[60_000, 8192] - of[60_000, 256] < 600, grown
