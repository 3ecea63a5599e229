"""The linear pieces of ReLU-like activations: what the network is on either side of a kink.

Where a pre-activation u is 0 the network has no gradient but Clarke's subdifferential, the convex hull
of the gradients with the unit's slope taken from one side or the other. Minimisers of ``½‖W‖²``
under margin constraints love such places: a unit that lowers a margin is cheapest just silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_FORWARD = (nn.ReLU.forward, nn.LeakyReLU.forward)


@dataclass
class Units:
    """What the dense ReLU-like activations met in one evaluation, in the order of their calls.

    Attributes:
        before: the pre-activations u of each call, (r, units).
        after: the activations, likewise.
        slopes: the slope for u < 0 of each call.
    """

    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)

    @property
    def u(self) -> Tensor:
        """All pre-activations, (r, all units)."""
        return torch.cat(self.before, dim=1)


class Kinks:
    """The ``nn.ReLU`` and ``nn.LeakyReLU`` modules of a network, observed where they meet (r, units).

    Convolutional activations are left alone: patches of zeros sit at a kink that no weight moves.

    Args:
        model: a network of our own; its activations no longer work in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        for module in model.modules():
            if type(module).forward in _FORWARD:
                module.inplace = False  # type: ignore[assignment]
                self.modules.append(module)

    @contextmanager
    def observed(self, sides: Tensor | None = None, fixed: Tensor | None = None) -> Iterator[Units]:
        """Record the units inside the block, with some of them replaced by a linear piece.

        Args:
            sides: (r, all units) bool, the side of each unit: ``u`` itself or ``slope · u``; or shares in
                [0, 1] of the former, for autograd to differentiate by.
            fixed: (r, all units) bool, the units that this holds for; None is all.
        """
        met = Units()
        start = 0

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            nonlocal start
            if len(args) != 1 or args[0].ndim != 2:
                return None
            u, result = args[0], None
            if sides is not None:
                part = slice(start, start + u.shape[1])
                share = sides[:, part]
                if share.dtype == torch.bool:
                    piece = torch.where(share, u, slope(module) * u)
                else:
                    piece = (share + (1 - share) * slope(module)) * u
                output = piece if fixed is None else torch.where(fixed[:, part], piece, output)
                result = output
            start += u.shape[1]
            met.before.append(u)
            met.after.append(output)
            met.slopes.append(slope(module))
            return result

        handles = [module.register_forward_hook(hook) for module in self.modules]
        try:
            yield met
        finally:
            for handle in handles:
                handle.remove()


def slope(module: nn.Module) -> float:
    """The slope for u < 0."""
    return module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.0
