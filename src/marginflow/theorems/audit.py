"""The audit of hypotheses: which conditions of the paper a run meets, each measured."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marginflow.attacks import PGD, Attack, ExactLinear
from marginflow.datasets import Dataset
from marginflow.errors import ModelError
from marginflow.margins import adversarial_margins
from marginflow.runs import Run
from marginflow.theorems._damage import judged
from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import gradients_apart
from marginflow.theorems._regularity import JUMP
from marginflow.theorems._verdict import Verdict
from marginflow.theorems._verify import HasRun, as_run, judge
from marginflow.theorems.lemma_3 import changes

_LINES, _COLUMNS = 24, 80
_EXAMPLES = 500
_STARTS = 3
_STRONGER = 10
_FEWEST_STEPS = 50
_ROUNDING = 1e-9


@dataclass(frozen=True)
class InnerMaximum:
    """The run's own attack against a stronger one of the same norm and ε, at the last weights.

    The stronger one is, for each example, the best of the attack itself, PGD with ten times its
    steps (at least 50) of size 2.5 ε/steps from x and from three random starts, and the exact
    maximum where the network is linear. It may miss the worst case too: the gaps are lower bounds.

    Attributes:
        exact: whether the attack is known to minimise the margin exactly, and was not beaten.
        gap: ``(min m − min m′)/max |m|``, m the margins under the attack, m′ under the stronger.
        mean_gap: mean of ``(m_i − m_i′)/max |m|``.
        newly_wrong: share of examples with ``m_i > 0`` and ``m_i′ ≤ 0``.
        examples: how many examples were attacked.
        steps: steps of the stronger PGD; 0 where there is none (a finite set, ℓp beyond 2 and ∞).
    """

    exact: bool
    gap: float
    mean_gap: float
    newly_wrong: float
    examples: int
    steps: int


@dataclass(frozen=True)
class Regularity:
    """How smooth the inner problem is along the path.

    Attributes:
        kinks: whether ∇_x f jumps somewhere between examples, or None where it was not examined.
        delta_jump: largest jump of δ that was found along the path, in units of ε; None: not examined.
        margin_jump: largest jump of a margin found so, relative to the largest |m|.
        sliding: whether a flow runs along a surface where its field jumps; None for steps.
        falls: on how many steps of a flow since separation ℓ/ρ fell, ``ℓ = ln(1/(nL))``.
        separated_steps: how many such steps there were.
    """

    kinks: bool | None
    delta_jump: float | None
    margin_jump: float | None
    sliding: bool | None
    falls: int | None
    separated_steps: int | None


@dataclass(frozen=True)
class Answer:
    """One line of the audit: a question, its answer, and what it means in plain words."""

    question: str
    answer: str
    meaning: str


@dataclass(frozen=True)
class Audit:
    """Which hypotheses of the paper a run meets, and which statements therefore apply.

    ``str()`` is one screen: at most 24 lines of 80 columns.

    Attributes:
        run: name of the run.
        step: of its last measurement, which is what was judged; None without one.
        degrees: the degree c_k of each layer, or None for a network that is not multi-homogeneous,
            or that could not be built.
        order: K = Σ c_k, or None likewise.
        separated: ``nL < ℓ(0)`` at the last measurement (``L < 1/n`` for the exponential loss:
            Assumption 4, corrected), or None without one.
        positive_margins: whether all adversarial margins are positive there, which is less.
        attack: its specification.
        scale_invariant: Definition 1, by form and as measured; True without a perturbation.
        scale_changes: share of the numbers of δ that change when layers are multiplied by
            powers of two; None where nothing could be measured.
        inner: how exact the inner maximum is, or None without a perturbation or network.
        regularity: kinks and jumps.
        derivative: ``detached`` or ``total``.
        derivative_gap: ``‖G_detached − G_total‖/‖G_total‖`` at the last kept point, or None.
        loss: its name.
        exponential: whether it is ``e^{−m}``.
        gradient_flow: whether the run is a gradient flow, Eq. (16), and not made of steps.
        verdicts: every statement on this run, as :func:`marginflow.verify` gives them.
    """

    run: str
    step: int | None
    degrees: tuple[float, ...] | None
    order: float | None
    separated: bool | None
    positive_margins: bool | None
    attack: str
    scale_invariant: bool
    scale_changes: float | None
    inner: InnerMaximum | None
    regularity: Regularity
    derivative: str
    derivative_gap: float | None
    loss: str
    exponential: bool
    gradient_flow: bool
    verdicts: tuple[Verdict, ...]

    @property
    def applies(self) -> tuple[str, ...]:
        """Statements of which this run meets all conditions, sufficient ones included."""
        return tuple(
            v.statement
            for v in self.verdicts
            if v.outcome != "does not apply" and not any(h.met is False for h in v.hypotheses)
        )

    @property
    def without_sufficient(self) -> dict[str, tuple[str, ...]]:
        """Statements judged although a sufficient condition is missing, each with what is missing."""
        return {
            v.statement: tuple(h.name for h in v.hypotheses if h.met is False)
            for v in self.verdicts
            if v.outcome != "does not apply" and any(h.met is False for h in v.hypotheses)
        }

    @property
    def missing(self) -> dict[str, tuple[str, ...]]:
        """Statements that do not apply, each with the needed conditions that are not met."""
        return {
            v.statement: tuple(h.name for h in v.unmet)
            for v in self.verdicts
            if v.outcome == "does not apply"
        }

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The eight questions with their answers."""
        return (
            self._homogeneity(),
            self._separation(),
            self._scaling(),
            self._inner(),
            self._jumps(),
            self._derivative(),
            Answer(
                "Exponential loss?",
                _yes(self.exponential, self.loss),
                "exponential: margin m costs e^(-m)",
            ),
            Answer(
                "Gradient flow?",
                "yes" if self.gradient_flow else "no, discrete steps",
                "the limit of infinitely small steps",
            ),
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all but the verdicts, which have their own file; null for what is not finite."""
        found = asdict(self)
        del found["verdicts"]
        if self.derivative_gap is not None and not math.isfinite(self.derivative_gap):
            found["derivative_gap"] = None
        return {
            **found,
            "answers": [asdict(a) for a in self.answers],
            "applies": list(self.applies),
            "without_sufficient": self.without_sufficient,
            "missing": self.missing,
        }

    def __str__(self) -> str:
        title = f"Which hypotheses of the paper does {self.run} meet?"
        if len(title) > _COLUMNS:
            title = _cut(f"Which hypotheses does {self.run} meet?")
        lines = [title]
        for a in self.answers:
            line, meaning = f"{a.question:<17} {a.answer}", f"({a.meaning})"
            if len(line) + 1 + len(meaning) <= _COLUMNS:
                lines.append(f"{line} {meaning}")
            else:
                lines += textwrap.wrap(line, _COLUMNS, subsequent_indent="   ")
                lines += textwrap.wrap(f"   {meaning}", _COLUMNS, subsequent_indent="   ")
        rest = self._statements()
        room = _LINES - len(lines)
        if len(rest) > room:
            rest = [*rest[: room - 1], "  … and others: see the table of verdicts"]
        return "\n".join([*lines, *rest])

    def _homogeneity(self) -> Answer:
        if self.degrees is None or self.order is None:
            answer = "no, or the network could not be built here"
        else:
            answer = f"yes, degrees {_short(self.degrees)}; sum K = {self.order:g}"
        return Answer("Homogeneous?", answer, "layer × a: output × a^degree")

    def _separation(self) -> Answer:
        if self.separated is None:
            answer = "unknown: nothing was measured"
        elif self.separated:
            answer = "yes"
        elif self.positive_margins:
            answer = "not yet, but all margins are positive"
        else:
            answer = "no, some margins are not positive"
        at_zero = "1" if self.exponential else "loss at margin 0"
        return Answer("Separated?", answer, f"total loss < {at_zero}, so all are right")

    def _scaling(self) -> Answer:
        if self.scale_changes is None:
            answer = _yes(self.scale_invariant, "by its form; not measured")
        else:
            detail = f"{100 * self.scale_changes:.2g}% of the perturbation changes"
            answer = _yes(self.scale_invariant, detail)
        return Answer("Scale invariant?", answer, "layers × powers of 2")

    def _inner(self) -> Answer:
        found = self.inner
        if found is None:
            answer = "no perturbation, or no network to attack"
        elif found.exact:
            answer = "yes" + (f", not beaten by {found.steps} steps" if found.steps else "")
        elif found.gap <= _ROUNDING and found.newly_wrong == 0 and found.mean_gap <= _ROUNDING:
            answer = f"not beaten by {found.steps} steps, which is no proof"
        else:
            answer = (
                f"no, {found.steps} steps: {found.gap:.2g} of max|m| lower, "
                f"{100 * found.newly_wrong:.2g}% more wrong"
            )
        meaning = "m: margin, the right answer's lead; smallest m under a stronger attack"
        return Answer("Worst case?", answer, meaning)

    def _jumps(self) -> Answer:
        r = self.regularity
        if r.margin_jump is None:
            answer = "not examined, no attack"
        elif r.margin_jump > JUMP:
            answer = f"yes, by {r.margin_jump:.1g} of max|m|"
        else:
            answer = "no jump found"
        answer += ", sliding" if r.sliding else ""
        if r.separated_steps:
            answer += f"; fell on {r.falls} of {r.separated_steps} steps"
        meaning = "leaps on the path"
        meaning += "; sliding: along leaps" if r.sliding else ""
        meaning += "; fell: margin over weights' size" if r.separated_steps else ""
        return Answer("Margins jump?", answer, meaning)

    def _derivative(self) -> Answer:
        apart = self.derivative_gap
        gap = "" if apart is None else f", the two differ by {apart:.1g} at the end"
        meaning = "total: through the perturbation's own change; detached: it is held fixed"
        return Answer("Derivative?", f"{self.derivative}{gap}", meaning)

    def _statements(self) -> list[str]:
        reached = {v.statement for v in self.verdicts if v.outcome in ("holds", "fails")}
        every = [v.statement for v in self.verdicts]
        failed = [v.statement for v in self.verdicts if v.outcome == "fails"]
        paragraphs = {
            "Apply, and FAIL: ": [_listed(failed, every)],
            "Apply: ": [_listed([s for s in self.applies if s in reached], every)],
            "Apply, too early to tell: ": [
                _listed([s for s in self.applies if s not in reached], every)
            ],
            "Measured without a sufficient condition: ": _by_reason(self.without_sufficient, every),
            "Do not apply: ": _by_reason(self.missing, every),
        }
        found: list[str] = []
        for label, parts in paragraphs.items():
            if any(parts):
                text = label + ". ".join(parts)
                found += textwrap.wrap(text, _COLUMNS, subsequent_indent="  ")
        return found


def audit(
    run: Run | HasRun | str | os.PathLike[str],
    data: Dataset | None = None,
    *,
    attack: Attack | None = None,
    model: nn.Module | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Audit:
    """Measure which hypotheses of the paper this model, data, attack, derivative and loss meet.

    Source: Assumptions 1 to 4 and Definition 1, with marginflow's corrections.

    Args:
        run: a training run or a gradient flow, its directory, or the :class:`Flow` itself.
        data: the data set it was trained on; by default loaded as the run names it.
        attack: its attack, needed where the name does not say it all (a finite set).
        model: a network of the same architecture, needed on a run from disk whose network is
            not one of :mod:`marginflow.models`.
        data_dir: folder of the MNIST files, if they are what is loaded.

    Returns:
        the :class:`Audit`, with the verdicts on all statements.

    Raises:
        RunError: no such run, or other data or another attack than those it was trained on.
        InputError: data or an attack that must be given.
        MissingDependencyError: an oracle needs the extra ``oracles``.
    """
    evidence = Evidence(as_run(run), data, attack=attack, model=model, data_dir=data_dir)
    with judged(evidence.run):
        return _audited(evidence)


def _audited(evidence: Evidence) -> Audit:
    separated, positive = _separated(evidence)
    invariant, changed = _scale_invariant(evidence)
    homogeneity = evidence.homogeneity
    sites = evidence.sites
    return Audit(
        run=evidence.run.name,
        step=evidence.run.metrics[-1].get("step") if evidence.run.metrics else None,
        degrees=None if homogeneity is None else tuple(homogeneity.degrees),
        order=None if homogeneity is None else homogeneity.order,
        separated=separated,
        positive_margins=positive,
        attack=str(evidence.config["attack"]),
        scale_invariant=invariant,
        scale_changes=changed,
        inner=_inner_maximum(evidence),
        regularity=_regularity(evidence),
        derivative=str(evidence.config["derivative"]),
        derivative_gap=gradients_apart(sites[-1]) if sites and evidence.differentiable else None,
        loss=evidence.loss.name,
        exponential=evidence.loss.name == "exponential",
        gradient_flow=evidence.is_flow,
        verdicts=judge(evidence),
    )


def _separated(evidence: Evidence) -> tuple[bool | None, bool | None]:
    """``nL < ℓ(0)``, in logarithms, and whether all margins are positive: of the last record."""
    last = _last(evidence)
    log_loss, margin = last.get("log_loss"), last.get("margin")
    positive = None if margin is None else bool(margin > 0)
    if log_loss is None:
        return None, positive
    at_zero = float(evidence.loss.log_values(torch.zeros(1, dtype=torch.float64)))
    return bool(log_loss + math.log(evidence.data.n) < at_zero), positive


def _last(evidence: Evidence) -> Mapping[str, Any]:
    return evidence.run.metrics[-1] if evidence.run.metrics else {}


def _scale_invariant(evidence: Evidence) -> tuple[bool, float | None]:
    attack = evidence.attack
    if attack is None or attack.eps == 0:
        return True, None
    if not evidence.sites:
        return attack.scale_invariant, None
    changed, total, _ = changes(evidence.sites, attack)
    return attack.scale_invariant and changed == 0, changed / total


def _inner_maximum(evidence: Evidence) -> InnerMaximum | None:
    attack, model = evidence.attack, evidence.network
    if attack is None or attack.eps == 0 or model is None:
        return None
    x, y = (values[:_EXAMPLES] for values in _spread(evidence.sample))

    def margins(one: Attack, seed: int = 0) -> Tensor:
        return adversarial_margins(model, x, y, one, normalize=False, seed=seed).values

    own = margins(attack)
    least, steps = own, 0
    # A finite set is no ball, and PGD knows two norms.
    if attack.name != "finite-set" and attack.p in (2.0, math.inf):
        steps = max(_FEWEST_STEPS, _STRONGER * getattr(attack, "steps", 1))
        for seed in range(_STARTS + 1):
            stronger = PGD(
                attack.p, attack.eps, steps=steps, random_start=seed > 0, bounds=attack.bounds
            )
            least = torch.minimum(least, margins(stronger, seed))
        if attack.bounds is None:
            with suppress(ModelError):  # refused unless the network is linear
                least = torch.minimum(least, margins(ExactLinear(attack.p, attack.eps)))
    scale = float(own.abs().max()) or 1.0
    gaps = (own - least) / scale
    return InnerMaximum(
        exact=(attack.exact or evidence.exact_maximum) and float(gaps.max()) <= _ROUNDING,
        gap=float(own.min() - least.min()) / scale,
        mean_gap=float(gaps.mean()),
        newly_wrong=float(((own > 0) & (least <= 0)).double().mean()),
        examples=len(y),
        steps=steps,
    )


def _spread(sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """At most 500 examples, evenly spread: the first ones may all be of one class."""
    x, y = sample
    chosen = torch.linspace(0, len(y) - 1, min(len(y), _EXAMPLES)).round().long()
    return x[chosen], y[chosen]


def _regularity(evidence: Evidence) -> Regularity:
    jumps, last = evidence.jumps, _last(evidence)
    return Regularity(
        kinks=None if not evidence.sites else evidence.kinks is not None,
        delta_jump=None if jumps is None else jumps.delta,
        margin_jump=None if jumps is None else jumps.margin,
        sliding=last.get("sliding"),
        falls=last.get("falls"),
        separated_steps=last.get("separated_steps"),
    )


def _by_reason(lacking: dict[str, tuple[str, ...]], every: Sequence[str]) -> list[str]:
    """Statements grouped by the first condition that they lack."""
    found: dict[str, list[str]] = {}
    for statement, names in lacking.items():
        found.setdefault(re.split(r"[:(,]", names[0])[0].strip(), []).append(statement)
    return [f"{_listed(names, every)} (not met: {reason})" for reason, names in found.items()]


def _listed(statements: Sequence[str], every: Sequence[str]) -> str:
    """``Lemmas 3, 4; Theorem 4 (identity)``: parts are named only where they are not all there."""
    parts: dict[str, list[str]] = {}
    whole: dict[str, int] = {}
    for name in every:
        base = name.split(" (")[0]
        whole[base] = whole.get(base, 0) + 1
    for name in statements:
        base, _, part = name.partition(" (")
        parts.setdefault(base, []).append(part.removesuffix(")"))
    kinds: dict[str, list[str]] = {}
    for base, found in parts.items():
        kind, number = base.split(" ", 1)
        named = number if len(found) == whole[base] else f"{number} ({', '.join(found)})"
        kinds.setdefault(kind, []).append(named)
    for numbers in kinds.values():
        numbers.sort(key=lambda n: (int(n.split()[0]) if n.split()[0].isdigit() else 0, n))
    plural = {"Lemma": "Lemmas", "Theorem": "Theorems", "Eq.": "Eqs."}
    return "; ".join(
        f"{plural.get(kind, kind) if len(numbers) > 1 else kind} {', '.join(numbers)}"
        for kind, numbers in kinds.items()
    )


def _yes(met: bool, detail: str) -> str:
    return f"{'yes' if met else 'no'}, {detail}"


def _short(degrees: tuple[float, ...]) -> str:
    if len(degrees) > 6 and len(set(degrees)) == 1:
        return f"{degrees[0]:g} in each of {len(degrees)} layers"
    return ", ".join(f"{c:g}" for c in degrees)


def _cut(line: str) -> str:
    return line if len(line) <= _COLUMNS else line[: _COLUMNS - 1] + "…"
