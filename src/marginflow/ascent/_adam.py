"""Adam as a step by signs with a memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from marginflow._checks import real
from marginflow.ascent._geometry import Entrywise, require_some
from marginflow.errors import InputError


class Adam(Entrywise):
    """Adam without its stability constant, in the norm that it tends to: ``max |w|``.

    The direction is ``m̂/√v̂`` of the gradients seen so far, and so depends on their order: every call
    of :meth:`direction` counts as a step. Without memory (β₁ = β₂ = 0) it is sgn(G). With it
    neither ‖V‖ ≤ 1 nor ``⟨V, G⟩ = ‖G‖_*`` holds, so nothing is claimed about the margin on the way;
    Adam's limit on separable data maximises the ℓ∞ margin (Zhang, Zou & Cao 2024). A gradient of ln L
    rather than of L keeps it from shrinking faster than v̂ forgets.

    Args:
        betas: β₁ and β₂, in [0, 1).

    Raises:
        InputError: a memory that is no number in [0, 1).
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(math.inf, "adam")
        first, second = (real("betas", beta, least=0.0) for beta in betas)
        if not max(first, second) < 1:
            raise InputError(f"betas: expected two numbers in [0, 1), got {betas}")
        self.betas = (first, second)
        self._state: dict[str, list[Tensor]] = {}

    def direction(self, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``m̂/√v̂`` after these gradients, by the function behind torch.optim.Adam.

        In float64: v̂ of a gradient of 1e-30 is no number in float32.

        Args:
            gradients: one tensor a layer, of any shape.

        Returns:
            one tensor a layer, each of its gradient's shape.

        Raises:
            InputError: no gradients.
        """
        require_some(gradients)
        wide = [g.detach().double() for g in gradients]
        if not self._state:
            self._state = {
                "mean": [torch.zeros_like(g) for g in wide],
                "square": [torch.zeros_like(g) for g in wide],
                "count": [torch.zeros((), dtype=torch.float32) for _ in wide],
            }
        found = [torch.zeros_like(g) for g in wide]
        # An Adam object would import torch's compiler, which takes most of a second and is not used.
        adam(
            found,
            wide,
            self._state["mean"],
            self._state["square"],
            [],
            self._state["count"],
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=1.0,
            weight_decay=0.0,
            eps=1e-140,  # 0/0 only: what is never touched does not move
            maximize=True,
        )
        return tuple(v.to(g.dtype) for v, g in zip(found, gradients, strict=True))

    def state(self) -> dict[str, Tensor]:
        """A copy of the memory, for a checkpoint; empty before the first step.

        Returns:
            the averages by name, each of the shape of its gradient.
        """
        return {
            f"{kind}.{index}": value.clone()
            for kind, values in self._state.items()
            for index, value in enumerate(values)
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state``.

        Args:
            state: what :meth:`state` gave, each tensor of the same shape.
        """
        self._state = {}
        for kind in ("mean", "square", "count") if state else ():
            count = sum(name.startswith(f"{kind}.") for name in state)
            self._state[kind] = [state[f"{kind}.{index}"].clone() for index in range(count)]
