"""Opening what a stranger has made runs none of it, and starts, calls and writes nothing else."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_runs import PLAN

HERE = Path(__file__).parent
CANARY = "canary_of_marginflow"

# What Python tells of while the commands run. Source executed from the stranger's folder, a process, a
# connection, a file written or removed outside of it: each is told, and fails the test.
PROGRAM = """
import json, os, pathlib, sys
sys.dont_write_bytecode = True
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from hostile_runs import quiet, read_sections, read_sweep
import marginflow.report, marginflow.theorems
folder, commands, warm = os.path.realpath(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
for words in (["report", warm, "--format", "svg"], ["verify", warm], ["certify", warm], ["measure", warm],
              ["train", "--resume", "--out", warm, "--epochs", "44", "--quiet"]):
    assert quiet(*words).code in (0, 1), words
told, listening = [], True
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ALLOWED = {"/dev/null", os.environ["MPLCONFIGDIR"]}

def inside(path):
    path = os.path.realpath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else folder
    return path.startswith((folder, *ALLOWED))

def listen(event, given):
    if not listening:
        return
    if event == "import" and given[0].startswith("canary"):
        told.append([event, given[0]])
    elif event == "exec" and getattr(given[0], "co_filename", "").startswith(folder):
        told.append([event, given[0].co_filename])
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"):
        told.append([event, str(given[0])])
    elif event in ("socket.connect", "socket.getaddrinfo", "urllib.Request", "pickle.find_class"):
        told.append([event, str(given[:2])])
    elif event == "open" and (given[2] or 0) & WRITING and not inside(given[0]):
        told.append([event, str(given[0])])
    elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate",
                   "shutil.rmtree", "os.chmod") and not inside(given[0]):
        told.append([event, str(given[0])])

sys.addaudithook(listen)
codes = []
for words in commands:
    code = read_sweep(pathlib.Path(words[1])) if words[0] == "read_sweep" else quiet(*words).code
    codes.append(code)
listening = False
print(json.dumps([told, codes]))
"""


class Evil:
    """What unpickling would carry out."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_stranger_s_folders_run_nothing(tmp_path: Path, copied: Callable[..., Path]) -> None:
    trace = tmp_path / "trace"
    warm = copied("warm")
    home = tmp_path / "in"
    home.mkdir()
    (home / f"{CANARY}.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n"
        "def build(*a, **k):\n    raise SystemExit(3)\nNAME = build\n"
    )
    for name in ("sitecustomize.py", "conftest.py", "marginflow.toml", ".marginflow.py"):
        (home / name).write_text(f"import {CANARY}\n" if name.endswith("py") else "a = 1\n")
    evil, function = pickle.dumps(Evil(trace)), f"{CANARY}:build"
    commands: list[list[str]] = []

    def of(run: Path, *readers: str) -> None:
        for reader in readers:
            resumed = ["train", "--resume", "--out", str(run), "--quiet", "--epochs", "45"]
            commands.append(resumed if reader == "resume" else [reader, str(run)])

    for place, (key, value) in enumerate(
        [
            ("model", function),
            ("model", {"kind": function, "widths": [4, 3, 1]}),
            ("model", {"kind": "mlp", "widths": [4, 3, 1], "activation": function}),
            ("model_spec", function),
            ("attack", f"art:{CANARY},eps=0.1"),
            ("attack", f"foolbox:{CANARY},eps=0.1"),
            ("measure_with", function),
            ("measure_with", f"torchattacks:{CANARY},eps=0.1"),
            ("loss", function),
            ("data", f"npz:{home / 'evil.npz'}"),
            ("data", function),
            ("engine", function),
            ("lr", function),
            ("kind", function),
            ("method", function),
        ]
    ):
        run = copied(f"in/run-{place}")
        edited(run / "run.json", **{key: value})
        of(run, "measure", "certify", "resume", *(["verify"] if key == "attack" else []))
    page = copied("in/page")
    edited(page / "run.json", model_spec=function, attack=function, loss=function)
    of(page, "report")
    pickled = copied("in/pickled")
    for path in pickled.rglob("*.safetensors"):
        path.write_bytes(evil)
    for path in (*pickled.glob("*.json*"), *pickled.glob("checkpoints/*.json")):
        if path.name not in ("run.json", "metrics.jsonl"):
            path.write_bytes(evil)
    (pickled / "mlflow.json").write_bytes(evil)
    of(pickled, "measure", "certify", "resume", "report")
    with zipfile.ZipFile(home / "evil.npz", "w") as archive:
        archive.writestr("x.npy", evil)
        archive.writestr("y.npy", evil)
    (home / "evil.pt").write_bytes(evil)
    (home / "evil.safetensors").write_bytes(evil)
    (home / "evil.npy").write_bytes(evil)
    for name in ("evil.pt", "evil.safetensors"):
        commands.append(
            ["measure", str(home / name), "--data", "separable:n=4,d=4", "--model", "mlp:3"]
        )
    commands.append(["measure", str(page), "--attack", f"finite-set:{home / 'evil.npy'}"])
    (home / "plan.toml").write_text(PLAN.replace("mlp:{width}", f"{CANARY}:{{width}}"))
    commands.append(["sweep", str(home / "plan.toml"), "--dry-run"])
    (home / "train.toml").write_text(f'data = "separable:n=4,d=4"\nmodel = "{function}"\n')
    commands.append(["train", "--config", str(home / "train.toml"), "--out", str(home / "new")])
    sweep = copied("in/sweep", "sweep")
    edited(sweep / "sweep.json", options={"model": function}, job="train")
    commands.append(["read_sweep", str(sweep)])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(HERE), str(home), json.dumps(commands), str(warm)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told, codes = json.loads(done.stdout.splitlines()[-1])
    assert told == []
    assert not trace.exists()
    assert set(codes) <= {0, 1, 2, None}
    assert codes.count(2) > len(codes) / 3


def test_the_trap_is_armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above waits for does happen to whoever is careless."""
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()


def test_a_model_of_one_s_own_is_named_on_the_command_line_only(
    tmp_path: Path, copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``package.module:function`` is imported if it is asked for, and its help says so."""
    from hostile_runs import quiet

    (tmp_path / "canary_asked_for.py").write_text(
        "import marginflow as mf\ndef build():\n    return mf.models.deep_linear(4, 3, 1, seed=0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    run = copied("run")
    assert quiet("measure", run, "--model", "canary_asked_for:build").code == 0
    assert "canary_asked_for" in sys.modules
    del sys.modules["canary_asked_for"]
    for command in ("certify", "verify", "measure"):
        assert "imported and called" in re.sub(r"[\s│]+", " ", quiet(command, "--help").out)
