"""``mf.rerun``: a recorded run from its beginning once more, and whether it comes out the same.

Source: marginflow.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marginflow._checks import instance, place, whole
from marginflow.attacks import Attack
from marginflow.datasets import Dataset
from marginflow.distributed import alone
from marginflow.engine import repeating
from marginflow.errors import InputError, RunError
from marginflow.runs import (
    Difference,
    Run,
    compare_records,
    compare_weights,
    load_run,
    weights_digest,
)
from marginflow.training import Callback, Trainer
from marginflow.workflow._begin import last_weights
from marginflow.workflow._flow import gradient_flow
from marginflow.workflow._linear import LINEAR
from marginflow.workflow._maximize import maximize
from marginflow.workflow._train import train

_SURROUNDINGS = ("versions", "git_revision", "machine", "threads", "processes")
_TRAIN = (
    "lr", "batch_size", "epochs", "momentum", "derivative", "measure", "keep_weights", "engine",
    "perturbation_precision", "shrink", "shards", "dtype", "device",
)  # fmt: skip
_FLOW = (
    "derivative", "log_time", "log_norm", "loss_below", "method", "rtol", "schedule", "patience",
    "max_evaluations", "keep_weights",
)  # fmt: skip
_MAXIMIZE = ("method", "epochs", "batch_size", "schedule", "engine", "dtype", "device")
_LATER: Mapping[str, Any] = {
    "engine": "autograd", "perturbation_precision": None, "shrink": False, "shards": None,
    "schedule": None,
}  # fmt: skip
"""What runs do not say that were recorded before there was a choice, or for which there is none."""


@dataclass(frozen=True, eq=False)
class Rerun:
    """What came of repeating a run.

    Source: marginflow.

    Attributes:
        original: the run as it was recorded.
        repeated: the run that was made now; its directory is gone if none was asked for.
        records: how many measurements were compared.
        step: at which the weights were compared, or None where the run has none.
        measurements: the measurements that differ, each with its first step and largest difference.
        weights: the tensors that differ at ``step``.
        surroundings: versions, machine, revision, threads and processes that differ: there, here.
        notes: what else is known to matter.
    """

    original: Run
    repeated: Run
    records: int
    step: int | None
    measurements: tuple[Difference, ...]
    weights: tuple[Difference, ...]
    surroundings: dict[str, tuple[Any, Any]]
    notes: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether every measurement and every weight is equal to the bit."""
        return not self.measurements and not self.weights

    @property
    def largest(self) -> float:
        """The largest relative difference of any measurement or weight; 0 where all are equal."""
        return max((d.relative for d in (*self.measurements, *self.weights)), default=0.0)

    @property
    def rounding(self) -> bool:
        """Whether all that differs is 64 units of rounding of the run's dtype at most."""
        unit = 2.0**-52 if self.original.config.get("dtype") == "float64" else 2.0**-23
        return self.largest <= 64 * unit

    def __str__(self) -> str:
        compared = f"{self.records} measurement{'s' if self.records != 1 else ''}"
        if self.step is not None:
            compared += f" and the weights at step {self.step}"
        if self.identical:
            lines = [f"identical to the bit: {compared}"]
        else:
            word = "equal within rounding" if self.rounding else "different"
            lines = [f"{word}: {compared}, by up to {self.largest:.1e} of their size"]
            lines += [f"  first: {d}" for d in self.measurements[:1]]
            worst = sorted(self.measurements, key=lambda d: -d.relative)[:3]
            lines += [f"  {d.name}: up to {d.relative:.1e}, from step {d.step} on" for d in worst]
            lines += [f"  weights {d.name}: up to {d.relative:.1e}" for d in self.weights[:3]]
        for name, (there, here) in self.surroundings.items():
            lines.append(f"  {name}: {there} there, {here} here")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def rerun(
    run: Run | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    epochs: int | None = None,
    model: nn.Module | None = None,
    data: Dataset | None = None,
    attack: Attack | None = None,
    start: Run | str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: bool = False,
) -> Rerun:
    """Repeat a recorded run from its beginning, as its ``run.json`` says, and compare.

    Settings, seed, number of threads and the library that multiplies are those of the run. On the same
    machine with the same versions every measurement and every weight comes out the same to the bit.
    A run that was interrupted is repeated up to where it is; one that was resumed, in one go.
    What ``run.json`` cannot hold has to be given again: a model, an attack or data of one's
    own, and the run that another began with. Nothing that ``run.json`` says is imported or executed.

    Source: marginflow; the training is Algorithm 1.

    Args:
        run: a run of ``mf.train``, ``mf.gradient_flow`` or ``mf.maximize``, or its directory.
        out: directory for the repetition; None makes it in a temporary one, which is removed.
        epochs: repeat the first epochs only.
        model: a network of one's own as it was before the run; it is trained.
        data: data that have no name; they are checked against the run's.
        attack: an attack of one's own that the run trained against.
        start: the run that a margin maximisation began with.
        data_dir: folder of the MNIST files.
        force: replace a run that ``out`` holds.
        progress: show a progress bar on standard error.

    Returns:
        the :class:`Rerun`: what was compared, and what differs.

    Raises:
        InputError: something that the run needs was not given; ``epochs`` before its first measurement.
        RunError: no run, a damaged one, one of a loop of one's own; other data than the run's; a run
            without checkpoint; ``out`` is taken.
        DivergedError: the repetition met NaN or infinity.

    Examples:
        >>> import marginflow as mf
        >>> _ = mf.train("mlp:4", "separable:n=20,d=6", epochs=5, out="runs/once")
        >>> mf.rerun("runs/once").identical
        True
    """
    alone("repeating a run", "call it outside of mf.distributed.join, without torchrun")
    for name, value, wanted, words in (
        ("model", model, nn.Module, "a torch.nn.Module"),
        ("data", data, Dataset, "a Dataset"),
        ("attack", attack, Attack, "an Attack"),
    ):
        if value is not None:
            instance(name, value, wanted, words)
    if out is not None:
        out = place("out", out)
    if not isinstance(run, Run):
        run = load_run(place("run", run))
    config = run.config
    kind = config.get("kind", "train")
    if kind not in _KINDS:
        raise RunError(
            f"the run {run.name!r} was recorded in a training loop of one's own, which only its author "
            "can repeat; expected a run of mf.train, mf.gradient_flow or mf.maximize"
        )
    if out is not None and run.path is not None and Path(out).resolve() == run.path.resolve():
        raise InputError(
            "out: expected another directory than that of the run, which stays as it is"
        )
    found = run.load_data(data, data_dir=data_dir)
    options = {"seed": _needed(run, "seed"), "loss": _needed(run, "loss"), "force": force}
    network: nn.Module | str
    if model is not None:
        network = model
    elif config.get("model"):
        network = str(config["model_spec"])
    else:
        raise InputError(
            f"the run {run.name!r} trained a model of its own kind; give it as it was before the run: "
            "model=…, or --model package.module:function"
        )
    _check_start(run, start)
    _attacks(run, attack)
    until = _Until(*_extent(run, epochs))
    with contextlib.ExitStack() as stack:
        if out is None:
            out = (
                Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="marginflow-"))) / "run"
            )
        stack.enter_context(_surroundings(config))
        repeat = _KINDS[kind]
        repeat(
            run, network, found, attack, start, until, {**options, "out": out, "progress": progress}
        )
        return _compared(run, load_run(out), until)


class _EnoughError(Exception):
    """The repetition has come as far as the run."""


class _Until(Callback):
    """Ends a repetition after a step, and keeps the weights of another one on the way.

    Args:
        last: the step after which nothing of the run is left to compare, or None: to the end.
        kept: the step of the run's checkpoint, or None.
    """

    def __init__(self, last: int | None, kept: int | None) -> None:
        self.last = last
        self.step = kept
        self.weights: dict[str, Tensor] = {}

    def on_step(self, trainer: Trainer) -> None:
        """Keep the weights; stop one step later, when all that belongs to the last one is on disk."""
        if trainer.step == self.step:
            self.weights = {
                name: value.detach().cpu().clone()
                for name, value in trainer.model.state_dict().items()
            }
        if self.last is not None and trainer.step > self.last:
            raise _EnoughError


def _extent(run: Run, epochs: int | None) -> tuple[int | None, int | None]:
    """The last step that is compared, and the step whose weights are."""
    saved = None if run.path is None else int(run.checkpoint().info["step"])
    steps = [int(record["step"]) for record in run.metrics]
    if epochs is not None:
        epochs = whole("epochs", epochs, least=0)
        if run.config.get("kind") == "flow":
            raise InputError("epochs: a gradient flow has none; it is repeated as a whole")
        steps = [int(r["step"]) for r in run.metrics if r.get("epoch", epochs + 1) <= epochs]
        if not steps:
            raise InputError(
                f"epochs: the run has no measurement up to epoch {epochs}; expected at least "
                f"{run.metrics[0].get('epoch') if run.metrics else 'one measurement'}"
            )
        last = max(steps)
        return last, saved if saved is not None and saved <= last else None
    reached = [*steps, *([] if saved is None else [saved])]
    if not reached:
        raise RunError(f"the run {run.name!r} has neither measurements nor checkpoints to compare")
    return max(reached), saved


def _check_start(run: Run, start: Run | str | os.PathLike[str] | None) -> None:
    """Refuse a start where there is none, and another than that of the run.

    Raises:
        InputError: one that is missing, or not needed.
        RunError: other weights.
    """
    origin = run.config.get("from")
    if not origin:
        if start is not None:
            raise InputError(
                "start: the run did not begin with another one, as a margin maximisation can; leave it out"
            )
        return
    if start is None:
        raise InputError(
            f"the run {run.name!r} began with the weights of the run {origin.get('run')!r}: give it, "
            "start=…, or --from RUN"
        )
    wanted, found = origin.get("weights_sha256"), weights_digest(last_weights(start)[1])
    if found != wanted:
        raise RunError(
            f"start: expected the weights that the run {run.name!r} began with (SHA-256 {wanted}), got "
            f"others ({found})"
        )


def _train(
    run: Run,
    model: nn.Module | str,
    data: Dataset,
    attack: Attack | None,
    start: Run | str | os.PathLike[str] | None,
    until: _Until,
    options: dict[str, Any],
) -> None:
    settings = {name: _needed(run, name) for name in _TRAIN}
    # A run that was prolonged has measurements that its schedule would not make now.
    measured = {int(record["epoch"]) for record in run.metrics}
    with contextlib.suppress(_EnoughError):
        train(
            model,
            data,
            **settings,
            **_attacks(run, attack),
            **options,
            schedule=measured or _needed(run, "schedule"),
            callbacks=[until],
        )


def _maximize(
    run: Run,
    model: nn.Module | str,
    data: Dataset,
    attack: Attack | None,
    start: Run | str | os.PathLike[str] | None,
    until: _Until,
    options: dict[str, Any],
) -> None:
    settings = {name: _needed(run, name) for name in _MAXIMIZE}
    name = str(settings["method"]).partition(":")[0]
    callbacks = [until]
    if name in LINEAR:
        # Solved at once: there is no step to stop at.
        callbacks, until.last = [], None
        settings |= {"batch_size": None}
    with contextlib.suppress(_EnoughError):
        maximize(
            model, data, **settings, **_attacks(run, attack), **options, start=start,
            callbacks=callbacks,
        )  # fmt: skip


def _flow(
    run: Run,
    model: nn.Module | str,
    data: Dataset,
    attack: Attack | None,
    start: Run | str | os.PathLike[str] | None,
    until: _Until,
    options: dict[str, Any],
) -> None:
    settings = {name: _needed(run, name) for name in _FLOW}
    if run.config.get("ended") is None and run.metrics:
        # Interrupted: its last measurement is a point of the schedule, at which a flow can end.
        settings["log_time"] = run.metrics[-1]["log_time"]
    given = {k: v for k, v in _attacks(run, attack).items() if k == "attack"}
    gradient_flow(model, data, **settings, **given, **options)
    until.last = None


_Repeat = Callable[
    [
        Run,
        nn.Module | str,
        Dataset,
        Attack | None,
        Run | str | os.PathLike[str] | None,
        _Until,
        dict[str, Any],
    ],
    None,
]
_KINDS: Mapping[str, _Repeat] = {"train": _train, "maximize": _maximize, "flow": _flow}


def _attacks(run: Run, attack: Attack | None) -> dict[str, Any]:
    """The attacks by their specifications; ``attack`` in the place of one that has the same."""
    given: dict[str, Any] = {}
    for name in ("attack", "measure_with"):
        spec = str(run.config.get(name, "none"))
        given[name] = spec if attack is None or attack.spec != spec else attack
    if attack is not None and attack not in given.values():
        raise InputError(
            f"attack: expected {run.config.get('attack')!r}, which the run trained against, got "
            f"{attack.spec!r}"
        )
    return given


def _needed(run: Run, name: str) -> Any:
    """A setting of the run.

    Raises:
        RunError: it is not in ``run.json``.
    """
    if name in run.config:
        return run.config[name]
    if name in _LATER:
        return _LATER[name]
    raise RunError(
        f"the run.json of {run.name!r} lacks {name!r}, without which it cannot be repeated"
    )


@contextlib.contextmanager
def _surroundings(config: Mapping[str, Any]) -> Iterator[None]:
    """The threads, the precision and the products of the run, put back afterwards.

    Raises:
        RunError: ``run.json`` holds none that there are.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    wanted = config.get("threads", threads)
    asked = config.get("float32_matmul_precision", precision)
    if not isinstance(wanted, int) or not 1 <= wanted <= 4096:
        raise RunError(f"run.json: expected threads, a number from 1 to 4096, got {wanted!r}")
    if asked not in ("highest", "high", "medium"):
        raise RunError(f"run.json: float32_matmul_precision is {asked!r}, which is none of torch's")
    products = config.get("products")
    if products not in (None, "default", "onednn"):
        raise RunError(f"run.json: products is {products!r}; expected 'default' or 'onednn'")
    try:
        torch.set_num_threads(wanted)
        torch.set_float32_matmul_precision(asked)
        with repeating(products):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _compared(run: Run, again: Run, until: _Until) -> Rerun:
    """Both runs beside each other, as far as both go."""
    here = {int(record["step"]) for record in again.metrics}
    last = until.last
    there = [r for r in run.metrics if last is None or int(r["step"]) <= last]
    missing = [int(r["step"]) for r in there if int(r["step"]) not in here]
    measurements = compare_records(there, again.metrics)
    if missing:
        lost = Difference("measurement", missing[0], float("inf"), "made", "not made")
        measurements = (lost, *measurements)
    weights: tuple[Difference, ...] = ()
    step = until.step
    if step is not None:
        mine = _weights_at(again, until)
        theirs = {
            name.removeprefix("model."): value
            for name, value in run.checkpoint().tensors.items()
            if name.startswith("model.")
        }
        weights = compare_weights(theirs, mine, step)
    notes = []
    began, begins = run.config.get("begun_with"), again.config.get("begun_with")
    if began is not None and began != begins:
        notes.append(
            "the run began with other weights than these: its model was not drawn with its seed alone; "
            "give it as it was before the run (model=…)"
        )
    measured = {r["step"] for r in there}
    if run.path is not None and len(list(run.path.resolve().parent.glob("seed-*/run.json"))) > 1:
        notes.append("trained beside other seeds, whose products are rounded together")
    return Rerun(
        run,
        again,
        len(measured & here),
        step,
        measurements,
        weights,
        _differing(run.config, again.config),
        tuple(notes if measurements or weights else ()),
    )


def _weights_at(again: Run, until: _Until) -> dict[str, Tensor]:
    """The weights of the repetition at the step of the run's checkpoint."""
    final = again.checkpoint()
    if int(final.info["step"]) != until.step:
        return until.weights
    # At the end the best weights may have been put back, after the last step.
    return {
        name.removeprefix("model."): value
        for name, value in final.tensors.items()
        if name.startswith("model.")
    }


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for name in _SURROUNDINGS:
        a, b = there.get(name), here.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= {k: (a.get(k), b.get(k)) for k in [*a, *b] if a.get(k) != b.get(k)}
        elif a != b:
            found[name] = (a, b)
    return found
