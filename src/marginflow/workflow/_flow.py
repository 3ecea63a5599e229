"""``mf.gradient_flow``: the gradient flow, measured and recorded like a training."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from marginflow._checks import choice, real, whole
from marginflow.attacks import Attack, Derivative, check_budget
from marginflow.attacks import build as build_attack
from marginflow.datasets import Dataset, load
from marginflow.errors import DivergedError, InputError, ModelError, RunError
from marginflow.flow import DENSE_LIMIT, Field, Follower, Goal, Method, State
from marginflow.homogeneity import measure_homogeneity
from marginflow.losses import Loss, get_loss
from marginflow.models import build as build_model
from marginflow.models import load_weights
from marginflow.monitor import Monitor
from marginflow.runs import Run, RunDirectory
from marginflow.training import deferred_interrupt
from marginflow.workflow._flow_progress import FlowProgress
from marginflow.workflow._provenance import provenance
from marginflow.workflow._setup import check_fit, check_same, layer_table

Reason = Literal["log_time", "log_norm", "loss_below", "not separated", "work"]

_KEPT_NUMBERS = 10_000_000  # weights times points kept by default: 80 MB
_POINTS = 80  # of a flow to ln t = 10⁶, about
_PER_DECADE = 10
_EARLY = (-3.0, -2.0, -1.0, 0.0, 1.0)
_FREE = (
    "log_time", "log_norm", "loss_below", "max_evaluations", "ended", "notes", "advice", "layers",
)  # fmt: skip

_log = logging.getLogger("marginflow")


@dataclass(frozen=True, eq=False)
class Flow:
    """A gradient flow that was followed, and why it ended.

    Attributes:
        run: the recorded trajectory: configuration, measurements, kept weights.
        model: the network at the end.
        log_time: ln t at the end. log_norm: ln ‖W‖. log_loss: ln L.
        reason: the goal that was reached (``log_time``, ``log_norm``, ``loss_below``), or
            ``not separated``, or ``work`` (too many evaluations).
        advice: what to do if no goal was reached; empty otherwise.
        notes: which integrator ran from when on, and why.
        separated: whether L fell below ℓ(0)/n.
        sliding: whether the flow ran along a surface on which its field jumps.
        tolerance: the integrator's relative tolerance per step. The end point moves by less than
            1000 × tolerance (relative, of W/‖W‖ and of ln t) when it is halved, on smooth fields.
        steps: accepted steps. rejected: steps taken again, by explicit steps.
        evaluations: of the field. jacobians: of its Jacobian.
        falls: on how many of ``separated_steps`` accepted steps ℓ/ρ fell (by more than 1e-12).
    """

    run: Run
    model: nn.Module
    log_time: float
    log_norm: float
    log_loss: float
    reason: Reason
    advice: str
    notes: tuple[str, ...]
    separated: bool
    sliding: bool
    tolerance: float
    steps: int
    rejected: int
    evaluations: int
    jacobians: int
    falls: int
    separated_steps: int

    @property
    def reached(self) -> bool:
        """Whether the flow reached one of its goals."""
        return self.reason not in ("not separated", "work")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The measurements along the flow, oldest first."""
        return self.run.metrics

    @property
    def final(self) -> dict[str, Any]:
        """The last measurement."""
        return self.run.final

    def __str__(self) -> str:
        end = f"ended: {self.reason}" if not self.reached else f"reached its {self.reason}"
        lines = [
            f"gradient flow to ln t = {self.log_time:.6g} ({end}): ln L = {self.log_loss:.6g}, "
            f"‖W‖ = {math.exp(self.log_norm):.4g}, γ̂_m = {self.final['normalized_margin']:.6g}",
            f"{self.steps} steps, {self.evaluations} evaluations, {self.jacobians} Jacobians",
            *self.notes,
        ]
        return "\n".join([*lines, self.advice] if self.advice else lines)


def gradient_flow(
    model: nn.Module | str,
    data: Dataset | tuple[Tensor, Tensor] | str,
    *,
    attack: Attack | str | None = None,
    loss: str | Loss | None = None,
    derivative: Derivative = "total",
    log_time: float | None = None,
    log_norm: float | None = None,
    loss_below: float | None = None,
    method: Method | Literal["auto"] = "auto",
    rtol: float | None = None,
    schedule: Collection[float] | None = None,
    patience: float = 30.0,
    max_evaluations: int = 2_000_000,
    keep_weights: bool | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Flow:
    """Follow ``dW/dt = −∇L(W)`` (Section 3.2) as far as ln t = 10⁶ and beyond.

    Integrated is ``dW/ds = −∇ ln L``, the same curve, with the clock ``dt = ds/L`` carried as
    ln t and never exponentiated; once the data are separated, ln‖W‖ is the independent
    variable. The weights at the end are left in ``model``, which is converted to float64.

    Args:
        model: a multi-homogeneous network, or a specification such as ``"deep-linear:16"``.
        data: a data set, a pair (x, y), or a specification.
        attack: the perturbation of the objective; None is standard training.
        loss: by default ``exponential`` for two classes −1/+1, ``cross-entropy`` otherwise.
        derivative: ``total`` (through δ(W), what the theory speaks of) or ``detached``
            (Algorithm 1). They agree where the inner maximum is exact.
        log_time: stop at this ln t. By default 1000, if no other goal is given.
        log_norm: stop at this ln ‖W‖.
        loss_below: stop when L is below this number, in (0, 1).
        method: ``auto`` searches the field for jumps and chooses; or ``stiff`` (scipy's Radau with
            the exact Jacobian), ``runge-kutta`` (scipy's RK45), ``steps`` (explicit steps of
            relative length, for fields that jump).
        rtol: tolerance of a step relative to ‖W‖; by default :data:`marginflow.flow.TOLERANCES`.
        schedule: values of ln t at which to measure; by default −3 … 1 and ten a decade beyond.
        patience: ln t after which a flow that does not separate the data is given up (half of it, if
            ln L has all but stopped).
        max_evaluations: evaluations of the field after which the flow ends.
        keep_weights: keep the weights of every measurement, for statements about the path;
            by default for up to about 120 000 weights.
        seed: of a model given as a string and of a random start, which is drawn once.
        out: run directory; None keeps the run in memory.
        resume: continue the flow in ``out``, to the very bits of a flow that was not interrupted,
            perhaps to a farther goal (the same bits, if the earlier goal was a point of measurement).
        force: replace a run that ``out`` already holds.
        progress: show ln t, ρ and γ̂_m on standard error.

    Returns:
        the :class:`Flow`. One that reaches no goal is a value too, with a reason and advice.

    Raises:
        InputError: an argument that cannot be used; an attack on the loss, which is not scale
            invariant and fades as the margins grow.
        NotHomogeneousError: the network is not multi-homogeneous.
        ModelError: a random network (dropout), or one with a layer that is 0.
        RunError: ``out`` is taken, or does not fit when resuming.
        DivergedError: NaN or infinity.
        KeyboardInterrupt: after Ctrl-C; the flow resumes from its last measurement.
    """
    if isinstance(data, str):
        data = load(data)
    elif not isinstance(data, Dataset):
        data = Dataset(*data)
    model_spec = model if isinstance(model, str) else None
    if isinstance(model, str):
        outputs = 1 if data.binary else data.num_classes
        model = build_model(model, input_shape=data.shape, outputs=outputs, seed=seed)
    if resume and force:
        raise InputError("resume and force exclude each other: continue the run, or replace it")
    if resume and out is None:
        raise InputError("resume needs out=…, the run directory to continue")
    attack = build_attack(attack)
    if attack is not None and not attack.scale_invariant:
        raise InputError(
            "the flow needs a scale invariant perturbation (Definition 1): expected "
            "objective='margin', got objective='loss', whose gradient fades as the margins grow"
        )
    loss = get_loss(
        loss if loss is not None else ("exponential" if data.binary else "cross-entropy")
    )
    choice("derivative", derivative, ("detached", "total"))
    choice("method", method, ("auto", "stiff", "runge-kutta", "steps"))
    goals = _Goals(log_time, log_norm, loss_below)
    if rtol is not None and real("rtol", rtol, above=0.0) > 0.01:
        raise InputError(f"rtol: expected at most 0.01, got {rtol:g}")
    real("patience", patience)
    whole("max_evaluations", max_evaluations, least=1)
    seed = whole("seed", seed, least=0)
    planned = None if schedule is None else sorted({real("schedule", t) for t in schedule})
    check_budget(attack, data.shape, data.bounds)
    if out is not None and not resume:
        RunDirectory.check_free(out, force=force)

    mine = model_spec is None
    converted = mine and any(p.dtype != torch.float64 for p in model.parameters())
    model.to(device="cpu", dtype=torch.float64)
    placed = data.to(dtype=torch.float64, device="cpu")
    check_fit(model, placed, loss, attack, None)
    homogeneity = measure_homogeneity(model, placed.x)
    for layer, norm in zip(homogeneity.layers, homogeneity.norms(model).tolist(), strict=True):
        if norm == 0:
            raise ModelError(
                f"the layer {layer.name!r} is 0, where every gradient of the other layers "
                "vanishes; initialise it"
            )
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if method == "stiff" and size > 4 * DENSE_LIMIT:
        raise InputError(
            f"method 'stiff' forms a Jacobian of {size}² numbers; expected at most "
            f"{4 * DENSE_LIMIT} weights; use 'auto'"
        )
    if keep_weights is None:
        keep_weights = size * _POINTS <= _KEPT_NUMBERS
    monitor = Monitor(model, placed, attack, loss=loss, homogeneity=homogeneity)
    config: dict[str, Any] = {
        "kind": "flow",
        "data": data.name,
        "data_sha256": data.fingerprint(),
        "data_bounds": None if data.bounds is None else list(data.bounds),
        "classes": list(data.classes),
        "examples": data.n,
        "model_spec": model_spec or type(model).__name__,
        "model": getattr(model, "config", None),
        "attack": "none" if attack is None else attack.spec,
        "measure_with": "none" if attack is None else attack.spec,
        "loss": loss.name,
        "derivative": derivative,
        "log_time": goals.log_time,
        "log_norm": goals.log_norm,
        "loss_below": goals.loss_below,
        "method": method,
        "rtol": rtol,
        "schedule": planned,
        "patience": patience,
        "max_evaluations": max_evaluations,
        "lr": None,
        "batch_size": data.n,
        "epochs": None,
        "momentum": 0.0,
        "keep_weights": keep_weights,
        "seed": seed,
        "dtype": "float64",
        "device": "cpu",
        "layers": layer_table(homogeneity),
        "ended": None,
        "notes": [],
        "advice": "",
    }
    field = Field(
        model, placed.x, placed.y, loss=loss, attack=attack, derivative=derivative, seed=seed
    )
    start = copy.deepcopy(model.state_dict())
    follower = Follower(
        field,
        model,
        homogeneity,
        method=method,
        rtol=rtol,
        patience=patience,
        max_evaluations=max_evaluations,
    )
    load_weights(model, start)
    if converted:
        text = "the float32 weights were converted to float64"
        _log.info(text)
        follower.notes.insert(0, text)
    job = _Job(follower, monitor, goals, planned, config, keep_weights)
    bar = FlowProgress(goals.log_time) if progress else None
    directory: RunDirectory | None = None
    try:
        if out is not None:
            directory = job.open(out, resume=resume, force=force)
        with deferred_interrupt() as interrupted:
            job.run(bar, interrupted)
        if directory is not None:
            config = directory.read_config()
    except DivergedError as error:
        kept = f"; the last good point is in {out}" if out is not None else ""
        raise DivergedError(f"{error}{kept}", error.step, error.epoch) from None
    finally:
        if bar is not None:
            bar.stop()
        if directory is not None:
            directory.close()
    path = None if directory is None else directory.path
    return job.result(Run(config, monitor.records, path, model, job.kept))


class _Goals:
    """Where to stop."""

    def __init__(
        self, log_time: float | None, log_norm: float | None, loss_below: float | None
    ) -> None:
        if log_time is None and log_norm is None and loss_below is None:
            log_time = 1000.0
        self.log_time = None if log_time is None else real("log_time", log_time)
        self.log_norm = None if log_norm is None else real("log_norm", log_norm)
        self.loss_below = None if loss_below is None else real("loss_below", loss_below, above=0.0)
        if self.loss_below is not None and self.loss_below >= 1:
            raise InputError(
                f"loss_below: expected a number in (0, 1), got {loss_below!r}; for losses below "
                "1e-300 use log_time, which is about ln(1/L)"
            )

    def functions(self) -> dict[Reason, Goal]:
        """Each goal as a function that is ≥ 0 once it is reached, in units of ln t."""
        found: dict[Reason, Goal] = {}
        if (last := self.log_time) is not None:
            found["log_time"] = lambda w, log_time, log_loss: log_time - last
        if (norm := self.log_norm) is not None:
            # Late in the flow ln t moves by ln t per unit of ln‖W‖.
            found["log_norm"] = lambda w, log_time, log_loss: (
                (math.log(float(np.linalg.norm(w))) - norm)
                * max(1.0, log_time if math.isfinite(log_time) else 1.0)
            )
        if (below := self.loss_below) is not None:
            found["loss_below"] = lambda w, log_time, log_loss: math.log(below) - log_loss
        return found


class _Job:
    """From measurement to measurement, with a checkpoint at each."""

    def __init__(
        self,
        follower: Follower,
        monitor: Monitor,
        goals: _Goals,
        planned: Sequence[float] | None,
        config: dict[str, Any],
        keep_weights: bool,
    ) -> None:
        self.follower = follower
        self.monitor = monitor
        self.goals = goals.functions()
        self.planned = planned
        self.config = config
        self.keep_weights = keep_weights
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.directory: RunDirectory | None = None
        self.reason: Reason | None = None

    def open(self, out: str | os.PathLike[str], *, resume: bool, force: bool) -> RunDirectory:
        """Make or reopen the run directory; a resumed flow continues from its last measurement."""
        if not resume:
            content = {**self.config, **provenance()}
            self.directory = RunDirectory.create(out, content, force=force)
            return self.directory
        directory = self.directory = RunDirectory.reopen(out)
        stored = directory.read_config()
        if stored.get("kind") != "flow":
            directory.close()
            raise RunError(f"{os.fspath(out)!r} is not a flow; continue it with mf.train")
        try:
            check_same(stored, self.config, _FREE)
            checkpoint = directory.latest_checkpoint()
            step = -1
            if checkpoint is not None:
                try:
                    step, snapshot = checkpoint.info["step"], checkpoint.info["flow"]
                    weights = {
                        name.removeprefix("model."): value
                        for name, value in checkpoint.tensors.items()
                    }
                    load_weights(self.follower.field.model, weights)
                    self.follower.restore(self.follower.field.read(), snapshot)
                except (KeyError, TypeError) as error:
                    raise RunError(
                        f"the checkpoint {checkpoint.path.name} is no flow's: it lacks {error}"
                    ) from None
            directory.truncate_metrics(step)
            self.monitor.records.extend(directory.read_metrics())
            directory.write_config(
                {**stored, **{name: self.config[name] for name in _FREE if name != "layers"}}
            )
        except BaseException:
            directory.close()
            raise
        return directory

    def run(self, bar: FlowProgress | None, interrupted: threading.Event) -> None:
        """Follow the flow to a goal or to its end.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
        """
        follower = self.follower
        follower.stopping = interrupted.is_set
        if not self.monitor.records:
            self._measure()
        self.reason = self._reached()
        for point in self._schedule():
            if self.reason is not None or follower.ended:
                break

            def passed(w: Any, log_time: float, log_loss: float, point: float = point) -> float:
                return log_time - point

            def on_step(state: State) -> None:
                if bar is not None:
                    bar.show(state, self.monitor.records[-1])

            follower.advance([passed, *self.goals.values()], on_step)
            if interrupted.is_set():
                raise KeyboardInterrupt
            self._measure()
            self.reason = self._reached()
        if self.reason is None:
            self.reason = "work" if follower.ended == "work" else "not separated"
        end = {
            "ended": self.reason,
            "notes": list(follower.notes),
            "advice": self._advice(self.reason),
        }
        self.config |= end
        if self.directory is not None:
            self.directory.write_config({**self.directory.read_config(), **end})

    def result(self, run: Run) -> Flow:
        """The flow as a value."""
        follower, tally = self.follower, self.follower.tally
        reason = self.reason or "work"
        return Flow(
            run=run,
            model=follower.field.model,
            log_time=follower.state.log_time,
            log_norm=follower.state.log_norm,
            log_loss=follower.state.log_loss,
            reason=reason,
            advice=self._advice(reason),
            notes=tuple(follower.notes),
            separated=follower.state.separated,
            sliding=tally.sliding,
            tolerance=follower.tolerance,
            steps=tally.steps,
            rejected=tally.rejected,
            evaluations=follower.field.evaluations,
            jacobians=follower.field.jacobians,
            falls=tally.falls,
            separated_steps=tally.separated_steps,
        )

    def _schedule(self) -> Iterator[float]:
        """The values of ln t at which to measure that lie ahead."""
        done = self.follower.state.log_time
        ahead = 1e-6 * max(1.0, abs(done)) if math.isfinite(done) else 0.0
        if self.planned is None:
            decades = (10 ** (k / _PER_DECADE) for k in itertools.count(1))
            points: Iterator[float] = itertools.chain(_EARLY, decades)
        else:
            points = itertools.chain(self.planned, [math.inf])
        return itertools.dropwhile(lambda point: point <= done + ahead, points)

    def _reached(self) -> Reason | None:
        state = self.follower.state
        for reason, goal in self.goals.items():
            if goal(state.w, state.log_time, state.log_loss) >= 0:
                return reason
        return None

    def _measure(self) -> None:
        """Measure, keep the weights, write a checkpoint."""
        follower, state, tally = self.follower, self.follower.state, self.follower.tally
        follower.field.write(state.w)
        value = follower.field(state.w)
        self.monitor.measure(
            tally.steps,
            log_time=state.log_time,
            log_norm=state.log_norm,
            log_tl=state.log_tl,
            one_plus_cosine=_one_plus_cosine(state.w, value.velocity),
            evaluations=follower.field.evaluations,
            jacobians=follower.field.jacobians,
            method=state.method,
            tolerance=follower.tolerance,
            separated_steps=tally.separated_steps,
            falls=tally.falls,
            largest_fall=tally.largest_fall,
            falls_by_total=tally.falls_by_total,
            largest_fall_by_total=tally.largest_fall_by_total,
            margin_falls=tally.margin_falls,
            combined=tally.combined,
            jumps=tally.jumps,
            step_corrections=list(tally.corrections) or None,
            sliding=tally.sliding,
        )
        weights = {n: v.detach().clone() for n, v in follower.field.model.state_dict().items()}
        if self.directory is None:
            if self.keep_weights:
                self.kept[tally.steps] = weights
            return
        self.directory.append_metrics(self.monitor.records[-1])
        if self.keep_weights:
            self.directory.save_weights(tally.steps, weights)
        tensors = {f"model.{name}": value for name, value in weights.items()}
        self.directory.save_checkpoint(tensors, {"step": tally.steps, "flow": follower.snapshot()})

    def _advice(self, reason: Reason) -> str:
        follower = self.follower
        log_time = follower.state.log_time
        if reason == "work":
            return (
                f"{follower.field.evaluations} evaluations led to ln t = {log_time:.4g}; go on with "
                "resume and a larger max_evaluations, or with a larger rtol"
            )
        if reason == "not separated":
            final = self.monitor.records[-1]
            return (
                f"not separated after ln t = {log_time:.4g}: {final['adversarial_accuracy']:.1%} of "
                "the perturbed examples have a positive margin; use a wider or deeper network, a "
                "smaller ε, another seed, or fewer examples"
            )
        return ""


def _one_plus_cosine(w: np.ndarray[Any, np.dtype[np.float64]], v: Any) -> float:
    """``1 + cos(W, ∇L) = ½ ‖Ŵ − v̂‖²``, without cancellation."""
    speed = float(np.linalg.norm(v))
    if speed == 0:
        return math.nan
    gap = w / np.linalg.norm(w) - v / speed
    return 0.5 * float(gap @ gap)
