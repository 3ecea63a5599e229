"""The relative KKT residual where signs of the perturbation are all but undetermined.

``δ_j = −ε sgn(∂m/∂x_j)`` jumps where the derivative is 0, and margin maximisation under ℓ∞ leads there,
as the lasso does: a step to either side turns the sign. The gradients ∂m_i/∂W at W alone, with the sign
that it happens to have, then say little about stationarity; those with either sign belong together
(Clarke's subdifferential, by Goldstein's neighbourhood).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

import marginflow as mf


class FreeSigns(NamedTuple):
    """The residual with further pieces.

    Attributes:
        share: of the coordinates, those with ``|∂m/∂x_j| ≤ θ max_j |∂m/∂x_j|``.
        pieces: the gradients that the multipliers are put on.
        above: the largest margin of a piece, over the largest of the support.
        residual: r with the best multipliers on all of them.
    """

    share: float
    pieces: int
    above: float
    residual: float


def residual_with_free_signs(
    model: nn.Module,
    data: mf.Dataset,
    attack: mf.attacks.Attack,
    *,
    window: float,
    theta: float,
    draws: int = 5,
    seed: int = 0,
) -> FreeSigns:
    """The residual on examples with ``m_i ≤ (1 + window) m_min``, with random signs where they are free.

    Args:
        model: the network.
        data: the training set.
        attack: FGSM.
        window: τ.
        theta: coordinates whose derivative is at most this share of the largest are free.
        draws: perturbations beside the attack's own, for each example.
        seed: of the signs.
    """
    margins = mf.adversarial_margins(model, data.x, data.y, attack)
    support = torch.nonzero(margins.values <= (1 + window) * margins.min).squeeze(1)
    x, y = data.x[support], data.y[support]
    like = next(model.parameters())
    z = x.to(like).detach().requires_grad_()
    (slopes,) = torch.autograd.grad((model(z).flatten() * y.to(like)).sum(), z)
    size = slopes.abs().flatten(1)
    free = (size <= theta * size.amax(dim=1, keepdim=True)).view_as(slopes)
    own = -attack.eps * slopes.sign()
    generator = torch.Generator().manual_seed(seed)
    pieces = [z.detach() + own]
    for _ in range(draws if theta > 0 else 0):
        signs = torch.rand(slopes.shape, generator=generator).to(like).sub(0.5).sign() * attack.eps
        pieces.append(z.detach() + torch.where(free, signs, own))
    inputs, labels = torch.cat(pieces), y.repeat(len(pieces))
    reached = mf.adversarial_margins(model, inputs, labels).values
    certificate = mf.kkt_certificate(model, inputs, labels, tau=math.inf, max_support=len(inputs))
    return FreeSigns(
        float(free.double().mean()),
        len(inputs),
        float(reached.max() / margins.values[support].max()),
        certificate.residual,
    )
