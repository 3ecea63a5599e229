"""What a statement of the paper says of one run, and whether it holds there.

Source: marginflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["holds", "fails", "does not apply", "not reached"]
"""What a verdict says of a statement on one run."""


NOT_SAID = "not said of this loop; declare it: Monitor(…, training={…})"
"""The detail of a hypothesis about a monitored loop that only its owner can answer."""


@dataclass(frozen=True)
class Hypothesis:
    """One condition of a statement and whether the run meets it.

    Attributes:
        name: the condition, with its number in the paper where it has one.
        met: True, False, or None where it could not be found out.
        detail: the number behind the answer.
        needed: False for a condition that is sufficient but not necessary: the statement
            is then measured all the same, and the table says so.
    """

    name: str
    met: bool | None
    detail: str = ""
    needed: bool = True


@dataclass(frozen=True)
class Verdict:
    """One statement of the paper, judged on one run.

    Attributes:
        statement: its name in the paper: ``Theorem 2``.
        claim: what it says, in a line.
        hypotheses: its conditions and whether this run meets each.
        quantity: what was measured.
        prediction: what the statement says of it.
        measured: what came out.
        tolerance: how far the two may differ, and why that far.
        outcome: ``holds``, ``fails``, ``does not apply`` or ``not reached``.
        advice: what to do where nothing could be decided.
    """

    statement: str
    claim: str
    hypotheses: tuple[Hypothesis, ...]
    quantity: str
    prediction: str
    measured: str
    tolerance: str
    outcome: Outcome
    advice: str = ""

    @property
    def unmet(self) -> tuple[Hypothesis, ...]:
        """The needed hypotheses that this run does not meet."""
        return tuple(h for h in self.hypotheses if h.needed and h.met is False)

    def as_dict(self) -> dict[str, Any]:
        """The verdict for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Claim:
    """A statement before it is judged: all of a :class:`Verdict` but what the run says."""

    statement: str
    claim: str
    hypotheses: Sequence[Hypothesis]
    quantity: str
    prediction: str
    tolerance: str

    def judge(self, ok: bool | None, measured: str, advice: str = "") -> Verdict:
        """The verdict for a measured value: ``ok`` None means that it was not reached."""
        outcome: Outcome = "not reached" if ok is None else "holds" if ok else "fails"
        unsaid = [h.name for h in self.hypotheses if h.needed and h.detail == NOT_SAID]
        if ok is False and unsaid:
            # What is not known to apply cannot fail.
            outcome, advice = "not reached", f"say of the loop whether it has {'; '.join(unsaid)}"
        return self._verdict(outcome, measured, advice)

    @property
    def inapplicable(self) -> Verdict | None:
        """*Does not apply*, naming the unmet hypotheses, or None if all are met."""
        return self.set_aside()

    def set_aside(self, shown: str = "") -> Verdict | None:
        """As :attr:`inapplicable`, with what was measured all the same beside it."""
        unmet = [h for h in self.hypotheses if h.needed and h.met is False]
        if not unmet:
            return None
        names = "; ".join(f"{h.name} ({h.detail})" if h.detail else h.name for h in unmet)
        beside = f"; measured all the same: {shown}" if shown else ""
        return self._verdict("does not apply", f"not met: {names}{beside}", "")

    def _verdict(self, outcome: Outcome, measured: str, advice: str) -> Verdict:
        return Verdict(
            self.statement,
            self.claim,
            tuple(self.hypotheses),
            self.quantity,
            self.prediction,
            measured,
            self.tolerance,
            outcome,
            advice,
        )
