"""What every whole job does before its first step: check, describe for ``run.json``, open the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marginflow._checks import choice, instance, place, whole
from marginflow._finite import spoilt
from marginflow.attacks import Attack, Derivative, check_budget
from marginflow.attacks import build as build_attack
from marginflow.datasets import Dataset, load
from marginflow.distributed import current
from marginflow.errors import InputError, ModelError, RunError
from marginflow.homogeneity import Homogeneity, evaluation_mode
from marginflow.losses import Loss, get_loss
from marginflow.models import build as build_model
from marginflow.models._build import number_of_weights
from marginflow.monitor import Monitor
from marginflow.runs import (
    Checkpoint,
    Log,
    RunDirectory,
    Sink,
    check_sinks,
    provenance,
    weights_digest,
)
from marginflow.training import Callback

_NOUNS = {"train": "training", "flow": "flow", "maximize": "margin maximisation"}
_VERBS = {
    "train": "mf.train",
    "flow": "mf.gradient_flow",
    "maximize": "mf.maximize",
    "monitor": "mf.Monitor",
}
_LARGEST = 2**28  # weights of a run without checkpoints that is resumed: 1 GiB in float32
_BEFORE = {"engine": "autograd", "shrink": False, "shards": None}
"""What held of runs that were recorded before there was a choice."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What a job works on, every specification made an object.

    Attributes:
        data: the data set as given, of its own dtype.
        model: the network; :meth:`place` moves it.
        model_spec: the specification that it was built from, or the name of its class.
        built: whether it was built here, from a specification.
        attack: the perturbation of the objective. measured: that of the measurements.
        loss: the loss. derivative: ``detached`` or ``total``. seed: of the model and the job.
        log: the sinks of the measurements.
    """

    data: Dataset
    model: nn.Module
    model_spec: str
    built: bool
    attack: Attack | None
    measured: Attack | None
    loss: Loss
    derivative: Derivative
    seed: int
    log: tuple[str | Sink, ...] = ()

    def place(self, dtype: torch.dtype, device: torch.device) -> Dataset:
        """Move the model, and return the data moved; one evaluation of everything on the way.

        Raises:
            ModelError: the model, the data and the attack do not fit each other.
        """
        self.model.to(device=device, dtype=dtype)
        team = current()
        if team is not None:
            # Weights that were drawn without a seed differ from process to process.
            team.take_over(list(self.model.state_dict().values()))
        name = spoilt(self.model)
        if name is not None:
            raise ModelError(
                f"the model: expected finite weights, got NaN or infinity in {name!r} (as {dtype}); "
                "initialise the model, or load other weights"
            )
        placed = self.data.to(dtype=dtype, device=device)
        _check_fit(self.model, placed, self.loss, self.attack, self.measured)
        return placed

    def config(
        self,
        kind: str,
        own: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        device: torch.device,
        homogeneity: Homogeneity | None,
    ) -> dict[str, Any]:
        """The content of ``run.json``, with what only this kind of job has in its middle."""
        data, attack, measured = self.data, self.attack, self.measured
        return {
            "kind": kind,
            "data": data.name,
            "data_sha256": data.fingerprint(),
            "data_bounds": None if data.bounds is None else list(data.bounds),
            "classes": list(data.classes),
            "examples": data.n,
            "model_spec": self.model_spec,
            "model": getattr(self.model, "config", None),
            "attack": "none" if attack is None else attack.spec,
            "measure_with": "none" if measured is None else measured.spec,
            "loss": self.loss.name,
            **own,
            "seed": self.seed,
            "dtype": str(dtype).removeprefix("torch."),
            # Of several processes each has a GPU of its own.
            "device": str(device) if current() is None else device.type,
            "layers": None if homogeneity is None else homogeneity.table(),
        }


def prepare(
    model: nn.Module | str,
    data: Dataset | tuple[Tensor, Tensor] | str,
    *,
    attack: Attack | str | None,
    measure_with: Attack | str | None = None,
    loss: str | Loss | None,
    binary_loss: str,
    derivative: Derivative,
    seed: int,
    out: str | os.PathLike[str] | None,
    resume: bool,
    force: bool,
    log: Log = (),
) -> Setup:
    """Make objects of what a job was given, and refuse what cannot be used.

    Args:
        model: a network or its specification.
        data: a data set, a pair (x, y), or a specification.
        attack: the perturbation of the objective.
        measure_with: that of the measurements; by default ``attack``.
        loss: by default ``binary_loss`` for two classes −1/+1, ``cross-entropy`` otherwise.
        binary_loss: the name of a loss.
        derivative: ``detached`` or ``total``.
        seed: of a model given as a string.
        out: run directory.
        resume: continue what is there.
        force: replace what is there.
        log: the sinks of the measurements.

    Raises:
        InputError: an argument that cannot be used.
        MissingDependencyError: a sink's library is not installed.
    """
    data = _as_data(data)
    instance("model", model, str | nn.Module, "a torch.nn.Module, or a specification")
    if out is not None:
        place("out", out)
    built = isinstance(model, str)
    model_spec = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        outputs = 1 if data.binary else data.num_classes
        if resume and out is not None:
            _check_size(model, data.shape, outputs, Path(out))
        model = build_model(model, input_shape=data.shape, outputs=outputs, seed=seed)
    if resume and force:
        raise InputError("resume and force exclude each other: continue the run, or replace it")
    if resume and out is None:
        raise InputError("resume needs out=…, the run directory to continue")
    attack, measured = build_attack(attack), build_attack(measure_with)
    if measured is None:
        measured = attack
    loss = get_loss(loss if loss is not None else (binary_loss if data.binary else "cross-entropy"))
    choice("derivative", derivative, ("detached", "total"))
    seed = whole("seed", seed, least=0)
    for budget in (attack, measured):
        check_budget(budget, data.shape, data.bounds)
    sinks = check_sinks(log, out=out)
    return Setup(data, model, model_spec, built, attack, measured, loss, derivative, seed, sinks)


def _check_size(model: str, shape: Sequence[int], outputs: int, out: Path) -> None:
    """Refuse a recorded network that is larger than its checkpoints, before it is allocated."""
    kept = sum(path.stat().st_size for path in out.glob("checkpoints/step-*.safetensors"))
    count = number_of_weights(model, input_shape=shape, outputs=outputs)
    if count > max(kept, _LARGEST):
        raise RunError(
            f"{str(out)!r} names the model {model!r} with {count:,} weights, more than its checkpoints "
            "hold; it is damaged: train it again with another directory"
        )


def _as_data(data: object) -> Dataset:
    if isinstance(data, str):
        return load(data)
    if isinstance(data, Dataset):
        return data
    if isinstance(data, tuple | list) and len(data) == 2:
        return Dataset(*data)
    raise InputError(
        "data: expected a Dataset, a pair (x, y) or a specification such as 'digits:3,8', got "
        f"{type(data).__name__}"
    )


def as_schedule(schedule: object) -> list[int] | None:
    """The epochs at which to measure, sorted, each once.

    Raises:
        InputError: something else than whole numbers of at least 0.
    """
    if schedule is None:
        return None
    if isinstance(schedule, str) or not isinstance(schedule, Iterable):
        raise InputError(f"schedule: expected a collection of epochs, got {schedule!r}")
    return sorted({whole("schedule", epoch, least=0) for epoch in schedule})


def as_callbacks(callbacks: object) -> tuple[Callback, ...]:
    """The callbacks of a training.

    Raises:
        InputError: something else.
    """
    given = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    for callback in given:
        instance("callbacks", callback, Callback, "a list of marginflow.training.Callback")
    return given


def open_directory(
    out: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    free: Collection[str],
    restore: Callable[[Checkpoint], int],
    model: nn.Module,
    monitor: Monitor | None,
    resume: bool,
    force: bool,
) -> tuple[RunDirectory, float]:
    """The locked directory, and the seconds that earlier processes spent on the run.

    A run that is resumed continues from its last checkpoint: what was measured after it is cut off.

    Args:
        out: the run directory.
        config: the content of ``run.json``.
        free: settings that may change when a run is resumed, and are written if they did.
        restore: takes a checkpoint's state over, and returns its step.
        model: as it begins; the digest of its weights is written.
        monitor: given the records of a run that is resumed.
        resume: continue what is there.
        force: replace what is there.

    Raises:
        RunError: ``out`` is taken, or holds a run that cannot be continued so.
        StorageError: the disk refuses.
    """
    if not resume:
        origin = {**provenance(), "begun_with": weights_digest(model.state_dict())}
        return RunDirectory.create(out, {**config, **origin}, force=force), 0.0
    directory = RunDirectory.reopen(out)
    try:
        stored = directory.read_config()
        kind, found = config["kind"], stored.get("kind", "train")
        if found != kind:
            raise RunError(
                f"{os.fspath(out)!r} is not a {_NOUNS[kind]}; continue it with "
                f"{_VERBS.get(found, 'what began it')}"
            )
        # The layers follow from the model and the weights, which the checkpoint checks.
        _check_same(stored, config, {*free, "layers"})
        checkpoint = directory.checkpoint_to_resume()
        step, elapsed = -1, 0.0
        if checkpoint is not None:
            _check_dtype(checkpoint, str(config["dtype"]))
            step = restore(checkpoint)
            elapsed = float(checkpoint.info.get("elapsed_seconds", 0.0))
        directory.truncate_metrics(step)
        if monitor is not None:
            monitor.records.extend(directory.read_metrics())
        now = {**stored, **{name: config[name] for name in free}}
        if now != stored:
            directory.write_config(now)
    except BaseException:
        directory.close()
        raise
    return directory, elapsed


def _check_dtype(checkpoint: Checkpoint, dtype: str) -> None:
    """Refuse weights of another precision: converted, they would not be those of the run."""
    for name, value in checkpoint.tensors.items():
        found = str(value.dtype).removeprefix("torch.")
        if name.startswith("model.") and value.is_floating_point() and found != dtype:
            raise RunError(
                f"the checkpoint {checkpoint.path.name} is of another run: {name!r} is {found} in it, "
                f"expected {dtype}"
            )


def _check_same(
    stored: Mapping[str, Any], config: Mapping[str, Any], free: Collection[str]
) -> None:
    """Refuse to continue a run under other settings; those in ``free`` may change."""
    stored = {**_BEFORE, **stored}
    differing = [
        key for key, value in config.items() if key not in free and stored.get(key) != value
    ]
    if differing:
        changes = "; ".join(
            f"{k}: {stored.get(k)!r} there, {config[k]!r} now" for k in differing[:4]
        )
        raise RunError(
            f"cannot resume under other settings ({changes}); use another directory (out=…, --out)"
        )


def _check_fit(
    model: nn.Module,
    data: Dataset,
    loss: Loss,
    attack: Attack | None,
    measured: Attack | None,
) -> None:
    """One evaluation of everything on a few examples, so that nothing fails after step 0."""
    x, y = data.x[:2], data.y[:2]
    with torch.no_grad(), evaluation_mode(model):
        try:
            outputs = model(x)
        except RuntimeError as error:
            raise ModelError(
                f"the model does not take examples of shape {data.shape}: {str(error).splitlines()[0]}"
            ) from error
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"the model: expected a tensor as output, got {type(outputs).__name__}"
            )
        loss.scores(outputs, y)
        # All labels, with outputs of the right shape, and not only those of two examples.
        loss.scores(outputs[:1].expand(data.n, *outputs.shape[1:]), data.y)
    for tried in (attack, measured):
        if tried is not None:
            tried(model, x, y, generator=torch.Generator().manual_seed(0))
