"""``marginflow maximize``."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marginflow.cli._options import take_log, use_threads
from marginflow.cli._train import free_name, goes_on, stored_options
from marginflow.errors import InputError, RunError

if TYPE_CHECKING:
    from marginflow.runs import Run

_STORED = (
    "data", "attack", "measure_with", "method", "epochs", "batch_size", "seed", "loss", "dtype",
    "device",
)  # fmt: skip
_ADDED = {"schedule": None}
"""Options that runs of the linear methods do not have."""
_TAKEN = ("data", "attack", "loss", "dtype")
"""What the run that is begun with decides, unless something else is asked for."""


def run_maximization(
    given: Mapping[str, Any], *, begin: Path | None, resume: bool, force: bool, progress: bool
) -> None:
    """Maximise as ``given`` (the options named on the command line) says; print what came out.

    Args:
        given: the options.
        begin: the run whose weights and settings to begin with.
        resume: continue the run in ``--out``.
        force: replace it.
        progress: show a bar.
    """
    options = dict(given)
    log = take_log(options, Path(options["out"]) if resume and "out" in options else None)
    if resume:
        if "out" not in options:
            raise InputError("--resume needs --out RUN, the run directory to continue")
        options = {**stored_options(Path(options["out"]), "maximize", _STORED, _ADDED), **options}
    elif begin is not None:
        options = {**_settings_of(begin), **options}
    for name, example in [("data", "digits:3,8"), ("model", "mlp:256,32")]:
        if name not in options:
            raise InputError(
                f"--{name} is missing; for example --{name} {example}, or --from RUN to begin with "
                "a network that is trained already"
            )

    import marginflow as mf
    from marginflow.distributed import first

    use_threads(options.pop("threads", None))
    data = mf.load(options.pop("data"), data_dir=options.pop("data_dir", None))
    options.setdefault("dtype", "float32")
    if "out" not in options:
        method = str(options.get("method", "spheres")).partition(":")[0]
        options["out"] = first(free_name)(f"{data.name} {method}", options.get("attack", "none"))
    if goes_on(Path(options["out"])):
        resume, force = True, False
    started = time.monotonic()
    try:
        run = mf.maximize(
            options.pop("model"),
            data,
            options.pop("attack", None),
            **options,
            start=begin,
            resume=resume,
            force=force,
            progress=progress,
            log=log,
        )
    except KeyboardInterrupt:
        advice = _way_back(Path(options["out"]))
        if advice is not None:
            print(f"\n{advice}", file=sys.stderr)
        raise
    _print_result(run, time.monotonic() - started)


def _settings_of(path: Path) -> dict[str, Any]:
    """Model, data, attack, loss and dtype of a run.

    Raises:
        RunError: no run, a network of one's own, or a damaged ``run.json``.
    """
    from marginflow.runs import load_run

    config = load_run(path).config
    if not config.get("model"):
        raise RunError(
            f"--from: the run in {str(path)!r} has a model of its own kind; begin with it from "
            "Python, with mf.maximize(model, …, start=RUN)"
        )
    return {name: config[name] for name in _TAKEN if config.get(name)} | {
        "model": config.get("model_spec")
    }


def _way_back(out: Path) -> str | None:
    """How an interrupted run is continued, or None if nothing of it is on disk."""
    from marginflow.distributed import apart
    from marginflow.runs import RunDirectory

    if not (out / "run.json").exists():
        return None
    # method loss-based is an ordinary training
    with apart():  # who was interrupted waits for nobody
        kind = RunDirectory(out).read_config().get("kind")
    command = "train" if kind == "train" else "maximize"
    return f"a checkpoint is written; continue with: marginflow {command} --resume --out {out}"


def _print_result(run: Run, seconds: float) -> None:
    from marginflow.cli._tables import print_runs

    final = run.final
    linear = "duality_gap" in final
    count = final["step"] if linear else run.config["epochs"]
    noun = "step" if linear else "epoch"
    print(f"{count} {noun}{'s' if count != 1 else ''} in {seconds:.1f} s; the run is in {run.path}")
    print(_gain(run.metrics[0]["normalized_margin"], final["normalized_margin"]))
    best = final.get("best_epoch")
    if best is not None and best != final["epoch"]:
        print(f"best at epoch {best}, whose weights are kept")
    if linear:
        state = "reached" if final["converged"] else "not reached: take more --epochs"
        print(
            f"duality gap: {final['duality_gap']:.2e} of the bound {final['duality_bound']:.6g} on the "
            f"margin of a\n  unit predictor, in the units of x ({state})"
        )
    print_runs([run])
    print(f"next: marginflow report {run.path}")


def _gain(before: float | None, after: float | None) -> str:
    """``γ̂_m: 0.00312 at the start, 0.0141 at the end, 4.5 times as large``."""
    if before is None or after is None:
        return f"γ̂_m at the end: {'not finite' if after is None else f'{after:.3g}'}"
    text = f"γ̂_m: {before:.3g} at the start, {after:.3g} at the end"
    return f"{text}, {after / before:.3g} times as large" if 0 < before < after else text
