"""Which engine serves a training.

Source: marginflow.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from torch import nn

from marginflow._checks import choice
from marginflow.attacks import Attack, Derivative
from marginflow.distributed import current, first
from marginflow.engine._autograd import AutogradEngine
from marginflow.engine._base import Engine
from marginflow.engine._dense import DenseNetwork
from marginflow.engine._fused import FusedEngine, PerturbationPrecision, refusal
from marginflow.engine._parallel import divided
from marginflow.engine._products import Products, choose_products
from marginflow.errors import InputError
from marginflow.losses import Loss

EngineName = Literal["auto", "autograd", "fused"]
"""``fused``: explicit products, dense networks only. ``auto``: fused where it applies."""

_VARIABLE = "MARGINFLOW_ENGINE"


def build(
    model: nn.Module,
    loss: Loss,
    attack: Attack | None,
    derivative: Derivative = "detached",
    *,
    shape: Sequence[int],
    batch_size: int,
    engine: EngineName = "auto",
    products: Products | None = None,
    perturbation_precision: PerturbationPrecision = "float32",
    shards: int | None = None,
) -> Engine:
    """The engine for a training; that of all processes where several work together.

    Args:
        model: the network.
        loss: the loss ℓ.
        attack: δ, or None.
        derivative: ``detached`` or ``total``.
        shape: the shape of an example.
        batch_size: examples in a batch.
        engine: ``auto``, ``autograd`` or ``fused``. The environment variable
            ``MARGINFLOW_ENGINE`` says what ``auto`` means, by default fused where it applies.
        products: which library multiplies; None chooses by a short timing.
        perturbation_precision: ``float32`` or ``bf16``, which only the fused engine offers.
        shards: parts of a batch whose gradients are added; see :class:`ParallelEngine`.

    Raises:
        SpecificationError: an unknown name.
        ModelError: ``fused`` where it does not apply.
        InputError: bf16 where the engine is autograd.
    """
    team = current()

    def choose(network: DenseNetwork) -> Products:
        # Of all processes' rows: the choice is that of one process, and with it the bits.
        return choose_products(max(network.weights, key=lambda w: w.numel()), batch_size)

    choice("engine", engine, ("auto", "autograd", "fused"))
    choice("perturbation_precision", perturbation_precision, ("float32", "bf16"))
    reason = refusal(model, attack, derivative, shape)
    if engine == "auto":
        engine = auto_engine() if reason is None else "autograd"
    if engine == "autograd":
        if perturbation_precision != "float32":
            raise InputError(
                "perturbation_precision: bf16 needs the fused engine"
                + (f": {reason}" if reason else ", got engine='autograd'")
            )
        own: Engine = AutogradEngine(model, loss, attack, derivative)
        return divided(own, team, shape, batch_size, shards)
    if products is None:
        network = DenseNetwork.of(model, shape)
        products = "default" if network is None else first(choose)(network)
    own = FusedEngine(
        model,
        loss,
        attack,
        derivative,
        shape=shape,
        products=products,
        perturbation_precision=perturbation_precision,
    )
    return divided(own, team, shape, batch_size, shards)


def auto_engine() -> Literal["autograd", "fused"]:
    """What ``auto`` means for a dense network: ``MARGINFLOW_ENGINE``, or fused.

    Raises:
        SpecificationError: the variable holds anything else.
    """
    named = os.environ.get(_VARIABLE) or "fused"
    return "autograd" if choice(_VARIABLE, named, ("autograd", "fused")) == "autograd" else "fused"
