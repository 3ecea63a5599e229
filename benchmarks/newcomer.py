"""A newcomer's two ways, timed step by step: clone to a report, and the wheel to the margins of an own model.

    python benchmarks/newcomer.py            # both, in new environments: minutes, most of them pip's
    python benchmarks/newcomer.py --short    # without installing: this environment, few epochs

Every step is a command of the README or of the guide, run as it stands in an empty folder, with no source
tree on the module path. What is committed is cloned; the wheel is built beforehand and not timed. The own
model is a module with biases and dropout in a file of its own, trained by its own few lines, saved by torch.
The target is ten minutes for each way, with everything installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = 600.0

OWN_MODEL = """\
from torch import nn


def network():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10)
    )
"""
OWN_TRAINING = """\
import torch, marginflow as mf
from own import network

torch.manual_seed(0)
data, model = mf.load("digits"), network()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in range(EPOCHS):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(data.x), data.y).backward()
    optimizer.step()
torch.save(model.state_dict(), "weights.pt")
"""


class Way:
    """Steps of one way, each timed, in a folder of their own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.total = 0.0
        folder.mkdir()
        print(f"\n| {name} | seconds |\n| -- | --: |", flush=True)

    def step(self, *command: str | Path, shown: str | None = None, within: str = ".") -> str:
        """Run a command, print its time; what it printed."""
        environment = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        began = time.perf_counter()
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder / within,
            env=environment,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - began
        if done.returncode != 0:
            sys.exit(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        self.total += seconds
        line = shown or " ".join(["python", *map(str, command[1:])])
        print(f"| `{line}` | {seconds:.1f} |", flush=True)
        return done.stdout

    def end(self, answer: str) -> None:
        """The sum, beside its target, and what the newcomer has read by now."""
        verdict = "reached" if self.total < TARGET else "not reached"
        print(f"| **in all** (target below {TARGET:.0f} s: {verdict}) | **{self.total:.1f}** |")
        print("\n" + "\n".join(f"    {line}" for line in answer.strip().splitlines()), flush=True)


def from_a_clone(folder: Path, python: str, short: bool) -> None:
    """`git clone`, `make demo`, and the report is there to be read."""
    way = Way("from a clone to a report", folder)
    if short:
        # The same code as the demo, on fewer epochs: the page of one training.
        options = (
            "--data digits:3,8 --model mlp:16 --attack fgsm:eps=0.1 --batch-size 32 --epochs 20"
        )
        out = ["--quiet", "--out", "runs/demo"]
        way.step(sys.executable, "-m", "marginflow", "train", *options.split(), *out)
        answer = way.step(sys.executable, "-m", "marginflow", "report", "runs/demo")
        within = "."
    else:
        within = "marginflow"
        way.step("git", "clone", "--quiet", ROOT, within, shown="git clone … marginflow")
        made = ["make", f"PYTHON={python}"]
        way.step(*made, ".venv/.installed", within=within, shown="make .venv/.installed")
        answer = way.step(*made, "demo", within=within, shown="make demo")
    page = way.folder / within / "runs" / "demo" / "report.html"
    if "γ̂" not in page.read_text(encoding="utf-8"):
        sys.exit(f"no margins in {page}")
    way.end(answer)


def own_model(folder: Path, python: str, short: bool) -> None:
    """`pip install` of the wheel, an own module, its training, `marginflow measure`."""
    programs = Path(sys.executable).parent
    if not short:
        built = folder.with_name("built")
        wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
        subprocess.run([*wheel, built, ROOT], check=True, capture_output=True)
        (package,) = built.glob("*.whl")
    way = Way("from the wheel to an own model", folder)
    if not short:
        way.step(python, "-m", "venv", "venv", shown="python -m venv venv")
        programs = folder / "venv" / "bin"
        pip = programs / "pip"
        way.step(pip, "install", "--quiet", "torch==2.13.0", shown="pip install torch==2.13.0")
        way.step(pip, "install", "--quiet", package, shown=f"pip install {package.name}")
    (folder / "own.py").write_text(OWN_MODEL, encoding="utf-8")
    training = OWN_TRAINING.replace("EPOCHS", "20" if short else "200")
    (folder / "train_own.py").write_text(training, encoding="utf-8")
    way.step(programs / "python", "train_own.py")
    arguments = "measure weights.pt --model own:network --data digits --split test"
    attacks = "--attack none --attack fgsm:eps=0.1 --attack pgd-linf:eps=0.1,steps=20"
    answer = way.step(
        *(programs / "python", "-m", "marginflow", *arguments.split(), *attacks.split()),
        shown=f"marginflow {arguments} {attacks}",
    )
    way.end(answer)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="without installing, few epochs")
    parser.add_argument(
        "--python", default=sys.executable, help="makes the environments (default: this one)"
    )
    asked = parser.parse_args(arguments)
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}")
    with tempfile.TemporaryDirectory(prefix="newcomer-") as name:
        from_a_clone(Path(name) / "clone", asked.python, asked.short)
        own_model(Path(name) / "own", asked.python, asked.short)


if __name__ == "__main__":
    main()
