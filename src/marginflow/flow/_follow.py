"""Following a flow from goal to goal with the integrator that its field calls for.

Source: marginflow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import nn

from marginflow.errors import DivergedError
from marginflow.flow._field import Field, FieldValue, Vector
from marginflow.flow._jumps import REACH, find_jumps
from marginflow.flow._smooth import Smooth, Stalled
from marginflow.flow._state import Goal, Layers, Method, OnStep, State, Tally, Watch, is_separated
from marginflow.flow._steps import Steps
from marginflow.homogeneity import Homogeneity

DENSE_LIMIT = 3000
"""Largest number of weights for which the Jacobian is formed: 72 MB, and 20 s of a core for 100 steps.

A Jacobian of known low rank r may have 2·10⁶ numbers, Nr: 64-64-1 is a linear network of 4160 weights.
"""

_FEW_NUMBERS = 2_000_000

TOLERANCES: dict[str, float] = {
    "stiff": 1e-8,
    "runge-kutta": 1e-6,
    "steps": 1e-5,
    "jumps": 1e-3,
    "large steps": 1e-4,
    "large jumps": 3e-3,
}
"""Default tolerances, relative to ‖W‖, by integrator.

``jumps`` is that of steps where ln L jumps, ``large`` that beyond :data:`DENSE_LIMIT` weights, where
evaluations are dear.
"""

_FIRST = 1e-4  # first step, relative
_STILL_EVALUATIONS = 20_000
_STILL = 1e-3
_REST = 1e-4  # of ln L per unit of ln t


_LARGE = 10_000_000  # weights times examples from which on two threads are faster than one


@functools.cache
def _libraries() -> ThreadpoolController:
    """The libraries with threads of their own, found once: 2 ms."""
    # Only those that are loaded are found. Scipy brings one of its own, and is only imported where it
    # is used: without this line, after this.
    import scipy.linalg  # noqa: F401

    return ThreadpoolController()


def _blas_threads(field: Field) -> AbstractContextManager[object]:
    """Numpy's and scipy's linear algebra on one thread, but for the closed form of a large problem.

    Their threads and torch's spin while they wait for each other: an evaluation by autograd of 784-64-1
    on 1000 examples takes 8 ms so and 50 ms otherwise, on 2 cores. The closed form has no use for torch's.
    """
    large = field.closed is not None and field.size * len(field.y) >= _LARGE
    limit = torch.get_num_threads() if large else 1
    context: AbstractContextManager[object] = _libraries().limit(limits=limit, user_api="blas")
    return context


class Follower:
    """Follows ``dW/ds = −∇ ln L`` and chooses how.

    The field is first searched for jumps. Smooth: ``stiff`` up to :data:`DENSE_LIMIT` weights (more
    where the Jacobian is of low rank),
    ``runge-kutta`` beyond. Otherwise ``steps``. A smooth integrator that stalls hands over to steps; where
    the jumps are passed it is tried again, after ever longer waits.

    Args:
        field: the field.
        model: its network, for the names of the layers.
        homogeneity: the measured layers.
        method: ``auto`` or an integrator's name.
        rtol: the tolerance; None takes :data:`TOLERANCES`.
        patience: ln t at which a flow that has not separated the data is given up; at half of it
            if ln L has all but stopped: ``|d ln L/d ln t| = tL ‖∇ ln L‖² < 1e-4``.
        max_evaluations: evaluations of the field after which the flow ends.

    Attributes:
        state: where the flow stands.
        tally: what happened so far.
        notes: which integrator was chosen when, and why, in words.
        ended: why the flow can go no further, or "" while it can.
        layers: norms of the layers of a weight vector.
        watch: counts into ``tally``.
        loss_jumps: whether ln L itself jumps.
        stopping: asked after every step; True ends :meth:`advance`.
    """

    def __init__(
        self,
        field: Field,
        model: nn.Module,
        homogeneity: Homogeneity,
        *,
        method: Method | Literal["auto"] = "auto",
        rtol: float | None = None,
        patience: float = 30.0,
        max_evaluations: int = 2_000_000,
    ) -> None:
        self.field = field
        self.layers = Layers(model, homogeneity)
        self.tally = Tally()
        self.watch = Watch(self.layers, self.tally)
        self.method = method
        self.rtol = rtol
        self.patience = patience
        self.max_evaluations = max_evaluations
        self.notes: list[str] = []
        self.ended = ""
        self.loss_jumps = False
        self.stopping: Callable[[], bool] = lambda: False
        self._wait = 1
        self._waited = 0
        self._still = (math.inf, 0)
        with _blas_threads(self.field):
            self.state = self._begin()

    @property
    def tolerance(self) -> float:
        """The tolerance of the integrator at work, relative to ‖W‖."""
        if self.rtol is not None:
            return self.rtol
        if self.state.method != "steps":
            return TOLERANCES[self.state.method]
        kind = "jumps" if self.loss_jumps else "steps"
        return TOLERANCES[kind if self.field.size <= DENSE_LIMIT else f"large {kind}"]

    def advance(
        self, goals: Sequence[Goal], on_step: Callable[[State], None] = lambda state: None
    ) -> bool:
        """Go on to the first of the goals; False if the flow ended (:attr:`ended`) or was stopped.

        Args:
            goals: where to stop.
            on_step: called with the state after every accepted step.

        Raises:
            DivergedError: ln L is no finite number.
        """

        def noted(state: State, value: FieldValue) -> None:
            if not math.isfinite(value.log_loss):
                raise DivergedError(
                    f"the flow diverged at step {self.tally.steps + 1}: ln L is {value.log_loss}; "
                    "lower the tolerance (rtol), start from smaller weights, or look at the model's outputs",
                    self.tally.steps + 1,
                    0,
                )
            self.watch(state, value)
            self.here = value
            on_step(state)

        # Forgotten in any case: a resumed flow has not seen the point, and work is counted.
        self.field.forget()
        with _blas_threads(self.field):
            self._advance(goals, noted)
        return not self.ended and not self.stopping()

    def _advance(self, goals: Sequence[Goal], noted: OnStep) -> None:
        self.here = self.field(self.state.w)
        self._perhaps_smooth_again()
        while True:
            integrator = self._integrator()
            combined = self.tally.combined
            try:
                self.state = integrator.advance(self.state, goals, noted, self._give_up)
            except Stalled as stalled:
                self.state = stalled.state
                if not self.state.separated and self._at_rest(self.state):
                    # Not a jump: what is left of the gradient is rounding.
                    self.ended = "not separated"
                    break
                self._to_steps()
                continue
            break
        if self.state.method == "steps":
            self._look_for_sliding(self.tally.combined - combined)

    def snapshot(self) -> dict[str, Any]:
        """All numbers but the weights that the rest of the flow depends on."""
        state = {f.name: getattr(self.state, f.name) for f in dataclasses.fields(State)}
        del state["w"]
        state["log_tl"] = None if math.isinf(self.state.log_tl) else self.state.log_tl
        return {
            "state": state,
            "tally": dataclasses.asdict(self.tally),
            "notes": list(self.notes),
            "loss_jumps": self.loss_jumps,
            "waits": [self._wait, self._waited],
            "still": [None if math.isinf(self._still[0]) else self._still[0], self._still[1]],
            "work": [self.field.evaluations, self.field.jacobians, self.field.factorizations],
        }

    def restore(self, w: Vector, snapshot: dict[str, Any]) -> None:
        """Continue from a snapshot and its weights.

        Args:
            w: the weights, (N,).
            snapshot: what :meth:`snapshot` gave.
        """
        state = dict(snapshot["state"])
        if state["log_tl"] is None:
            state["log_tl"] = -math.inf
        self.state = State(w=w, **state)
        for name, value in snapshot["tally"].items():
            setattr(self.tally, name, value)
        self.notes = list(snapshot["notes"])
        self.loss_jumps = snapshot["loss_jumps"]
        self._wait, self._waited = snapshot["waits"]
        still, since = snapshot["still"]
        self._still = (math.inf if still is None else still, since)
        self.field.evaluations, self.field.jacobians, *factorizations = snapshot["work"]
        self.field.factorizations = sum(factorizations)  # older checkpoints have none

    def _begin(self) -> State:
        w = self.field.read()
        value = self.field(w)
        speed = float(np.linalg.norm(value.velocity))
        first = _FIRST * float(np.linalg.norm(w)) / speed if speed > 0 else 1.0
        method, why = self._first_method(w)
        self.notes.append(f"{method} from the start: {why}")
        size = _FIRST if method == "steps" else first
        separated = is_separated(self.field, value)
        return State(w, -math.inf, value.log_loss, size, separated, method)

    def _first_method(self, w: Vector) -> tuple[Method, str]:
        jumps = find_jumps(self.field, w)
        self.loss_jumps = jumps.loss > 0
        self.tally.jumps += bool(jumps.field or jumps.loss)
        size = self.field.size
        if self.method != "auto":
            return self.method, f"as asked; near the start {jumps.words}"
        if jumps.field or jumps.loss:
            return "steps", f"near the start {jumps.words}"
        if self._jacobian_fits():
            return "stiff", f"{jumps.words}, {size} weights"
        why = f"{size} weights are too many for a dense Jacobian (limit {DENSE_LIMIT})"
        return "runge-kutta", f"{jumps.words}; {why}"

    def _jacobian_fits(self) -> bool:
        field = self.field
        few = field.has_low_rank and field.jacobian_numbers <= _FEW_NUMBERS
        return field.size <= DENSE_LIMIT or few

    def _integrator(self) -> Smooth | Steps:
        if self.state.method == "steps":
            descent = self.field.conservative and not self.loss_jumps
            return Steps(
                self.field,
                self.tolerance,
                self.tally,
                descent=descent,
                fell=self.watch.fell,
                layers=self.layers,
            )
        return Smooth(self.field, self.tolerance)

    def _to_steps(self) -> None:
        """A smooth integrator stalled: find out on what, and go on with steps."""
        found = "no jump was found near it"
        for reach in (1e-2, 1e-4, 1e-6):
            jumps = find_jumps(self.field, self.state.w, reach)
            if jumps.field or jumps.loss:
                self.tally.jumps += 1
                self.tally.sliding = True
                self.loss_jumps |= jumps.loss > 0
                found = jumps.words
                break
        self.notes.append(
            f"steps from ln t = {self.state.log_time:.4g}: {self.state.method} stalled ({found})"
        )
        self._waited = 0
        self.state = dataclasses.replace(self.state, method="steps", step_size=_FIRST)

    def _perhaps_smooth_again(self) -> None:
        """Try the stiff integrator where the jumps lie behind: it goes on a thousand times faster."""
        if self.state.method != "steps" or self.method != "auto" or self.loss_jumps:
            return
        if not self._jacobian_fits() or not self.state.separated:
            return
        self._waited += 1
        if self._waited < self._wait:
            return
        self._waited = 0
        for reach in (REACH, 1e-2, 1e-4):
            if find_jumps(self.field, self.state.w, reach).field:
                return
        self._wait *= 2
        self.notes.append(f"stiff from ln t = {self.state.log_time:.4g}: no jump is near any more")
        self.state = dataclasses.replace(self.state, method="stiff", step_size=1e-3)

    def _look_for_sliding(self, combined: int) -> None:
        """Whether the last stretch ended on a surface of discontinuity."""
        if self.tally.sliding or not (combined or self.loss_jumps):
            return
        jumps = find_jumps(self.field, self.state.w, 4 * self.tolerance)
        if jumps.field or jumps.loss:
            self.tally.sliding = True
            self.tally.jumps += 1
            self.notes.append(f"sliding by ln t = {self.state.log_time:.4g}: {jumps.words}")

    def _give_up(self, state: State) -> bool:
        """Whether to end here; the reason goes into :attr:`ended`."""
        if self.stopping():
            return True
        if self.field.evaluations >= self.max_evaluations:
            self.ended = "work"
        elif not state.separated:
            best, since = self._still
            if state.log_loss < best - _STILL:
                self._still = (state.log_loss, self.field.evaluations)
            elif self.field.evaluations - since > _STILL_EVALUATIONS:
                self.ended = "not separated"
            late = state.log_time > 0.5 * self.patience and self._at_rest(state)
            if state.log_time > self.patience or late or not self.here.velocity.any():
                self.ended = "not separated"
        return bool(self.ended)

    def _at_rest(self, state: State) -> bool:
        """Whether ln L has all but stopped to change with ln t."""
        velocity = self.field.velocity(state.w)
        square = float(velocity @ velocity)
        return square == 0 or state.log_tl + math.log(square) < math.log(_REST)
