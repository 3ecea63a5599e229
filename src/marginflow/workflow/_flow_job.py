"""The work of a gradient flow: from measurement to measurement, recorded as it goes."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from marginflow.errors import MarginflowError, RunError
from marginflow.flow import Follower, State
from marginflow.models import load_weights
from marginflow.monitor import Monitor
from marginflow.runs import Checkpoint, Log, Run, RunDirectory, Sinks, open_sinks
from marginflow.workflow._flow_goals import Goals, points_ahead
from marginflow.workflow._flow_progress import FlowProgress
from marginflow.workflow._flow_result import Flow, Reason
from marginflow.workflow._setup import open_directory

_AT_THE_SADDLE = 1e-6
_FREE = ("log_time", "log_norm", "loss_below", "max_evaluations", "ended", "notes", "advice")


class Job:
    """From measurement to measurement, with a checkpoint at each."""

    def __init__(
        self,
        follower: Follower,
        monitor: Monitor,
        goals: Goals,
        planned: Sequence[float] | None,
        config: dict[str, Any],
        keep_weights: bool,
        log: Log = (),
    ) -> None:
        self.follower = follower
        self.monitor = monitor
        self.goals = goals.functions()
        self.planned = planned
        self.config = config
        self.keep_weights = keep_weights
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.log = log
        self.sinks = Sinks()
        self.directory: RunDirectory | None = None
        self.reason: Reason | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.sinks.close(error)
        if self.directory is not None:
            self.directory.close()

    def open(self, out: str | os.PathLike[str], *, resume: bool, force: bool) -> RunDirectory:
        """Make or reopen the run directory; a resumed flow continues from its last measurement."""
        self.directory, _ = open_directory(
            out,
            self.config,
            free=_FREE,
            restore=self._restore,
            model=self.follower.field.model,
            monitor=self.monitor,
            resume=resume,
            force=force,
        )
        return self.directory

    def run(self, bar: FlowProgress | None, interrupted: threading.Event) -> None:
        """Follow the flow to a goal or to its end.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
        """
        follower = self.follower
        follower.stopping = interrupted.is_set
        if not self.monitor.records or not (self._reached() or follower.ended):
            path = None if self.directory is None else self.directory.path
            config = self.config if self.directory is None else self.directory.read_config()
            self.sinks = open_sinks(self.log, path, config, records=self.monitor.records)
        if not self.monitor.records:
            self._measure()
        self.reason = self._reached()
        for point in points_ahead(self.planned, follower.state.log_time):
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
            factorizations=follower.field.factorizations,
            falls=tally.falls,
            separated_steps=tally.separated_steps,
        )

    def _restore(self, checkpoint: Checkpoint) -> int:
        try:
            step, snapshot = int(checkpoint.info["step"]), checkpoint.info["flow"]
            weights = {
                name.removeprefix("model."): value for name, value in checkpoint.tensors.items()
            }
            load_weights(self.follower.field.model, weights)
            self.follower.restore(self.follower.field.read(), snapshot)
        except MarginflowError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(
                f"the checkpoint {checkpoint.path.name} is no flow's: it lacks {error}"
            ) from None
        return step

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
            self.sinks.write(self.monitor.records[-1:])
            return
        self.directory.append_metrics(self.monitor.records[-1])
        self.sinks.write(self.monitor.records[-1:])
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
            place = f"after ln t = {log_time:.4g}"
            if not follower.here.velocity.any():
                place = "where it stands still (∇ ln L = 0)"
            found = (
                f"not separated {place}: {final['adversarial_accuracy']:.1%} of the perturbed examples "
                "have a positive margin; "
            )
            size = float(np.linalg.norm(follower.state.w))
            if (pair := _opposed(follower.field.x, follower.field.y)) is not None:
                return found + (
                    f"examples {pair[0]} and {pair[1]} are the same input with different labels, so no "
                    "network separates the data; remove one of them"
                )
            if size < _AT_THE_SADDLE:
                return found + (
                    f"‖W‖ = {size:.2g} is so near the saddle at 0 that the flow hardly leaves it; start "
                    "from larger weights"
                )
            return found + (
                "use a wider or deeper network, a smaller ε, another seed, or fewer examples"
            )
        return ""


def _opposed(x: Tensor, y: Tensor) -> tuple[int, int] | None:
    """Two examples that are the same input with different labels, or None."""
    _, group = torch.unique(x.flatten(1), dim=0, return_inverse=True)
    for k in torch.nonzero(torch.bincount(group) > 1).flatten().tolist():
        members = torch.nonzero(group == k).flatten()
        other = members[y[members] != y[members[0]]]
        if len(other):
            return int(members[0]), int(other[0])
    return None


def _one_plus_cosine(w: np.ndarray[Any, np.dtype[np.float64]], v: Any) -> float:
    """``1 + cos(W, ∇L) = ½ ‖Ŵ − v̂‖²``, without cancellation."""
    speed = float(np.linalg.norm(v))
    if speed == 0:
        return math.nan
    gap = w / np.linalg.norm(w) - v / speed
    return 0.5 * float(gap @ gap)
