"""Perturbations made of signs where a sign is not determined: both attain the margin.

``δ_j = −ε sgn(∂m/∂x_j)`` has no sign where the derivative is 0. Margin maximisers love such places: under
ℓ∞ the problem of Appendix B.5 is ``min ‖w‖₂`` with a penalty ``ε‖w‖₁``, whose solutions are sparse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from marginflow.attacks import Attack

TIE = 1e-9
"""Margins within this share of each other count as equal: far above rounding, far below any gap
that training leaves by chance. So does a pre-activation within this share of its layer's largest
count as 0, and likewise a coordinate of an input gradient."""

# A perturbation with k undetermined signs has 2^k pieces.
_MOST_SIGNS = 8


def tied_perturbations(
    attack: Attack, clean: Tensor, perturbed: Tensor, gradients: tuple[Tensor, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The perturbed examples for each choice of the undetermined signs.

    ℓ∞: the sign of each coordinate in which ``∇_x m`` is 0 but does depend on the weights; of more than
    eight, those that depend most. ℓ1: each of the tied largest coordinates alone.

    Args:
        attack: FGSM, or ExactLinear with ℓ1 or ℓ∞.
        clean: x, (r, …).
        perturbed: x + δ, (r, …).
        gradients: ``∇_x m`` and its derivative along some direction of the weights, (r, …) each.

    Yields:
        perturbed examples, (r, …), and the rows that these are a choice for, (r,) bool.
    """
    g, moved = (t.flatten(1) for t in gradients)
    size = g.abs()
    largest = size.amax(dim=1, keepdim=True)
    change = moved.abs()
    if math.isinf(attack.p):
        tied = (size <= TIE * largest) & (change > TIE * change.amax(dim=1, keepdim=True))
        most, plain = _MOST_SIGNS, 0
    else:
        tied = (size >= (1 - TIE) * largest) & (largest > 0)
        most, plain = g.shape[1], 1
    numbers = tied.sum(dim=1).clamp(max=most)
    yield perturbed, numbers <= plain
    count = int(numbers.max())
    if count <= plain:
        return
    ranked = torch.argsort(torch.where(tied, change, -1.0), dim=1, descending=True, stable=True)
    ranked = ranked[:, :count]
    if math.isinf(attack.p):
        for taken in product((1.0, -1.0), repeat=count):
            signs = g.new_tensor(taken)
            # Signs beyond a row's own number stay +1: no choice comes twice.
            held = torch.arange(count, device=g.device) < numbers.unsqueeze(1)
            meant = (numbers > 0) & (held | (signs > 0)).all(dim=1)
            z = perturbed.flatten(1)
            moved_to = clean.flatten(1).gather(1, ranked) + attack.eps * signs
            z = z.scatter(1, ranked, torch.where(held, moved_to, z.gather(1, ranked)))
            yield _admitted(attack, z).view_as(clean), meant
        return
    for k in range(count):
        j = ranked[:, k : k + 1]
        step = -attack.eps * g.gather(1, j).sign()
        z = clean.flatten(1)
        yield z.scatter_add(1, j, step).view_as(clean), (numbers > 1) & (k < numbers)


def _admitted(attack: Attack, z: Tensor) -> Tensor:
    return z if attack.bounds is None else z.clamp(*attack.bounds)
