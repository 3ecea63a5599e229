"""The largest margin of one linear layer, clean or under ℓp attack, with a proof of how large."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from marginflow._checks import choice, real, whole
from marginflow.ascent._linear_methods import Found, dual_acceleration, normalized_descent
from marginflow.ascent._linear_result import LinearMaximum, LinearPoint
from marginflow.attacks import FGM, FGSM, PGD, Attack, ExactLinear
from marginflow.datasets import Dataset
from marginflow.errors import DataError, InputError
from marginflow.norms import as_exponent, norm_name, per_example_norm
from marginflow.training import log_spaced

METHODS = ("dual", "normalized")
# In units of the largest ‖x_i‖₂: a bound below this is not told from zero.
_NEGLIGIBLE = 1e-12
# The last digits of a recursion's running sums are not those of the sums computed anew.
_STRICTER = 0.99


def maximize_linear(
    x: Any,
    y: Any,
    *,
    eps: float = 0.0,
    p: float | str = 2.0,
    method: str = "dual",
    adaptive: bool = True,
    steps: int = 10_000,
    gap: float = 1e-6,
    step_size: float = 1.0,
) -> LinearMaximum:
    """Maximise the (adversarial) margin of ``f(x) = <w, x>`` until a duality gap proves it done.

        γ(w) = (min_i y_i <w, x_i> − ε‖w‖_q)/‖w‖₂,   1/p + 1/q = 1;   γ* = max_w γ(w),

    the margin at the exact worst ℓp perturbations. If γ* > 0 it is the distance from the hull of the
    ``y_i x_i`` to the ball ``‖δ‖_p <= ε``, so any multipliers and any perturbation give an upper bound;
    each method makes its own, and no solver is asked.

    ``method="dual"`` is the dual acceleration of Ji, Srebro & Telgarsky (2021), extended to ℓp
    attacks; ``"normalized"`` is normalised gradient descent on ln L, the exponential loss at the worst
    perturbations. With R = max_i ‖x_i‖₂, both for ``step_size=1``, after t steps:

    | method | guarantee on bound² − margin² |
    |---|---|
    | dual, ``adaptive=False`` (the published recursion), any p and ε | ``8 R² ln n/(t(t + 3))`` |
    | dual, ``adaptive=True`` | linear for p = 1, ∞ or ε = 0, the factor unknown; seen for all p |
    | normalized, ε = 0 (under attack: seen, not proven) | ``2 R² ln n/t`` |

    The gap is that divided by ``bound + margin``. ``_linear_methods.py`` derives both.

    Runs in float64 on the device of x (tested on the CPU). The steps do not depend on the scale of x.

    Args:
        x: examples, shape (n, …).
        y: labels −1 and +1, shape (n,).
        eps: ε >= 0, in the units of x.
        p: exponent of the perturbations' norm, in [1, ∞], or ``"l2"``, ``"linf"`` ….
        method: ``dual`` or ``normalized``.
        adaptive: restart the dual acceleration from the best multipliers each time bound² − margin²
            has fallen to a fifth, and take longer steps while they are admissible. False gives the
            published recursion. Without effect on ``normalized``.
        steps: at most so many.
        gap: stop when bound − margin is at most this share of the bound; 0 takes all steps
            unless the two meet.
        step_size: θ or η in units of 1/R². Certificates hold for any; guarantees up to 1.

    Returns:
        A value in every case: data that cannot be separated under ε (``separable``), and a gap not
        reached (``converged``), come with ``advice``.

    Raises:
        DataError: shapes, NaN, infinity, or labels other than −1 and +1.
        InputError: eps < 0, p < 1, or another argument out of range.
        SpecificationError: an unknown method or norm.
    """
    eps, p = real("eps", eps, least=0.0), as_exponent(p)
    choice("method", method, METHODS)
    steps, gap = whole("steps", steps, least=1), real("gap", gap, least=0.0)
    step_size = real("step_size", step_size, above=0.0)
    z = _signed(x, y)
    peak = float(z.abs().max())  # taken out first: the squares of 1e-200 are 0
    scale = peak * float(torch.linalg.vector_norm(z / peak, dim=1).max()) if peak > 0.0 else 1.0

    found = Found(z / scale, eps / scale, p)
    _try_single_examples(found)
    recursion = (
        dual_acceleration(found, step_size, adaptive)
        if method == "dual"
        else normalized_descent(found, step_size)
    )
    moments, path = log_spaced(steps), []
    for step in range(steps + 1):
        next(recursion)
        done = found.bound <= _NEGLIGIBLE or (
            found.margin > 0.0 and found.bound - found.margin <= _STRICTER * gap * found.bound
        )
        if (step in moments or done) and found.margin > -math.inf:
            path.append(LinearPoint(step, found.margin * scale, found.bound * scale))
        if done:
            break
    return _result(found, scale, gap, step, tuple(path), method, eps)


def exact_budget(attack: Attack | None) -> tuple[float, float]:
    """``(eps, p)`` for :func:`maximize_linear` that mean the given attack on a linear predictor.

    There the gradient of the margin is the same everywhere, so FGM and FGSM are the exact ℓ2 and ℓ∞
    attacks (Eqs. 10 and 139), and so is PGD whose steps, from 0, reach the boundary. None is ε = 0.

    Args:
        attack: the attack, or None.

    Raises:
        InputError: an attack that is not exact there: another kind, pixel bounds, the objective
            ``loss``, a random start, or steps too short.
    """
    if attack is None:
        return 0.0, 2.0
    reaches = not isinstance(attack, PGD) or (
        not attack.random and attack.steps * attack.step_size >= attack.eps
    )
    known = isinstance(attack, ExactLinear | FGM | FGSM | PGD)
    if not (known and reaches and attack.bounds is None and attack.objective == "margin"):
        raise InputError(
            f"attack: expected one that is exact on a linear predictor, got {attack.spec}; use "
            f"ExactLinear(p={attack.p:g}, eps={attack.eps:g})"
        )
    return attack.eps, attack.p


def _signed(x: Any, y: Any) -> Tensor:
    """``y_i x_i``, shape (n, d), float64."""
    data = Dataset(x, y)
    if not data.binary:
        raise DataError(
            f"y: expected labels -1 and +1, got labels from {int(data.y.min())} to "
            f"{int(data.y.max())}; map the two classes to -1 and +1"
        )
    return data.x.double().flatten(1) * data.y.double()[:, None]


def _try_single_examples(found: Found) -> None:
    """An example that a perturbation takes to the origin proves at once that γ* <= 0."""
    sizes = per_example_norm(found.z, found.p)
    if float(sizes.min()) <= found.eps:
        least = int(sizes.argmin())
        alpha = torch.zeros_like(sizes)
        alpha[least] = 1.0
        found.offer_multipliers(alpha, found.z[least])


def _result(
    found: Found,
    scale: float,
    gap: float,
    steps: int,
    path: tuple[LinearPoint, ...],
    method: str,
    eps: float,
) -> LinearMaximum:
    """Both sides computed anew from the weights and the multipliers, in the units of x."""
    alpha = found.alpha / found.alpha.sum()
    v = alpha @ found.z
    perturbation = found.nearest(v)
    bound = float(torch.linalg.vector_norm(v - perturbation))
    u = found.direction
    margin = found.margin_of(u, found.z @ u)
    separable = True if margin > 0.0 else False if bound <= _NEGLIGIBLE else None
    converged = margin > 0.0 and bound - margin <= gap * bound
    return LinearMaximum(
        method=method,
        eps=eps,
        p=found.p,
        direction=u,
        weights=u / (margin * scale) if margin > 0.0 else torch.zeros_like(u),
        margin=margin * scale,
        bound=bound * scale,
        multipliers=alpha,
        perturbation=perturbation * scale,
        steps=steps,
        converged=converged,
        separable=separable,
        path=path,
        advice="" if converged else _advice(found.p, eps, separable, bound, margin, scale, steps),
    )


def _advice(
    p: float,
    eps: float,
    separable: bool | None,
    bound: float,
    margin: float,
    scale: float,
    steps: int,
) -> str:
    attack = f"under {norm_name(p)} perturbations of eps = {eps:g}" if eps > 0.0 else "at eps = 0"
    smaller = "reduce eps" if eps > 0.0 else "no hyperplane through the origin will do"
    if separable is False:
        return (
            f"the data are not separable {attack}: no margin exceeds {bound * scale:.3g}; {smaller}"
        )
    if separable is None:
        return (
            f"no positive margin {attack} within {steps} steps, and none exceeds "
            f"{bound * scale:.3g}; take more steps, or {smaller}"
        )
    return (
        f"relative gap {(bound - margin) / bound:.1e} after {steps} steps {attack}; take more "
        "steps, use method='dual' with adaptive=True, or ask for a larger gap"
    )
