"""Lower bounds of margins by auto-LiRPA: intervals (IBP) and linear relaxations (CROWN)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from marginflow.certified import _library
from marginflow.certified._magnitude import measure
from marginflow.errors import MarginflowError, ModelError

_UNIT = torch.finfo(torch.float64).eps / 2

LirpaMethod = Literal["crown", "interval"]


class LirpaBounds:
    """Margins' lower bounds of any network that the library can read.

    The differences ``f[y] − f[j]`` themselves are bounded, not the outputs one by one; ``crown`` is the
    better of both methods, which is ``crown`` but where kinks dominate.

    **Rounding.** With u = 2⁻⁵³, N the terms of all sums in the network together, k its kinks (activations and
    max-pools) and M the network of absolute values at ``|x| + ε``, the bound of a difference of outputs y and
    j is lowered by

        ``3^{k+1} (2N + 32(k + 1)) u (M_y + M_j)``.

    It covers a rounding of γ_N in every bound of a hidden unit. Such an error moves a relaxation by no more
    than itself, and the constant of a relaxation is no larger than the bounds that it is made of, so that
    from kink to kink errors and sizes at most triple.

    Args:
        model: the network in float64 and evaluation mode.
        x: an example batch; later batches have the same shape.
        p, eps: the ball; for p other than 1, 2 and ∞ and networks with convolutions the ball of the
            next larger of ℓ2, ℓ∞, which contains it.
        bounds: the range of inputs, used for p = ∞.
        method: ``crown`` or ``interval``.

    Raises:
        MissingDependencyError: the library is not installed.
        ModelError: a network that it cannot bound.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        p: float,
        eps: float,
        bounds: tuple[float, float] | None,
        method: LirpaMethod,
    ) -> None:
        self._library = _library.load()
        self.method = method
        self.eps = eps
        self.bounds = bounds
        self._model = _Columns(model).eval()
        outputs, self.counts = measure(self._model, x[:1], eps)
        self.outputs = outputs.shape[1]
        if self.counts.convolutions and p not in (1.0, 2.0, math.inf):
            p = 2.0 if p < 2 else math.inf
        if not math.isinf(p) and self.counts.direct is not None:
            # The library takes an ℓp ball to be a point wherever no linear layer comes first.
            raise ModelError(
                "bounds by auto-LiRPA: in an ℓp norm other than ℓ∞ expected a linear layer or convolution "
                f"at the inputs, got {self.counts.direct!r}"
            )
        self.p = p
        self._shape = x.shape
        self._read(x, patches=True)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lower bounds of m_i on the ball, the rounding in them and in m_i itself, (n,) each.

        Args:
            x: examples in float64, no more than at first.
            y: labels.
        """
        n = len(x)
        spare = self._shape[0] - n
        if spare:  # a traced network may hold on to the number of examples
            x = torch.cat([x, x[-1:].expand(spare, *x.shape[1:])])
            y = torch.cat([y, y[-1:].expand(spare)])
        C = self._differences(y)
        try:
            found = self._ask(lambda: self._bounds(x, C))
        except ModelError:
            if not self._patches or not self.counts.convolutions:
                raise
            # Release 0.3 cannot carry patches through some max-pools; matrices it can.
            self._read(x, patches=False)
            found = self._ask(lambda: self._bounds(x, C))
        sizes, counts = measure(self._model, x, self.eps)
        share = 3.0 ** (counts.kinks + 1) * (2 * counts.terms + 32 * (counts.kinks + 1)) * _UNIT
        sizes = (C.abs() @ sizes.unsqueeze(2)).squeeze(2)
        least, worst = (found - share * sizes).min(dim=1)
        if bool(least.isnan().any()):
            raise ModelError("bounds by auto-LiRPA: got NaN; are all weights and inputs finite?")
        there = sizes.gather(1, worst.unsqueeze(1)).squeeze(1)[:n]
        plain = (counts.terms + 4) * _UNIT * sizes.amax(dim=1)[:n]
        return least[:n], share * there, plain

    def _read(self, x: Tensor, *, patches: bool) -> None:
        self._patches = patches
        self._bounded = self._ask(
            lambda: _library.bounded_module(self._library, self._model, x, patches=patches)
        )

    def _differences(self, y: Tensor) -> Tensor:
        """C with ``C f`` the margins against each other class: (n, C − 1, C), or (n, 1, 1)."""
        if self.outputs == 1:
            return y.double().reshape(-1, 1, 1)
        unit = torch.eye(self.outputs, dtype=torch.float64)
        others = torch.stack([unit[torch.arange(len(unit)) != k] for k in range(len(unit))])
        return unit[y].unsqueeze(1) - others[y]

    def _bounds(self, x: Tensor, C: Tensor) -> Tensor:
        """Lower bounds of ``C f(x + δ)``, (n, specifications)."""
        low = high = None
        if math.isinf(self.p) and self.bounds is not None:
            low = (x - self.eps).clamp(min=self.bounds[0])
            high = (x + self.eps).clamp(max=self.bounds[1])
        with _library.computing():
            ball = self._library.PerturbationLpNorm(norm=self.p, eps=self.eps, x_L=low, x_U=high)
            point = self._library.BoundedTensor(x, ball)
            # A graph misread would show here, and its bounds would be another network's.
            if not torch.allclose(self._bounded(x), self._model(x), rtol=1e-8, atol=1e-10):
                raise ModelError("bounds by auto-LiRPA: it reads another network than the model")
            found: Tensor = self._bounded.compute_bounds(x=(point,), C=C, method="IBP")[0]
            if self.method == "crown":
                linear = self._bounded.compute_bounds(
                    x=(point,), C=C, method="CROWN", bound_upper=False
                )[0]
                found = torch.maximum(found, linear)
        return found.detach().reshape(C.shape[:2])

    def _ask(self, job: Callable[[], Any]) -> Any:
        """What the library answers; its own complaints, which are of many kinds, as ours."""
        try:
            return job()
        except (MarginflowError, MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise ModelError(
                f"auto-LiRPA {_library.version()} cannot bound this network: "
                f"{type(error).__name__}: {error}; use method='norms'"
            ) from error


class _Columns(nn.Module):
    """The model with outputs (n, C): one output (n,) as (n, 1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The outputs, (n, C)."""
        outputs: Tensor = self.model(x)
        return outputs.unsqueeze(1) if outputs.ndim == 1 else outputs
