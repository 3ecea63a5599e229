"""Where anybody's training is going: margins, norms and accuracies along the way."""

from __future__ import annotations

import dataclasses
import logging
import math
import operator
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from marginflow._checks import whole
from marginflow.attacks import Attack, check_budget
from marginflow.attacks import build as build_attack
from marginflow.datasets import Dataset
from marginflow.distributed import current
from marginflow.errors import InputError, ModelError, NotHomogeneousError, RunError
from marginflow.homogeneity import Homogeneity, evaluation_mode, measure_homogeneity
from marginflow.losses import Loss, check_labels, get_loss
from marginflow.models import Network
from marginflow.monitor._inputs import Data, as_dataset, declared, plain, unwrapped
from marginflow.monitor._record import NORMALIZED, Subject, for_json, parameter_norms, record_of
from marginflow.monitor._recorder import Recorder
from marginflow.monitor._schedule import Due, Schedule
from marginflow.monitor._strong import Strong, overfitting_of, stronger
from marginflow.overfitting import Overfitting
from marginflow.runs import (
    Log,
    Metrics,
    Run,
    RunDirectory,
    Sinks,
    check_sinks,
    open_sinks,
    provenance,
)

UNDECLARED = "undeclared"
"""The attack of a loop that does not say what it trains against."""

_log = logging.getLogger("marginflow")


class Monitor:
    """Measures margins, accuracies and norms of a network that is trained anywhere.

    ::

        monitor = mf.Monitor(model, (x, y), attack, out="runs/mine")
        for epoch in range(1000):
            ...                      # one epoch of anybody's training
            monitor.measure(epoch)

    ``runs/mine`` is then a run like those of ``mf.train``: ``marginflow report``, ``compare``,
    ``measure`` and ``mf.verify`` read it.

    What is measured is left as it was: the model's mode, weights, gradients, buffers and device,
    and the state of the random generators. Margins are taken in evaluation mode.

    A network that is not multi-homogeneous (a bias in a hidden layer, batch norm, GELU) has no normalised
    margins. Measured are then the margins as they are, accuracies, the norms of the single parameters and
    the alarm of catastrophic overfitting; :attr:`left_out` says what is missing and why, and so do
    a warning in the log, ``run.json`` and the report.

    Source: marginflow; the normalised margins are those of Section 3.2.

    Args:
        model: the network; wrappers of ``torch.compile``, ``DataParallel`` and
            ``DistributedDataParallel`` are taken off.
        data: the examples whose margins count: a :class:`marginflow.Dataset`, a pair (x, y), or a loader of
            batches (x, y), which is read once. A data set's test split is measured too.
            Labels are −1/+1 for one output, 0 … C − 1 for C outputs.
        attack: the perturbation, or its specification; None measures clean margins only.
        loss: the loss whose logarithm is recorded; None records none.
        batch_size: examples per pass.
        homogeneity: the measured layers, if at hand.
        examples: measure at most so many examples, drawn with ``seed``; test examples likewise.
        seed: of that draw.
        schedule: which calls of :meth:`measure` measure: ``log``, at logarithmically spaced steps (28
            for a thousand epochs); ``every``; or a collection of steps.
        strong: the stronger attack of :attr:`overfitting`; ``auto`` takes PGD with seven steps beside FGM
            and FGSM, and nothing beside others; None measures none.
        out: a run directory; None keeps everything in memory.
        resume: continue the run in ``out`` if there is one: measurements from the first
            measured step on are replaced.
        force: replace the run in ``out``.
        keep_weights: keep the weights of every measurement, for statements about a path.
        log: where measurements go beside ``metrics.jsonl``: ``tensorboard``, ``mlflow``, or any object
            with ``write(records)`` and ``close()``.
        training: what the loop wants to say of itself for reports and verdicts: any of attack,
            batch_size, derivative, epochs, loss, lr, momentum, seed. Hypotheses about
            what is not said count as unknown.

    Raises:
        InputError: an argument that cannot be used.
        MissingDependencyError: a library of ``log`` is not installed; nothing is written then.
        DataError: data that cannot be used.
        ModelError: a random network, outputs that are no tensor, or all 0.
        RunError: ``out`` is taken, or cannot be continued.
        StorageError: the disk refuses.

    Attributes:
        records: all measurements so far, oldest first.
        left_out: why some quantities are not measured, by their names; empty for homogeneous networks.
        active: whether this process measures: in a distributed loop, the process of rank 0 alone.

    Examples:
        >>> import marginflow as mf
        >>> data = mf.load("separable:n=20,d=6,margin=0.3")
        >>> model = mf.models.mlp(6, 8, 1, seed=0).double()
        >>> monitor = mf.Monitor(model, data, mf.attacks.FGSM(eps=0.05))
        >>> for epoch in range(3):
        ...     _ = monitor.measure(epoch)  # after an epoch of anybody's training
        >>> [record["step"] for record in monitor.records]
        [0, 1, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        attack: Attack | str | None = None,
        *,
        loss: str | Loss | None = None,
        batch_size: int = 1024,
        homogeneity: Homogeneity | None = None,
        examples: int | None = None,
        seed: int = 0,
        schedule: Schedule = "log",
        strong: Attack | str | Literal["auto"] | None = "auto",
        out: str | os.PathLike[str] | None = None,
        resume: bool = False,
        force: bool = False,
        keep_weights: bool = False,
        log: Log = (),
        training: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if resume and force:
            raise InputError("resume and force exclude each other: continue the run, or replace it")
        self.model = unwrapped(model)
        if any(isinstance(w, UninitializedParameter) for w in self.model.parameters()):
            raise ModelError("the model has lazy layers without weights yet: run one batch first")
        # What is made in inference mode is no good for autograd.
        with torch.inference_mode(False):
            whole_data = as_dataset(data)
        self.attack = build_attack(attack)
        self.loss = None if loss is None else get_loss(loss)
        self.batch_size = whole("batch_size", batch_size, least=1)
        self._due = Due(schedule)
        said = declared(training)
        sinks = check_sinks(log, out=out)
        against = stronger(self.attack) if strong == "auto" else build_attack(strong)
        with torch.inference_mode(False):
            self.data = whole_data if examples is None else whole_data.sample(examples, seed=seed)
        for budget in (self.attack, against):
            check_budget(budget, self.data.shape, self.data.bounds)
        self.homogeneity, reason = homogeneity, ""
        if homogeneity is None:
            self.homogeneity, reason = _layers(self.model, self.data)
        self.left_out = dict.fromkeys(NORMALIZED, reason) if reason else {}
        self._strong = None if against is None else Strong(self._subject, against, schedule)
        self._told = (whole_data.name, examples, seed, schedule, said)
        self._recorder: Recorder | None = None
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._flagged = self._warned = self._closed = False
        # Layers that were given are the caller's to keep right.
        self._trainable = None if homogeneity is not None else _trainable(self.model)
        names = (
            parameter_norms(self.model)
            if self.homogeneity is None
            else [layer.name for layer in self.homogeneity.layers]
        )
        self.records = Metrics(layers=list(names))
        # In somebody's distributed loop every process calls, and one measures; those that were
        # joined divide the examples.
        group = torch.distributed
        follows = group.is_available() and group.is_initialized() and group.get_rank() > 0
        self.active = current() is not None or not follows
        if homogeneity is None:
            self._try()
        if reason:
            _log.warning("Monitor: %s; measured are margins without normalisation", reason)
        if out is not None and self.active:
            if not resume:
                RunDirectory.check_free(out, force=force)
            self._recorder = Recorder(
                out, self.config, keep_weights=keep_weights, resume=resume, force=force
            )
            self.records.extend(self._recorder.records)
            if self.records:
                self._due.before = int(self.records[-1]["step"])
        self._sinks = Sinks()
        self._log = sinks if self.active else ()

    def measure(self, step: int, *, now: bool = False, **context: Any) -> dict[str, Any]:
        """Measure, if ``step`` is due on the schedule; return the latest record.

        Every number is a Python float, so records can be stored as JSON. Margins are
        normalised by ρ unless their name says otherwise.

        Args:
            step: what the caller counts, say epochs.
            now: measure in any case.
            context: further entries of the record (epoch, training loss …).

        Returns:
            the record of ``step``; where the step was not due, the one before, whose ``step`` says
            which. Empty on the processes of a distributed loop that do not measure.

        Raises:
            InputError: a step that is no whole number, or a context that JSON cannot hold.
            DataError: labels that do not fit the network.
            StorageError: the disk refuses.
        """
        # numpy's whole numbers too
        step = whole("step", operator.index(step) if hasattr(step, "__index__") else step, least=0)
        if not self.active:
            return {}
        if self._closed:
            raise RunError(
                "the monitor is closed, and its run directory free; make another one, with resume=True"
            )
        due = self._due(step)
        if not due and not now:
            self._pending = (step, context)
            return self.records[-1] if self.records else {}
        self._pending = None
        if self._recorder is not None:
            self._recorder.begin(step, self.records)
        if self._log:
            # Only now: a run that is continued has lost what is measured again.
            place = None if self._recorder is None else self._recorder.directory.path
            config, team = self.run.config, current()
            if team is None or team.rank == 0:
                self._sinks = open_sinks(self._log, place, config, records=self.records)
            self._log = ()
        told = {key: plain(key, value) for key, value in context.items()}
        self._follow_freezing()
        with _quietly(self.model):
            found = self._found()
            if self._strong is not None and not self._spoilt():
                found |= self._strong.measure(step, forced=now)
        # Our own trainings, which give the layers, tell ln L as they went; the measured one counts.
        for name in told.keys() & found.keys() if self._trainable is not None else ():
            raise InputError(f"{name}: a measurement has this name; give it another")
        record = {key: for_json(value) for key, value in ({"step": step} | told | found).items()}
        self.records.append(record)
        if record["margin"] is None and not self._warned:
            _log.warning("Monitor: at step %d the smallest margin is NaN or infinite: null", step)
            self._warned = True
        self._raise_alarm()
        if self._recorder is not None:
            self._recorder.write(record, self.model)
        self._sinks.write([record])
        return record

    def close(self) -> None:
        """Measure the last step, if it was not due, and release the run directory.

        Also what leaving a ``with`` block does. Without it that last step is lost, and perhaps
        the weights of the last measurements: checkpoints take 0.3 % of the time at most.
        """
        if self._pending is not None:
            step, context = self._pending
            self.measure(step, now=True, **context)
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self._sinks.close(error)
        if self._recorder is not None:
            self._recorder.close()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._pending = None  # the weights may be anything now
            self._end(error)
        else:
            self.close()

    @property
    def run(self) -> Run:
        """The run so far, as :func:`marginflow.verify` and the report take it."""
        path: Path | None = None
        config = {**self.config, **provenance()}
        if self._recorder is not None:
            path = self._recorder.directory.path
            config = self._recorder.directory.read_config()
        return Run(config, self.records, path, self.model)

    @property
    def overfitting(self) -> Overfitting | None:
        """Where the training overfitted catastrophically, if it has been measured to do so.

        See :func:`marginflow.detect_overfitting`; the accuracies are those of a sample of the examples.
        """
        return overfitting_of(self.records)

    @property
    def _subject(self) -> Subject:
        return Subject(
            self.model, self.data, self.attack, self.loss, self.batch_size, self.homogeneity
        )

    def _try(self) -> None:
        """One evaluation of two examples, so that nothing fails after the directory is made."""
        few = self.data.subset(range(min(2, self.data.n)))
        with _quietly(self.model):
            self._subject.margins(few, self.attack)
            like = next(self.model.parameters(), few.x)
            with torch.no_grad():
                both, one = (self.model(few.x[:k].to(like, copy=True)) for k in (2, 1))
        # All labels, and not only those of two examples.
        for part in (self.data, self.data.test):
            if part is not None:
                check_labels(one.cpu()[:1].expand(part.n, *one.shape[1:]), part.y.cpu())
        if not torch.allclose(both[:1], one, rtol=1e-2, atol=1e-2 * float(both.abs().max())):
            _log.warning(
                "Monitor: the outputs of an example depend on the others in its batch (batch norm without "
                "running means?), and so does what is measured: on batch_size"
            )

    def _follow_freezing(self) -> None:
        """Measure the layers again if parameters were frozen or set free since."""
        if self._trainable is None or self._trainable == (now := _trainable(self.model)):
            return
        _log.warning(
            "Monitor: other parameters are trained than before; from now on other layers are measured"
        )
        self._trainable = now
        self.homogeneity, reason = _layers(self.model, self.data)
        self.left_out = dict.fromkeys(NORMALIZED, reason) if reason else {}
        if self._strong is not None:
            few = self._strong.subject
            self._strong.subject = dataclasses.replace(few, homogeneity=self.homogeneity)
        if self._recorder is not None:
            stored = self._recorder.directory.read_config()
            config = {"layers": self._table(), "left_out": reason or None}
            self._recorder.directory.write_config({**stored, **config})

    def _found(self) -> dict[str, Any]:
        """The measurements; of weights without a direction (0, NaN) what is left of them."""
        try:
            return record_of(self._subject)[0]
        except ModelError as error:
            if self.homogeneity is None or not self._spoilt():
                raise
            # The loop is not ours to end.
            if not self._warned:
                _log.warning("Monitor: %s; its margins are not normalised", error)
                self._warned = True
            found, _ = record_of(dataclasses.replace(self._subject, homogeneity=None))
            return found | {"layer_norms": self.homogeneity.norms(self.model).tolist()}

    def _spoilt(self) -> bool:
        """Whether a layer is not finite, or 0 where it has a degree."""
        if self.homogeneity is None:
            return not all(map(math.isfinite, parameter_norms(self.model).values()))
        norms = self.homogeneity.norms(self.model)
        return not bool(((norms > 0) & norms.isfinite()).all())

    def _raise_alarm(self) -> None:
        if self._strong is None or "strong_accuracy" not in self.records[-1]:
            return
        found = self.overfitting
        self.records[-1]["overfitting"] = found is not None
        if found is not None and not self._flagged:
            self._flagged = True
            _log.warning("catastrophic overfitting since %s", found)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``run.json``, but for where it was written."""
        name, examples, seed, schedule, said = self._told
        model, used = self.model, self.data
        parameter = next(model.parameters(), used.x)
        return {
            "kind": "monitor",
            "data": name,
            "data_sha256": used.fingerprint(),
            "data_bounds": None if used.bounds is None else list(used.bounds),
            "classes": list(used.classes),
            "examples": used.n,
            "sample": None if examples is None else {"size": examples, "seed": seed},
            "model_spec": type(model).__name__,
            "model": model.config if isinstance(model, Network) else None,
            "attack": said["attack"] or UNDECLARED,
            "measure_with": "none" if self.attack is None else self.attack.spec,
            "strong": None if self._strong is None else self._strong.attack.spec,
            "loss": said["loss"] or (None if self.loss is None else self.loss.name),
            **{name: said[name] for name in said if name not in ("attack", "loss")},
            "declared": [name for name in said if said[name] is not None],
            "schedule": schedule if isinstance(schedule, str) else sorted(schedule),
            "left_out": next(iter(self.left_out.values()), None),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
            "layers": self._table(),
            "shapes": {name: list(w.shape) for name, w in model.named_parameters()},
        }

    def _table(self) -> list[dict[str, Any]]:
        if self.homogeneity is not None:
            return self.homogeneity.table()
        return [
            {"name": name, "parameters": [name], "degree": None}
            for name in parameter_norms(self.model)
        ]


def _trainable(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, w in model.named_parameters() if w.requires_grad)


def _layers(model: nn.Module, data: Dataset) -> tuple[Homogeneity | None, str]:
    """The layers, or why there are none."""
    with _quietly(model):
        try:
            return measure_homogeneity(model, data.x), ""
        except NotHomogeneousError as error:
            return None, str(error)


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, outside of inference mode and autocast, with the random state kept."""
    device = next(model.parameters(), torch.empty(0)).device
    devices = [device] if device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=devices),
        evaluation_mode(model),
    ):
        yield
