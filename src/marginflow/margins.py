"""Adversarial margins of a data set: raw, normalised, their minimum, quantiles and smoothed form.

Source: the normalised adversarial margins of Section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from marginflow._checks import instance, whole
from marginflow._finite import finite_examples
from marginflow._memory import memory_watched
from marginflow.attacks import Attack
from marginflow.certified import CertifiedMargins, Method, certified_margins, check_attack
from marginflow.engine import AttackedOutputs, EngineName
from marginflow.errors import InputError, ModelError
from marginflow.homogeneity import Homogeneity, measure_homogeneity, power, within_range
from marginflow.losses import Loss, check_examples, get_loss, margins_of

# The range of ρ in which margins and what is made of them stay normal numbers of float64.
_LEAST, _MOST = 1e-290, 1e290


@dataclass(frozen=True, eq=False)
class Margins:
    """Margins m_i of n examples under one perturbation, at one set of weights.

    Source: Section 3.2; ``ℓ`` and its bounds from Eq. (105).

    Attributes:
        values: m_i, (n,), float64: ``y_i f(x_i + δ_i)``, or ``f[y_i] − max_{j≠y_i} f[j]``.
        rho: ρ = Π ρ_k^{c_k}, or None where normalisation was not asked for.
        total_norm: ‖W‖ = sqrt(Σ ρ_k²), or None likewise.
        order: K = Σ c_k, or None likewise.
        dead_inputs: (n,) bool, examples without an input gradient.
        log_loss: ln L at the perturbed examples for the loss asked for, or None.
        certified: lower bounds of the true adversarial margins, where they were asked for:
            ``certified.values ≤ min_δ m_i(x_i + δ) ≤ values``.
    """

    values: Tensor
    rho: float | None
    total_norm: float | None
    order: float | None
    dead_inputs: Tensor
    log_loss: float | None = None
    certified: CertifiedMargins | None = None

    @property
    def normalized(self) -> Tensor:
        """``γ̂_i = m_i / ρ``, (n,). Unchanged when layers are multiplied by positive numbers.

        Raises:
            ModelError: the margins were taken with ``normalize=False``.
        """
        return self.values / self._required(self.rho)

    @property
    def normalized_by_total(self) -> Tensor:
        """``m_i / ‖W‖^K``, (n,), the normalisation of Lyu & Li.

        Raises:
            ModelError: the margins were taken with ``normalize=False``.
        """
        # In two halves: ‖W‖^K may overflow where the quotient does not.
        half = power(self._required(self.total_norm), self._required(self.order) / 2)
        return self.values / half / half

    @property
    def min(self) -> float:
        """``min_i m_i``."""
        return float(self.values.min())

    @property
    def normalized_min(self) -> float:
        """``γ̂_m = min_i γ̂_i``, the paper's headline quantity.

        Raises:
            ModelError: the margins were taken with ``normalize=False``.
        """
        return float(self.normalized.min())

    @property
    def accuracy(self) -> float:
        """Share of examples with ``m_i > 0``."""
        return float((self.values > 0).double().mean())

    @property
    def certified_accuracy(self) -> float:
        """Share of examples that no perturbation of the ball changes, as far as the bounds can tell.

        Raises:
            InputError: the margins were taken without bounds.
        """
        return self._bounds().accuracy

    @property
    def width(self) -> Tensor:
        """``m_i − c_i ≥ 0``, (n,): within it the true adversarial margins lie.

        Raises:
            InputError: the margins were taken without bounds.
        """
        return self.values - self._bounds().values

    def _bounds(self) -> CertifiedMargins:
        if self.certified is None:
            raise InputError(
                "these margins were taken without lower bounds; ask for them: certified='auto'"
            )
        return self.certified

    def __str__(self) -> str:
        n = len(self.values)
        if self.certified is None:
            return f"accuracy ≤ {self.accuracy:.4g}, min m ≤ {self.min:.4g} (attacked, n = {n})"
        c = self.certified
        lines = (
            f"accuracy: certified {c.accuracy:.4g} ≤ true ≤ attacked {self.accuracy:.4g} "
            f"(n = {n}, bounds by {c.method})",
            f"min m: certified {c.min:.4g} ≤ true ≤ attacked {self.min:.4g}; median width "
            f"{float(self.width.quantile(0.5)):.4g}",
        )
        return "\n".join(lines)

    @property
    def smoothed(self) -> float:
        """``ℓ = ln(1/(nL)) = −ln Σ e^{−m_i}`` of the exponential loss: ``ℓ ≤ min_i m_i ≤ ℓ + ln n``."""
        return -float(torch.logsumexp(-self.values, dim=0))

    @property
    def smoothed_normalized(self) -> float:
        """``ℓ/ρ``, which is monotone along the gradient flow where Theorem 3 applies.

        Raises:
            ModelError: the margins were taken with ``normalize=False``.
        """
        return self.smoothed / self._required(self.rho)

    def quantiles(self, levels: Sequence[float]) -> Tensor:
        """Quantiles of γ̂_i at ``levels`` in [0, 1], linearly interpolated.

        Args:
            levels: the shares of examples below, each in [0, 1].

        Returns:
            (levels,), float64.

        Raises:
            InputError: a level outside [0, 1].
        """
        if any(not 0 <= level <= 1 for level in levels):
            raise InputError(f"quantiles: expected levels in [0, 1], got {list(levels)}")
        # torch.quantile stops at 16 million values; sorting does not.
        ordered = torch.sort(self.normalized).values
        position = torch.tensor(levels, dtype=torch.float64) * (len(ordered) - 1)
        low, high = position.floor().long(), position.ceil().long()
        return torch.lerp(ordered[low], ordered[high], position - low)

    @staticmethod
    def _required(value: float | None) -> float:
        if value is None:
            raise ModelError(
                "these margins were taken with normalize=False; a normalised margin needs a "
                "multi-homogeneous network"
            )
        return value


def adversarial_margins(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack | None = None,
    *,
    batch_size: int = 1024,
    loss: str | Loss | None = None,
    homogeneity: Homogeneity | None = None,
    normalize: bool = True,
    seed: int = 0,
    engine: EngineName = "auto",
    certified: Method | None = None,
) -> Margins:
    """The margins ``m_i`` of ``x_i + δ_i(W)`` and their normalisation (Section 3.2).

    Computed in the model's dtype, batch by batch: memory is bounded by ``batch_size``.
    The model's mode, gradients and the random state stay as they are.

    Accurate to the rounding of the dtype for every scale of the layers at which ρ is between 1e-290 and
    1e290, in float32 too: where products of layers would leave its range, they are taken of layers divided
    by powers of two, which changes no bit of ``normalized``. With ``normalize=False``
    nothing is scaled: what leaves the range of the dtype is 0, infinite or NaN.

    Args:
        model: maps (n, …) to outputs (n,), (n, 1) or (n, C).
        x: examples, (n, …); moved to the model's dtype and device batch by batch.
        y: labels, (n,): −1/+1 for one output, 0 … C − 1 for C outputs.
        attack: the perturbation; None measures the clean margins (ε = 0).
        batch_size: examples per pass.
        loss: also compute ln L of this loss.
        homogeneity: the measured layers, if at hand; else they are measured here.
        normalize: False skips the normalisation, for networks that are not homogeneous.
        seed: seed of a random start.
        engine: ``fused`` by explicit products (dense networks, all attacks but ``exact-linear``),
            ``autograd``, or ``auto``: fused where it applies. They differ by rounding.
        certified: also bound the true adversarial margins from below, by :func:`certified_margins`:
            ``crown``, ``interval``, ``norms`` or ``auto``; None does not. Where a bound meets the
            attacked margin to the rounding of the model's dtype, it is lowered to it.

    Raises:
        NotHomogeneousError: the network cannot be normalised (and ``normalize`` is True).
        DataError: labels, shapes or bounds that do not fit, no examples, NaN or infinity in x.
        OutOfMemoryError: with the batch size to try.
        InputError: batch_size below 1; bounds without an attack or of a finite set.
        MissingDependencyError: ``certified`` needs auto-LiRPA, which is not installed.
        ModelError: margins that are not finite; ``engine="fused"`` where it does not apply; ρ outside
            1e-290 … 1e290 (a layer is 0, say); a network that cannot be bounded; a bound above an attacked
            margin, which only an unsound library can give.

    Examples:
        >>> import marginflow as mf
        >>> data = mf.load("separable:n=20,d=6,margin=0.3")
        >>> model = mf.models.deep_linear(6, 1, seed=0).double()
        >>> attack = mf.attacks.ExactLinear(2, eps=0.1)
        >>> clean = mf.adversarial_margins(model, data.x, data.y)
        >>> attacked = mf.adversarial_margins(model, data.x, data.y, attack)
        >>> round(clean.normalized_min - attacked.normalized_min, 12)  # ε, for a linear predictor
        0.1
    """
    if certified is not None:
        check_attack(attack, certified)
    finite_examples("x", x)
    found = clean_and_adversarial(
        model,
        x,
        y,
        attack,
        batch_size=batch_size,
        loss=loss,
        homogeneity=homogeneity,
        normalize=normalize,
        seed=seed,
        engine=engine,
        clean=False,
    )[1]
    _check_finite(found)
    if certified is None or attack is None:
        return found
    return sandwiched(found, certified_margins(model, x, y, attack, method=certified), model)


def _check_finite(found: Margins) -> None:
    """Refuse margins that are no numbers, with the first example."""
    finite = torch.isfinite(found.values)
    if bool(finite.all()):
        return
    places = torch.nonzero(~finite).flatten().tolist()
    raise ModelError(
        f"expected finite margins, got {float(found.values[places[0]]):g} for {len(places)} of "
        f"{len(finite)} examples, the first of them x[{places[0]}]; check the weights, and evaluate "
        "the model there (float64 has more room)"
    )


def sandwiched(found: Margins, bounds: CertifiedMargins, model: nn.Module) -> Margins:
    """The attacked margins with their lower bounds, ``c_i ≤ m_i`` for each example.

    The attacked margins are rounded to the model's dtype, at inputs x + δ that are rounded too; a
    bound that is above them by no more than that rounding is lowered to them, which leaves it true.

    Args:
        found: the attacked margins.
        bounds: lower bounds of the same examples.
        model: the network of both; its dtype says how much was rounded.

    Raises:
        ModelError: a bound above its attacked margin by more.
    """
    like = next(model.parameters(), found.values)
    # Twice that of an evaluation: x + δ is rounded as well.
    share = torch.finfo(like.dtype).eps / torch.finfo(torch.float64).eps
    slack = bounds.rounding + 2 * share * bounds.evaluation
    excess = bounds.values - found.values
    if bool((excess > slack).any()):
        worst = int((excess - slack).argmax())
        raise ModelError(
            f"bounds: example {worst} has the attacked margin {float(found.values[worst]):.6g}, below "
            f"its bound {float(bounds.values[worst]):.6g} by {bounds.method}: the bound is wrong, or the "
            "network gives other outputs at each call; use certified='norms'"
        )
    values = torch.minimum(bounds.values, found.values)
    return replace(found, certified=replace(bounds, values=values, rho=found.rho))


def clean_and_adversarial(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack | None = None,
    *,
    batch_size: int = 1024,
    loss: str | Loss | None = None,
    homogeneity: Homogeneity | None = None,
    normalize: bool = True,
    seed: int = 0,
    engine: EngineName = "auto",
    clean: bool = True,
) -> tuple[Margins, Margins]:
    """The margins at x and at x + δ, in one pass: most attacks begin at x.

    Arguments and errors as for :func:`adversarial_margins`; with ``clean=False`` the first of
    the two is the second.

    Args:
        model: as for :func:`adversarial_margins`.
        x: examples, (n, …).
        y: labels, (n,).
        attack: the perturbation, or None.
        batch_size: examples per pass.
        loss: also compute ln L of this loss.
        homogeneity: the measured layers, if at hand.
        normalize: False skips the normalisation.
        seed: seed of a random start.
        engine: as for :func:`adversarial_margins`.
        clean: whether to measure at x too.
    """
    whole("batch_size", batch_size, least=1)
    seed = whole("seed", seed, least=0)
    instance("model", model, nn.Module, "a torch.nn.Module")
    check_examples(x, y)
    if attack is not None:
        instance(
            "attack", attack, Attack, "an attack (mf.attacks.build makes one of a specification)"
        )
    if normalize and homogeneity is None:
        homogeneity = measure_homogeneity(model, x)
    scorer = None if loss is None else get_loss(loss)
    rho, total, order, shift = None, None, None, 0.0
    if homogeneity is not None:
        rho = homogeneity.norm_product(model)
        if not _LEAST <= rho <= _MOST:
            raise ModelError(
                f"the product of the layer norms is {rho:g}; expected one between {_LEAST:g} and "
                f"{_MOST:g} (a layer is 0, not finite, or very small or large): scale the layers, which "
                "changes no normalised margin"
            )
        total, order = homogeneity.total_norm(model), homogeneity.order
        model, shift = within_range(model, homogeneity)
    like = next(iter(model.parameters()), x)
    generator = torch.Generator().manual_seed(seed)
    outputs_at = AttackedOutputs(model, attack, x.shape[1:], engine=engine)
    # One place for all results: small ones kept between the passes would keep the heap apart.
    both = torch.empty(2, len(x), dtype=torch.float64)
    scores = torch.empty(2, 0 if scorer is None else len(x), dtype=torch.float64)
    dead = torch.empty(len(x), dtype=torch.bool)
    with memory_watched("measuring margins", min(batch_size, len(x))):
        for start in range(0, x.shape[0], batch_size):
            # A copy: a model may work in place on what it is given.
            xb = x[start : start + batch_size].to(like, copy=True)
            yb = y[start : start + batch_size].to(like.device)
            if clean:
                before, after, still = outputs_at.with_clean(xb, yb, generator)
            else:
                after, still = outputs_at(xb, yb, generator)
                before = after
            part = slice(start, start + batch_size)
            dead[part] = still
            for k, outputs in enumerate((before, after) if clean else (after,)):
                if shift:
                    outputs = outputs.double() * 2.0**shift
                both[k, part] = margins_of(outputs, yb).double().cpu()
                if scorer is not None:
                    scores[k, part] = scorer.scores(outputs, yb).double().cpu()
    untouched = torch.zeros(x.shape[0], dtype=torch.bool)
    found = []
    for k, inert in enumerate((untouched, dead) if clean else (dead,)):
        log_loss = None if scorer is None else float(scorer.log_mean(scores[k]))
        found.append(Margins(both[k], rho, total, order, inert, log_loss))
    return found[0], found[-1]
