"""Every command of the command line, one after another in one process: run by the tests, twice.

    python every_command.py FOLDER forwards|backwards

The order differs between the two, and so does what the global random generators hold: a command that
hangs on either, or on what another command has left behind in the process, gives other bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

from marginflow import experiments
from marginflow.cli import main

PGD = "pgd-linf:eps=0.05,steps=2,step=0.03,random=true"
L2 = "pgd-l2:eps=0.5,steps=2,step=0.3,random=true"
TOTAL = ["--derivative", "total"]
QUIET = ["--threads", "1", "--quiet"]
DIGITS = ["--data", "digits:3,8", "--batch-size", "64", *QUIET]
LINEAR = ["--data", "separable:n=20,d=6,margin=0.3", "--attack", "exact-linear:p=2,eps=0.1", *QUIET]

SWEEP = """
[sweep]
job = "train"

[options]
data = "digits:3,8"
epochs = 2
batch_size = 64

[grid]
model = ["mlp:4", "mlp:8"]
"""

FGSM = ["--attack", "fgsm:eps=0.05", "--model", "mlp:8"]

# What makes runs; any order will do.
MAKERS: dict[str, list[str]] = {
    "standard": ["train", *DIGITS, "--model", "mlp:16", "--epochs", "3"],
    "fgsm": ["train", *DIGITS, *FGSM, "--epochs", "3"],
    "fgm": ["train", *DIGITS, "--attack", "fgm:eps=0.3", "--model", "mlp:8", *TOTAL],
    "pgd": ["train", *DIGITS, "--attack", PGD, "--model", "mlp:16,8", "--momentum", "0.9"],
    "autograd": ["train", *DIGITS, "--attack", L2, "--model", "mlp:8", "--engine", "autograd"],
    "cnn": ["train", *DIGITS, "--attack", PGD, "--model", "cnn:2,4,hidden=8,kernel=3"],
    "bf16": ["train", *DIGITS, *FGSM, "--perturbation-precision", "bf16"],
    "shrink": ["train", *DIGITS, "--model", "mlp:16", "--shrink", "--lr", "0.5"],
    "shards": ["train", *DIGITS, "--attack", PGD, "--model", "mlp:8", "--shards", "4"],
    "seeds": ["train", *DIGITS, "--attack", PGD, "--model", "mlp:8", "--seeds", "3"],
    "linear": ["train", *LINEAR, "--model", "deep-linear:4", "--lr", "0.5", "--dtype", "float64"],
    "flow": ["flow", *LINEAR, "--model", "deep-linear:3", "--log-time", "12"],
    "spheres": ["maximize", *DIGITS, *FGSM],
    "relative": ["maximize", *DIGITS, *FGSM, "--method", "relative"],
    "steepest": ["maximize", *DIGITS, *FGSM, "--method", "steepest"],
    "dual": ["maximize", *LINEAR, "--model", "deep-linear", "--method", "dual"],
    "sweep": ["sweep", "sweep.toml", "--jobs", "1", "--quiet"],
    "reproduce": ["reproduce", "fig6", "--jobs", "1", "--quiet"],
    "demo": ["demo", "--quiet"],
}

# What measures them and writes beside them: among themselves in any order, too.
READERS: dict[str, list[str]] = {
    "measure": ["measure", "fgsm", "--attack", PGD, "--attack", "fgm:eps=0.5", "--json"],
    "measure certified": ["measure", "pgd", "--attack", "fgsm:eps=0.01", "--certified", "norms"],
    "verify": ["verify", "flow"],
    "certify": ["certify", "standard", "--fitted-only", "--threads", "1"],
    "certify linear": ["certify", "linear", "--threads", "1"],
    "rerun": ["rerun", "pgd", "--quiet", "--json"],
    "rerun flow": ["rerun", "flow", "--quiet", "--json"],
}

# What shows all of that: a certificate that was made before is in the report.
SHOWERS: dict[str, list[str]] = {
    "compare": ["compare", "fgsm", "standard", "--out", "compared.svg"],
    "report": ["report", "fgsm", "standard", "--out", "both.html"],
    "export": ["export", "fgsm", "pgd", "flow", "--csv", "table.csv"],
}


def shorten() -> None:
    """A figure and the demo in a second."""
    scales = experiments.EXPERIMENTS["fig6"]
    scales["demo"] = dataclasses.replace(scales["demo"], epochs=20)  # type: ignore[call-arg]
    whole = experiments.adversarial_and_standard
    experiments.adversarial_and_standard = functools.partial(whole, model="mlp:8", epochs=3)  # type: ignore[assignment]


def run(words: list[str], out: list[str]) -> dict[str, object]:
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        code = main([*words, *out])
    return {"code": code, "out": printed.getvalue(), "err": complained.getvalue()}


def everything(backwards: bool) -> dict[str, dict[str, object]]:
    shorten()
    seed = 2 if backwards else 1
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    Path("sweep.toml").write_text(SWEEP, encoding="utf-8")
    found = {}
    for commands in (MAKERS, READERS, SHOWERS):
        order = list(commands.items())
        for name, words in reversed(order) if backwards else order:
            out = ["--out", name] if commands is MAKERS else []
            if words[0] in ("train", "maximize") and "--epochs" not in words:
                out += ["--epochs", "50" if words[2] == LINEAR[1] else "2"]
            found[name] = run(words, out)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        results = everything(sys.argv[2] == "backwards")
    folder.with_suffix(".json").write_text(json.dumps(results), encoding="utf-8")
