"""How far a network is from a KKT point of the max-margin problem (Theorem 5, Definition 3)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from marginflow._checks import instance, real, whole
from marginflow._finite import finite_examples
from marginflow._memory import memory_watched
from marginflow.attacks import Attack, Derivative, build
from marginflow.errors import InputError
from marginflow.homogeneity import Homogeneity, power
from marginflow.kkt._cone import Cone, Nearest
from marginflow.kkt._gram import Engine, GradientEngine, LayerEngine
from marginflow.kkt._problem import Problem, Survey
from marginflow.kkt._ties import TIE
from marginflow.losses import CrossEntropy, Loss, get_loss

_CAP = 4000
# Multiply-adds in a Gram matrix of per-example gradients that are taken without asking.
_WORK = 1e12
_GRID = 20
_COLUMNS = 80


class Residuals(NamedTuple):
    """``‖W − Σ λ_i ∂m_i‖ / ‖W‖`` for three choices of multipliers on all examples, tightest last.

    Attributes:
        paper: ``sqrt(2(1 − cos β))``, the paper's multipliers (130).
        tangential: ``sin β``, the same in the best common scale.
        best: r, the best multipliers.
    """

    paper: float
    tangential: float
    best: float


@dataclass(frozen=True, eq=False)
class Curve:
    """The relative residual r(τ) with multipliers on the examples with ``m_i ≤ (1 + τ) m_min``.

    Attributes:
        taus: τ in ascending order, (t,).
        residuals: r(τ), non-increasing, (t,).
        supports: the number of these examples, (t,).
    """

    taus: Tensor
    residuals: Tensor
    supports: Tensor


@dataclass(frozen=True, eq=False)
class Certificate:
    """The distance of W to a KKT point of ``min ½‖W‖² s.t. m_i(W) ≥ 1`` (Eq. 19), in float64.

    ``V = W/m_min^{1/K}`` is feasible with smallest margin 1. It is a KKT point iff
    ``V = Σ λ_i ∂m_i/∂V`` with λ ≥ 0 and λ_i = 0 wherever m_i > m_min. W stands for the trainable
    parameters, K for the sum of their degrees.

    Attributes:
        residual: r(τ) in [0, 1]: ``‖V − Σ λ_i ∂m_i‖ / ‖V‖`` with the best λ ≥ 0 on the support. 0 at a
            KKT point; 1 − r² is the share of ‖W‖² that the margins' gradients explain.
        support: the indices of the examples with ``m_i ≤ (1 + τ) m_min``, (s,), ascending.
        multipliers: the best λ_i, (s,), in the units of V. Where a margin is tied between several
            rivals or perturbations the sum over them.
        adversarial_examples: ``x_i + δ_i`` of the support, (s, …).
        tau: τ.
        truncated: whether the support was cut to the smallest margins (``max_support``);
            the residual is then an upper bound of r(τ).
        curve: r as a function of τ, from ties to everything, or to ``max_support``.
        residuals: the three relative residuals with multipliers on *all* examples, in their order.
        paper_multipliers: Eq. (130) with its missing 1/n, (n,):
            ``λ_i = ‖W‖ m_min^{(K−2)/K} |ℓ′(m_i)| / (n ‖∇L‖)``; 0 for an example that was left out.
        stationarity: χ of Definition 3 for the paper's multipliers, ``‖V − Σ λ_i ∂m_i‖``.
        complementarity: ``ξ = max_i λ_i (m_i/m_min − 1)`` for the same.
        complementarity_bound: ``ξ ≤ ‖W‖²/(e K m_min^{1+2/K})``; for another loss than the exponential
            times its ``max_i |ℓ′(m_i)|e^{m_i} / (|ℓ′(m_min)|e^{m_min})``.
        cosine: ``cos β = −⟨W, ∇L⟩/(‖W‖‖∇L‖)``, which tends to 1 (Lemma 12).
        cosine_gap: ``1 − cos β``, accurate however small.
        self_check: ``r² + K Σ λ_i m_i/‖W‖²`` in matching units, 1 for the best multipliers: r from
            the residual vector, the rest from the margins.
        solver_gap: the largest violated optimality condition of the best multipliers, as a cosine ≥
            0.
        margins: m_i, (n,); those left out too (``fitted_only``), which are not positive.
        norm: ``‖W‖``.
        order: K.
        loss: name of the loss in the paper's multipliers.
        attack: the perturbation's specification.
        derivative: ``total`` or ``detached``, as asked for.
        method: how the Gram matrix was formed.
    """

    residual: float
    support: Tensor
    multipliers: Tensor
    adversarial_examples: Tensor
    tau: float
    truncated: bool
    curve: Curve
    residuals: Residuals
    paper_multipliers: Tensor
    stationarity: float
    complementarity: float
    complementarity_bound: float
    cosine: float
    cosine_gap: float
    self_check: float
    solver_gap: float
    margins: Tensor
    norm: float
    order: float
    loss: str
    attack: str
    derivative: str
    method: str

    @property
    def fitted(self) -> Tensor:
        """The indices of the examples that are certified: those with ``m_i > 0``, ascending.

        Returns:
            (k,), int64, k ≤ n.
        """
        return torch.nonzero(self.margins > 0).squeeze(1)

    @property
    def left_out(self) -> int:
        """How many examples have no positive margin; 0 unless ``fitted_only`` was asked for."""
        return int((self.margins <= 0).sum())

    @property
    def smallest_margin(self) -> float:
        """``m_min``, of the examples that are certified."""
        return float(self.margins[self.fitted].min())

    @property
    def explained(self) -> float:
        """``1 − r²``, the share of ``‖W‖²`` that the margins' gradients explain."""
        return 1 - self.residual**2

    @property
    def verdict(self) -> str:
        """How near that is, in words."""
        if self.residual <= 1e-6:
            return "a KKT point, to the accuracy of r"
        if self.residual <= 0.1:
            return "near a KKT point"
        if self.residual <= 0.7:
            return "on the way to a KKT point"
        return "far from a KKT point, as networks in practice are"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every number but those of the examples outside the support.

        What is not finite becomes None; so does τ where it is infinite.
        """
        curve = self.curve
        chosen = self.support
        return {
            "verdict": self.verdict,
            "residual": self.residual,
            "explained": self.explained,
            "tau": _finite(self.tau),
            "examples": len(self.fitted),
            "left_out": self.left_out,
            "truncated": self.truncated,
            "curve": {
                "taus": [_finite(value) for value in curve.taus.tolist()],
                "residuals": curve.residuals.tolist(),
                "supports": curve.supports.tolist(),
            },
            "residuals": self.residuals._asdict(),
            "stationarity": _finite(self.stationarity),
            "complementarity": _finite(self.complementarity),
            "complementarity_bound": _finite(self.complementarity_bound),
            "cosine": self.cosine,
            "cosine_gap": self.cosine_gap,
            "self_check": self.self_check,
            "solver_gap": self.solver_gap,
            "smallest_margin": self.smallest_margin,
            "norm": self.norm,
            "order": self.order,
            "loss": self.loss,
            "attack": self.attack,
            "derivative": self.derivative,
            "method": self.method,
            "support": {
                "indices": chosen.tolist(),
                "multipliers": self.multipliers.tolist(),
                "paper_multipliers": self.paper_multipliers[chosen].tolist(),
                "margins": self.margins[chosen].tolist(),
            },
        }

    def __str__(self) -> str:
        n, s, used = len(self.fitted), len(self.support), int((self.multipliers > 0).sum())
        within = f"m_i ≤ {1 + self.tau:g} m_min" if math.isfinite(self.tau) else "any margin"
        cut = f", cut to the {s} smallest" if self.truncated else ""
        left_out = f"{self.left_out} with m_i ≤ 0 are left out" if self.left_out else ""
        parts = {
            "verdict": self.verdict,
            "examples": f"{n} of {len(self.margins)}, {left_out}" if left_out else f"{n}",
            "best multipliers": f"r = {_number(self.residual)} on {s} of {n} examples "
            f"({within}{cut}), {used} of them positive; {_percent(self.explained)} of ‖W‖² explained",
            "all examples": f"paper {_number(self.residuals.paper)} ≥ tangential "
            f"{_number(self.residuals.tangential)} ≥ best {_number(self.residuals.best)}",
            "paper's (130)": f"χ = {self.stationarity:.3g}, ξ = {self.complementarity:.3g} "
            f"(at most {self.complementarity_bound:.3g}), 1 − cos β = {self.cosine_gap:.3g}, "
            f"loss {self.loss}",
            "network": f"m_min = {self.smallest_margin:.4g}, ‖W‖ = {self.norm:.4g}, "
            f"K = {self.order:g}",
            "perturbation": f"{self.attack}, derivative {self.derivative}",
            "checks": f"r² + KΣλm/‖W‖² − 1 = {self.self_check - 1:.0e}, "
            f"optimality to {self.solver_gap:.0e} ({self.method})",
        }
        lines = ["KKT certificate of min ½‖W‖² s.t. m_i ≥ 1 (Theorem 5)"]
        return "\n".join(lines + [labelled(title, text) for title, text in parts.items()])


def kkt_certificate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack | str | None = None,
    *,
    loss: str | Loss = "exponential",
    tau: float = 2.0,
    taus: Sequence[float] | None = None,
    derivative: Derivative = "total",
    fitted_only: bool = False,
    max_support: int | None = None,
    batch_size: int = 1024,
    memory: int = 2**30,
    homogeneity: Homogeneity | None = None,
    seed: int = 0,
) -> Certificate:
    """Measure how far the network is from a KKT point of ``min ½‖W‖² s.t. m_i(W) ≥ 1`` (Theorem 5).

    ``m_i(W)`` is the margin at ``x_i + δ_i(W)``. The best multipliers solve
    ``min_{λ ≥ 0} ‖W − Σ λ_i ∂m_i‖²``, a non-negative least-squares problem in the Gram matrix of the
    margins' gradients; for networks of linear and convolutional layers no gradient of a single
    example is formed. Everything is computed in float64 on a copy: the model, its mode, its gradients
    and the random state stay as they are. Frozen parameters are constants: W, ‖W‖ and K are those of
    the trainable ones. All weights may be as small or large as ``m_min`` and ``‖W‖^K`` between 1e-290 and
    1e290 admit: residuals, multipliers, χ and ξ are then those of ``W/‖W‖`` (but for the slopes of the loss,
    whose ratios ``e^{−(m_i − m_j)}`` are known to ``max m_i`` roundings).

    Where a margin is tied (to 1e-9) between rival classes, between elements of a finite set, between
    signs of FGSM or of ExactLinear's ℓ∞ (or its largest coordinates under ℓ1), or between the sides of a
    ``nn.ReLU`` or ``nn.LeakyReLU`` on (n, units) at its kink, each gradient enters, as Clarke's
    subdifferential has it. Of an example with more than eight units at a kink the pieces are formed that
    lower r: all that matter where these units are of one layer, so that r is exact; where some feed others
    the best of many pieces is a local one, and r may be an upper bound. So it is with more than eight
    undetermined signs, of which eight are expanded. Not expanded, and autograd's own choice, are the kinks
    of ``F.relu`` in a forward, of a ReLU behind a convolution and of max-pooling, signs within PGD, and
    kinks at which δ(W) jumps: there is no subdifferential. There too r is an upper bound.

    Args:
        model: a multi-homogeneous network, (n, …) to (n,), (n, 1) or (n, C).
        x: examples, (n, …).
        y: labels, (n,): −1/+1 for one output, 0 … C − 1 for C outputs.
        attack: the perturbation δ, or its specification; None certifies the clean margins.
        loss: ``exponential`` or ``logistic``, of the margin: its slopes weigh the paper's multipliers.
        tau: multipliers are allowed where ``m_i ≤ (1 + τ) m_min``, τ ≥ 0; ``math.inf`` allows all.
        taus: where to evaluate the curve, each τ ≥ 0; by default 0 and where the k-th example comes
            in, k log-spaced up to everything.
        derivative: ``total`` differentiates through δ(W), as Theorem 5 needs; ``detached`` holds δ
            fixed. Both agree where δ is an exact inner maximum or made of signs.
        fitted_only: leave out the examples whose margin is not positive, instead of refusing
            them: the certificate is that of the problem without their constraints.
        max_support: the most examples that may have multipliers; by default 4000, and fewer where
            per-example gradients are needed and W is large.
        batch_size: examples per pass.
        memory: bytes for the data of single examples, beside the Gram matrix of ``max_support²``.
        homogeneity: the measured layers, if at hand.
        seed: of a random start.

    Returns:
        the certificate.

    Raises:
        InputError: margins that are not all positive, or with ``fitted_only`` none, τ < 0,
            cross-entropy, an attack that is not scale invariant.
        NotHomogeneousError: the network is not multi-homogeneous.
        ModelError: a zero layer, margins that are not finite.
        DataError: labels or shapes that do not fit, NaN or infinity in x.
        OutOfMemoryError: with the batch size to try.

    Examples:
        >>> import marginflow as mf
        >>> data = mf.load("separable:n=20,d=6,margin=0.3")
        >>> attack = mf.attacks.ExactLinear(2, eps=0.1)
        >>> flow = mf.gradient_flow("deep-linear:4", data, attack=attack, log_time=100)
        >>> mf.kkt_certificate(flow.model, data.x, data.y, attack).residual < 0.05
        True
    """
    attack = build(attack)
    tau = _tau("tau", tau)
    if taus is not None:
        instance("taus", taus, Iterable, "numbers of at least 0")
    asked = None if taus is None else sorted({_tau("taus", value) for value in taus})
    scorer = get_loss(loss)
    if isinstance(scorer, CrossEntropy):
        raise InputError(
            "loss: cross-entropy is no function of the margin f[y] − max f[j]; expected 'exponential' "
            "or 'logistic', which are taken of that margin for several classes too"
        )
    if max_support is not None:
        whole("max_support", max_support, least=1)
    whole("memory", memory, least=1)
    finite_examples("x", x)
    advice = (
        f"lower max_support (now {max_support or _CAP} at most) and memory (now {memory} bytes)"
    )
    with torch.enable_grad(), memory_watched("certifying", min(batch_size, len(x)), advice=advice):
        problem = Problem(
            model,
            x,
            y,
            attack,
            derivative=derivative,
            homogeneity=homogeneity,
            seed=seed,
            batch_size=batch_size,
        )
        survey = problem.survey(max_support or _CAP, scorer, fitted_only=fitted_only)
        if not fitted_only:
            refuse_negative(survey.margins)
        cone, engine = _cone(problem, survey, max_support, memory)
        levels, points, chosen, last = _along(cone, survey, tau, asked)
        best = _best_of_all(cone, survey, last)

    fitted = survey.margins[survey.margins > 0]
    m_min = float(fitted.min())
    order, norm = problem.order, cone.norm
    unit = survey.gradient / torch.linalg.vector_norm(survey.gradient)
    direction = cone.weights / norm
    cosine = float(unit @ direction)
    # 1 − cos β by the tangential part: sin²β/(1 + cos β).
    sine = float(torch.linalg.vector_norm(unit - cosine * direction))
    gap = sine**2 / (1 + cosine)
    paper = math.sqrt(2 * gap)
    tangential = min(sine, paper)
    size = float(torch.linalg.vector_norm(survey.gradient))
    to_v = power(m_min, (order - 2) / order)
    paper_multipliers = survey.weights * (norm * to_v / size)
    # Of what follows only the margins, ‖W‖, the slopes and the bound of ξ depend on the scale of W.
    true = fitted * problem.margin_unit
    logs = scorer.log_slopes(true) + true
    excess = math.exp(float(logs.max() - logs[fitted.argmin()]))

    r = len(chosen.multipliers)
    rows = cone.rows.take(slice(0, r))
    examples = rows.examples.cpu()
    support, position = torch.unique(examples, return_inverse=True)
    multipliers = torch.zeros(len(support), dtype=torch.float64)
    multipliers.index_add_(0, position, chosen.multipliers * to_v)
    first = torch.zeros(len(support), dtype=torch.int64)
    first[position.flip(0)] = torch.arange(r - 1, -1, -1)
    explained = order * float(chosen.multipliers @ rows.values.cpu()) / norm**2
    limit = (1 + tau) * m_min * (1 + TIE)
    residuals = torch.tensor([point.residual for point in points], dtype=torch.float64)
    sizes = [cone.examples(len(point.multipliers)) for point in points]
    return Certificate(
        residual=chosen.residual,
        support=support,
        multipliers=multipliers,
        adversarial_examples=rows.perturbed.cpu()[first],
        tau=tau,
        truncated=int((fitted <= limit).sum()) > len(support),
        curve=Curve(
            torch.tensor(levels, dtype=torch.float64),
            # The multipliers of a smaller τ are allowed for a larger one.
            torch.cummin(residuals, dim=0).values,
            torch.tensor(sizes),
        ),
        residuals=Residuals(paper, tangential, min(best, tangential)),
        paper_multipliers=paper_multipliers,
        stationarity=norm / power(m_min, 1 / order) * paper,
        complementarity=float(
            (paper_multipliers * (survey.margins / m_min - 1)).clamp(min=0).max()
        ),
        complementarity_bound=excess
        * (norm / power(m_min, 1 / order)) ** 2
        / (math.e * order * m_min * problem.margin_unit),
        cosine=cosine,
        cosine_gap=gap,
        self_check=chosen.residual**2 + explained,
        solver_gap=chosen.violation,
        margins=survey.margins * problem.margin_unit,
        norm=norm * problem.unit,
        order=order,
        loss=scorer.name,
        attack="none" if attack is None else str(attack),
        derivative=derivative,
        method=engine.name,
    )


def labelled(title: str, text: str) -> str:
    """``text`` beside its title, in lines of at most 80 columns."""
    lead = f"  {title:<19}"
    return textwrap.fill(
        text,
        _COLUMNS,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_on_hyphens=False,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(residual: float) -> str:
    """Enough digits near 1, where residuals crowd, and near 0."""
    return f"{residual:.6f}" if residual > 1e-3 else f"{residual:.2e}"


def _percent(share: float) -> str:
    """Three digits, and six near 100%, where it matters how near."""
    return f"{100 * share:.3g}%" if share < 0.995 else f"{100 * share:.6g}%"


def _tau(name: str, value: float) -> float:
    return math.inf if value == math.inf else real(name, value, least=0.0)


def refuse_negative(margins: Tensor) -> None:
    """Raise the error for margins that are not all positive, with their number."""
    bad = int((margins <= 0).sum())
    if bad:
        raise InputError(
            f"{bad} of {len(margins)} margins are not positive (the smallest is {float(margins.min()):.3g}), "
            "so no multiple of W satisfies m_i ≥ 1 and there is no KKT point in its direction; train until "
            "every adversarial margin is positive, reduce eps, or certify only the examples that have "
            "one (fitted_only=True; --fitted-only)"
        )


def _cone(
    problem: Problem, survey: Survey, max_support: int | None, memory: int
) -> tuple[Cone, Engine]:
    """The cone of the smallest margins' gradients, ties included."""
    nearest = survey.nearest
    engine: Engine | None = LayerEngine.fit(problem, nearest, memory)
    if engine is None:
        engine = GradientEngine(problem)
        affordable = math.isqrt(int(_WORK / len(problem.weights)))
        nearest = nearest.take(slice(0, max_support or max(200, affordable)))
    rows = problem.pieces(nearest, nearest.values * (1 + TIE))
    return Cone(problem, rows, engine, memory), engine


def _along(
    cone: Cone, survey: Survey, tau: float, asked: Sequence[float] | None
) -> tuple[list[float], list[Nearest], Nearest, Nearest]:
    """The levels τ, the nearest point for each, for ``tau``, and for everything kept."""
    margins = survey.margins[cone.rows.examples.cpu()]
    low, high = float(margins[0]), float(margins[-1])
    everything = high / low - 1
    if asked is None:
        asked = [*_grid(margins / low - 1), min(tau, everything)]
    levels = sorted(set(asked))
    bounds = [(1 + level) * low * (1 + TIE) for level in levels]
    wanted = (1 + tau) * low * (1 + TIE)
    found: dict[float, Nearest] = {}
    last: Nearest | None = None
    for bound in sorted({*bounds, wanted, math.inf}):
        # Pieces that one bound asks for are rows for the next.
        margins = survey.margins[cone.rows.examples.cpu()]
        r = int((margins <= bound).sum())
        if last is None or len(last.scaled) < r:
            start = None if last is None else last.scaled
            last = cone.completed(r, start, exact=r == int((margins <= wanted).sum()))
        found[bound] = last
    return levels, [found[bound] for bound in bounds], found[wanted], found[math.inf]


def _grid(excesses: Tensor) -> list[float]:
    """The τ at which the k-th example comes in, k log-spaced: r changes only where one does."""
    entries = torch.unique(excesses).tolist()
    places = {round(len(entries) ** (k / (_GRID - 1))) - 1 for k in range(_GRID)}
    return [0.0, *(entries[place] for place in sorted(places))]


def _best_of_all(cone: Cone, survey: Survey, last: Nearest) -> float:
    """R with multipliers on all examples; those without a row share one, in the paper's ratios."""
    if cone.examples(len(cone.rows)) < int((survey.margins > 0).sum()):
        return cone.with_direction(survey.gradient, last.scaled)
    return last.residual
