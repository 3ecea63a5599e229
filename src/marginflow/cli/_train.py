"""``marginflow train``."""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from marginflow._reading import read_toml
from marginflow.cli._options import take_log, use_threads
from marginflow.cli._seeds import print_seeds, run_with_options, take_seeds, way_back
from marginflow.errors import InputError, RunError

if TYPE_CHECKING:
    from marginflow.runs import Run

_STORED = (
    "data", "attack", "measure_with", "loss", "lr", "batch_size", "epochs", "momentum",
    "derivative", "seed", "dtype", "device", "measure", "schedule", "keep_weights",
)  # fmt: skip
_ADDED = {"shrink": False, "shards": None}
"""Options that older runs do not have, with what held of these."""
_KINDS = {
    "train": ("a training run", "mf.train"),
    "flow": ("a gradient flow", "mf.gradient_flow"),
    "maximize": ("a margin maximisation", "mf.maximize"),
    "monitor": ("a monitored loop", "mf.Monitor"),
}
"""What the kinds of runs are called, and the functions that make them."""


def run_training(
    given: Mapping[str, Any],
    *,
    config: Path | None,
    resume: bool,
    force: bool,
    measure: bool,
    keep_weights: bool | None,
    progress: bool,
) -> None:
    """Train as ``given`` (the options named on the command line) and ``config`` say."""
    options = {**_read_config(config), **given}
    kept = options.pop("keep_weights", None)
    keep_weights = kept if keep_weights is None else keep_weights
    schedule = None
    where = None
    seeds = take_seeds(options)
    if resume:
        if "out" not in options:
            raise InputError("--resume needs --out RUN, the run directory to continue")
        where = run_with_options(Path(options["out"]), seeds)
        stored = stored_options(where, "train", _STORED, _ADDED)
        if seeds is not None:
            stored.pop("seed")
        measure, schedule = stored.pop("measure"), stored.pop("schedule")
        keep_weights = stored.pop("keep_weights")
        options = {**stored, **options}
    for name, example in [("data", "digits:3,8"), ("model", "mlp:256,32")]:
        if name not in options:
            raise InputError(f"--{name} is missing; for example --{name} {example}")
    log = take_log(options, where)

    import marginflow as mf
    from marginflow.distributed import first

    use_threads(options.pop("threads", None))
    data_dir = options.pop("data_dir", None)
    data = mf.load(options.pop("data"), data_dir=data_dir)
    options.setdefault("dtype", "float32")
    if "out" not in options:
        options["out"] = first(free_name)(data.name, options.get("attack", "none"))
    if goes_on(Path(options["out"])):
        resume, force = True, False
    train = _train_one if seeds is None else functools.partial(mf.train_seeds, seeds=seeds)
    started = time.monotonic()
    try:
        runs = train(
            options.pop("model"),
            data,
            **options,
            measure=measure,
            schedule=schedule,
            keep_weights=keep_weights,
            resume=resume,
            force=force,
            progress=progress,
            log=log,
        )
    except KeyboardInterrupt:
        advice = way_back(Path(options["out"]), seeds)
        if advice is not None:
            print(f"\n{advice}", file=sys.stderr)
        raise
    seconds = time.monotonic() - started
    if seeds is not None:
        print_seeds(runs, Path(options["out"]), seconds)
        return
    (run,) = runs
    print(f"{run.config['epochs']} epochs in {seconds:.1f} s; the run is in {run.path}")
    effect = run.config.get("perturbation_effect")
    if effect is not None:
        name = "γ̂_m" if run.metrics else "min_i m_i"
        print(
            f"perturbation in bf16: {effect['changed']:.2%} of the inputs' coordinates differ;\n"
            f"  {name} {effect['margin_bf16']:.4g} under it, {effect['margin_float32']:.4g} in float32;\n"
            f"  adversarial accuracy {effect['accuracy_bf16']:.4%} under it, "
            f"{effect['accuracy_float32']:.4%} in float32"
        )
    if run.metrics:
        from marginflow.cli._tables import print_runs

        print_runs([run])
        print(f"next: marginflow report {run.path}")


def _train_one(*given: Any, **options: Any) -> list[Run]:
    from marginflow.workflow import train

    return [train(*given, **options)]


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = read_toml(path)
    except OSError as error:
        raise InputError(f"--config: cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"--config: {str(path)!r} is no TOML file: {error}") from None
    from marginflow.sweeps import JOBS, take_options

    types = {**JOBS["train"], "seeds": (int, str), "out": str}
    return take_options(content, types, "--config")


def stored_options(
    path: Path, kind: str, names: Sequence[str], added: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The options under which the run of this ``kind`` in ``path`` was started.

    Args:
        path: the run directory.
        kind: ``train``, ``flow`` or ``maximize``.
        names: of the options.
        added: options that runs of earlier versions lack, with their values there.

    Raises:
        RunError: a run of another kind, of a model of one's own, or without one of ``names``.
    """
    from marginflow.runs import RunDirectory

    config = RunDirectory(path).read_config()
    if config.get("kind") != kind:
        found = str(config.get("kind"))
        if found not in _KINDS:
            raise RunError(
                f"{str(path)!r} is not {_KINDS[kind][0]} but of a kind that is not known"
            )
        noun, verb = _KINDS[found]
        raise RunError(
            f"{str(path)!r} is not {_KINDS[kind][0]} but {noun}; continue it with {verb}(…, resume=True)"
            + ("" if found == "monitor" else f", or marginflow {found} --resume")
        )
    if not config.get("model"):
        raise RunError(
            f"the run in {str(path)!r} has a model of its own kind; resume it from Python, with "
            f"{_KINDS[kind][1]}(model, …, resume=True)"
        )
    try:
        options = {name: config[name] for name in names}
        options |= {name: config.get(name, before) for name, before in added.items()}
        return options | {"model": config["model_spec"]}
    except KeyError as error:
        raise RunError(f"the run.json in {str(path)!r} lacks {error}") from None


def goes_on(out: Path) -> bool:
    """Whether torchrun has started the processes again (``--max-restarts``), with a run to go on with."""
    from marginflow.distributed import first, restarted

    return restarted() and first((out / "run.json").exists)()


def free_name(data: str, attack: str) -> Path:
    """A new folder under ``runs/`` that says what is in it."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{data} {attack.partition(':')[0]}".lower()).strip("-")
    number = 1
    while (path := Path("runs") / f"{words}-{number:03d}").exists():
        number += 1
    return path
