"""The matrices of a deep linear network.

Source: the deep linear networks of Section 3.1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from marginflow.errors import ModelError

# By their forward and not by their class: a subclass may add a skip connection.
_LINEAR_FORWARD = tuple(
    kind.forward for kind in (nn.Linear, nn.Sequential, nn.Flatten, nn.Identity)
)


def linear_layers(model: nn.Module) -> tuple[Tensor, ...]:
    """The matrices W_1, …, W_L of a deep linear network in float64, in the order of their use.

    Args:
        model: the network; biases and activations are refused.

    Returns:
        W_k of shape (outputs, inputs).

    Raises:
        ModelError: any other network: a bias, an activation, a convolution, shared weights,
            a subclass with a forward of its own.
    """
    matrices: list[Tensor] = []
    seen: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            if id(module.weight) in seen:
                raise ModelError(f"{name!r} shares its weights; expected layers with their own")
            seen.add(id(module.weight))
            if module.bias is not None:
                raise ModelError(f"{name!r} has a bias; expected a deep linear network")
            matrices.append(module.weight.detach().to("cpu", torch.float64))
        if type(module).forward not in _LINEAR_FORWARD:
            raise ModelError(
                f"expected a deep linear network (linear layers in sequence), "
                f"got {name or type(model).__name__!r} ({type(module).__name__})"
            )
    for below, above in pairwise(matrices):
        if below.shape[0] != above.shape[1]:
            raise ModelError("the shapes of the linear layers do not fit each other")
    if not matrices:
        raise ModelError("the model has no linear layer")
    return tuple(matrices)
