"""What a press of TAB offers as values: whole specifications to edit, fixed choices, runs on disk.

Nothing heavy is imported here: a shell waits for it. That the lists are complete and their entries valid is
tested against the library itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import get_type_hints

import typer
from typer.models import ParameterInfo

ATTACKS = (
    "none",
    "fgm:eps=1.5",
    "fgsm:eps=16/255",
    "pgd-l2:eps=1.5,steps=5",
    "pgd-linf:eps=16/255,steps=5",
    "exact-linear:p=2,eps=0.05",
    "finite-set:",
    "autoattack-l2:eps=0.5",
    "autoattack-linf:eps=8/255",
    "foolbox:LinfPGD,eps=8/255",
    "torchattacks:PGD,eps=8/255",
    "art:FastGradientMethod,eps=8/255",
)
DATA = (
    "digits",
    "digits:3,8",
    "mnist",
    "mnist:3,8",
    "separable:n=60,d=20,margin=0.1",
    "npz:",
)
MODELS = (
    "mlp:256,32",
    "mlp:1024,64",
    "cnn",
    "deep-linear:10,10",
    "diagonal-linear:depth=2",
    "conv-linear:depth=2",
)
VALUES: Mapping[str, tuple[str, ...]] = {
    "attack": ATTACKS,
    "measure_with": ATTACKS,
    "data": DATA,
    "model": MODELS,
    "loss": ("exponential", "logistic", "cross-entropy"),
    "lr": ("lemma2", "loss-based"),
    "derivative": ("detached", "total"),
    "dtype": ("float32", "float64"),
    "device": ("cpu", "cuda"),
    "engine": ("auto", "autograd", "fused"),
    "perturbation_precision": ("float32", "bf16"),
    "certified": ("auto", "crown", "interval", "norms"),
    "split": ("train", "test"),
    "scale": ("demo", "mnist", "paper"),
    "form": ("pdf", "png", "svg"),
    "log": ("tensorboard", "mlflow", "none"),
    "figures": (
        *("all", "paper", "ours", *(f"fig{k}" for k in range(1, 8))),
        *("tradeoff", "cross", "overfitting", "scale-trap"),
    ),
    "flow method": ("auto", "stiff", "runge-kutta", "steps"),
    "maximize method": (
        *("spheres", "polish", "relative", "loss-based", "steepest:norm=sign"),
        *("dual", "normalized"),
    ),
}
"""By the name of the parameter, where commands differ with the command's before it."""
RUNS = ("begin", "run", "runs")
"""Parameters that are run directories."""
_DEPTH = 3
_MOST = 2000


def complete_values(app: typer.Typer) -> None:
    """Give every parameter of every command of ``app`` the values that its name stands for."""
    for command in app.registered_commands:
        function = command.callback
        if function is None:
            continue
        # Once evaluated they stay, so that the parser finds what is set here.
        function.__annotations__ = get_type_hints(function, include_extras=True)
        for name, annotation in function.__annotations__.items():
            found = _completer(command.name or function.__name__, name)
            for info in getattr(annotation, "__metadata__", ()):
                if found is not None and isinstance(info, ParameterInfo):
                    info.autocompletion = found


def _completer(command: str, name: str) -> Callable[[str], list[str]] | None:
    if name in RUNS:
        return run_directories
    values = VALUES.get(f"{command} {name}", VALUES.get(name))
    if values is None:
        return None

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def run_directories(incomplete: str) -> list[str]:
    """The run directories whose paths begin with ``incomplete``, at most three folders further down."""
    folder, _, _ = incomplete.rpartition("/")
    start = Path(folder or ("/" if incomplete.startswith("/") else "."))
    left = [_MOST]
    found = (str(path) for path in _runs_below(start, _DEPTH, left))
    return sorted(path for path in found if path.startswith(incomplete))


def _runs_below(folder: Path, depth: int, left: list[int]) -> Iterator[Path]:
    """Runs in ``folder`` and below; ``left`` says how many more entries may be looked at."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        left[0] -= 1
        if left[0] < 0:
            return
        if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=True):
            continue
        path = folder / entry.name
        if (path / "run.json").is_file():
            yield path
        elif depth > 1:
            yield from _runs_below(path, depth - 1, left)
