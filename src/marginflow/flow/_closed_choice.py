"""Which closed form serves a network, a loss and an attack, if any."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from marginflow.attacks import FGM, FGSM, PGD, Attack, Derivative, ExactLinear, FiniteSet
from marginflow.flow._closed import ClosedForm
from marginflow.flow._closed_fgm import FastGradient
from marginflow.flow._closed_held import Held
from marginflow.flow._closed_linear import Linear
from marginflow.flow._dense import dense_network
from marginflow.losses import Exponential, Logistic, Loss


def closed_form(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss,
    attack: Attack | None,
    derivative: Derivative,
) -> ClosedForm | None:
    """The closed form of ``ln L``, or None where there is none: other networks, losses, attacks.

    There is one for dense networks (:func:`~marginflow.flow._dense.dense_network`), the exponential
    and the logistic loss, and no attack, a finite set, FGM, FGSM, PGD by signs without a random start,
    the exact linear one; the inputs without bounds.
    """
    network = dense_network(model, x.shape[1:])
    if network is None or type(loss) not in (Exponential, Logistic):
        return None
    if x.dtype != torch.float64 or x.device.type != "cpu":
        return None
    logistic = type(loss) is Logistic
    data = x.detach().flatten(1).numpy()
    if data.shape[1] != network.shapes[0][1]:
        return None
    labels = y.double().numpy()
    if not (np.abs(labels) == 1).all():
        return None
    kind = type(attack)
    if attack is None:
        if network.linear:
            return Linear(network, data, labels, logistic, 2.0, 0.0)
        return Held(network, data, labels, logistic, None)
    if attack.bounds is not None or not attack.scale_invariant:
        return None
    if network.linear and kind in (ExactLinear, FGM, FGSM):
        return Linear(network, data, labels, logistic, attack.p, attack.eps)
    if kind is FGM:
        return FastGradient(network, data, labels, logistic, attack.eps, derivative == "total")
    signs = kind is PGD and attack.piecewise_constant and not attack.random
    if isinstance(attack, FiniteSet) and attack.deltas.shape[1:] != x.shape[1:]:
        return None
    if kind in (FGSM, FiniteSet) or signs:
        return Held(network, data, labels, logistic, attack)
    return None
