"""Valid files of every kind, and what is done with a folder that holds a damaged one."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import marginflow as mf
from marginflow.cli import main
from marginflow.errors import MarginflowError

DATA = "separable:n=8,d=4,margin=0.5"
PLAN = """[sweep]
name = "two widths"
job = "train"
retries = 0

[options]
data = "separable:n=8,d=4,margin=0.5"
model = "mlp:{width}"
attack = "fgsm:eps={eps}"
epochs = 1

[grid]
width = [2, 3]
eps = [0.01]

[resources]
cpus = 1
"""


def make_all(folder: Path) -> None:
    """A run of each kind, a sweep, data files, weights and a plan; everything small."""
    train = mf.train(
        "deep-linear:3",
        DATA,
        attack="fgm:eps=0.02",
        lr=1.0,
        epochs=40,
        dtype="float64",
        loss="exponential",
        keep_weights=True,
        out=folder / "train",
    )
    mf.gradient_flow("deep-linear:3", DATA, attack="fgm:eps=0.05", log_time=1, out=folder / "flow")
    mf.maximize("mlp:4", DATA, attack="fgsm:eps=0.02", epochs=2, out=folder / "maximize")
    data = mf.load(DATA)
    model = mf.models.mlp(4, 3, 1, seed=0).double()
    with mf.Monitor(model, data, "fgsm:eps=0.02", out=folder / "monitor") as monitor:
        monitor.measure(step=0)
        monitor.measure(step=1)
    quiet("certify", folder / "train")
    quiet("verify", folder / "train")
    quiet("measure", folder / "train", "--certified", "norms", "--attack", "fgm:eps=0.02")
    np.savez(folder / "data.npz", x=data.x.numpy(), y=data.y.numpy())
    np.savez_compressed(folder / "packed.npz", x=data.x.numpy(), y=data.y.numpy())
    np.save(folder / "deltas.npy", np.eye(4) * 0.01)
    idx = struct.pack(">BBBBIII", 0, 0, 8, 3, 5, 2, 2) + bytes(range(20))
    (folder / "images.idx").write_bytes(idx)
    (folder / "images.idx.gz").write_bytes(gzip.compress(idx))
    shutil.copyfile(train.checkpoint().path, folder / "weights.safetensors")
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "plan.toml").write_text(PLAN)
    (folder / "train.toml").write_text(
        f'data = "{DATA}"\nmodel = "mlp:2"\nepochs = 1\nlr = 0.1\nattack = "fgsm:eps=0.01"\n'
    )
    make_sweep(folder / "sweep", folder / "train")


def make_sweep(folder: Path, run: Path) -> None:
    """The folder of a sweep of two trials, both of them done, as if it had been carried out."""
    from marginflow.sweeps import read_plan
    from marginflow.sweeps._directory import SweepDirectory

    directory = SweepDirectory(folder)
    plan = read_plan(run.parent / "plan.toml")
    directory.open(plan, resume=False, force=False)
    for trial in plan.trials:
        shutil.copytree(run, directory.run_path(trial.name))
        directory.add_attempt({"trial": trial.name, "outcome": "finished", "seconds": 1.0})
    directory.close()


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def quiet(*words: object) -> Ended:
    """A command of the command line in this process; whatever it raises is raised here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Ended(code, out.getvalue(), err.getvalue())


def check(ended: Ended) -> None:
    """The command said what was wrong, in one line and without a traceback; or all went well."""
    assert ended.code in (0, 1, 2), ended
    assert "Traceback" not in ended.err
    said = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(said) == (ended.code == 2), ended.err
    assert "\x1b" not in ended.out + ended.err
    assert "\x07" not in ended.out + ended.err


def commands(folder: Path, other: Path, out: Path) -> dict[str, list[Any]]:
    """Every command that reads the run in ``folder``; ``out`` is for what it draws."""
    return {
        "export": ["export", folder, "--csv", "-"],
        "export two": ["export", folder, other, "--csv", out / "a.csv", "--force"],
        "measure": ["measure", folder],
        "certify": ["certify", folder],
        "train": ["train", "--resume", "--out", folder, "--epochs", "41", "--quiet"],
        "report": ["report", folder],
        "compare": ["compare", folder, other],
        "verify": ["verify", folder],
    }


def read_sections(folder: Path) -> None:
    """What a page says of the files beside a run, without its drawings; or be told what is wrong."""
    from marginflow.report import statement
    from marginflow.report._bounds import bounds_section
    from marginflow.report._certificate import certificate_section
    from marginflow.report._verdicts import theories

    with contextlib.suppress(MarginflowError):
        runs = [mf.load_run(folder)]
        certificate_section(runs)
        bounds_section(runs)
        theories(runs)
        statement(runs)


def read_sweep(folder: Path, *, drawn: bool = True) -> None:
    """Read a sweep and draw its page; or be told what is wrong with it."""
    from marginflow.report import sweep_statement, write_sweep
    from marginflow.sweeps import load_sweep

    with contextlib.suppress(MarginflowError):
        found = load_sweep(folder)
        found.table()
        sweep_statement(found)
        if drawn:
            write_sweep(found, folder / "report.html")


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Inside, ``path`` holds ``content``."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def signed(side: Path, tensors: Path) -> None:
    """Make a checkpoint's side file vouch for whatever lies beside it."""
    import hashlib

    try:
        info = json.loads(side.read_text())
    except (ValueError, RecursionError):
        return
    if isinstance(info, dict):
        info["sha256"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
        side.write_text(json.dumps(info))
