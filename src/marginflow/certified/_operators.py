"""Upper bounds of operator norms of linear maps: exact, or a sound estimate, never from below."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginflow.norms import dual_exponent

_UNIT = torch.finfo(torch.float64).eps / 2
_DENSE = 2**22  # entries up to which a matrix of its own is worth its singular values
_FREQUENCIES = 2**14

Powered = Callable[[Tensor, float], Tensor]
"""``(z, q) ↦ |A|^q z``: the map with the q-th powers of its entries' sizes in place of the entries."""


class Operator:
    """The norms of a linear map A, all rounded up.

    Args:
        powered: applies ``|A|^q`` (entry by entry) to a batch of inputs; q = 1 and others.
        largest: the largest ``|A_jk|``.
        shape: the shape of an input of A, without the batch.
        spectral: an upper bound of ``‖A‖₂`` if one is known, beside the general one.
        terms: the most terms in one of A's sums, which says how far its products may be rounded.
    """

    def __init__(
        self,
        powered: Powered,
        largest: float,
        shape: Sequence[int],
        *,
        spectral: Callable[[], float] | None = None,
        terms: int,
    ) -> None:
        self.powered = powered
        self.largest = largest
        self.shape = tuple(shape)
        self.terms = terms
        self._spectral = spectral
        self.norm = cache(self._norm)
        self._rows = cache(self._row_norms)
        self._columns = cache(self._column_norms)

    def _norm(self, r: float, s: float) -> float:
        """An upper bound of ``max ‖Az‖_s / ‖z‖_r``.

        Exact for r = 1 (the largest column) and for s = ∞ (the largest row); for r = s = 2 the
        largest singular value or Schur's ``√(‖A‖₁‖A‖_∞)``; otherwise ``‖(‖row_j‖_{r*})_j‖_s``,
        since ``|⟨row_j, z⟩| ≤ ‖row_j‖_{r*} ‖z‖_r``.
        """
        found = [float(torch.linalg.vector_norm(self._rows(dual_exponent(r)), ord=s))]
        if r == 1:
            found.append(float(self._columns(s).max()))
        if r == s == 2:
            found.append(math.sqrt(self.norm(1.0, 1.0) * self.norm(math.inf, math.inf)))
            if self._spectral is not None:
                found.append(self._spectral())
        size = math.prod(self.shape) + self.terms
        return min(found) * (1 + 16 * size * _UNIT)

    def _row_norms(self, q: float) -> Tensor:
        """``‖row_j‖_q`` (for q = ∞ a bound of it), flat."""
        ones = torch.ones(1, *self.shape, dtype=torch.float64)
        if math.isinf(q):
            return torch.full_like(self.powered(ones, 1.0), self.largest).flatten()
        # In units of the largest entry: high powers would leave the range of the numbers.
        return self.powered(ones, q).flatten() ** (1 / q)

    def _column_norms(self, s: float) -> Tensor:
        """``‖column_k‖_s`` (for s = ∞ a bound of it), flat: the transposed map at ones."""
        ones = torch.ones(1, *self.shape, dtype=torch.float64)
        if math.isinf(s):
            return torch.full_like(ones, self.largest).flatten()
        with torch.enable_grad():
            point = ones.requires_grad_()
            (total,) = torch.autograd.grad(self.powered(point, s).sum(), point)
        return total.flatten() ** (1 / s)


def of_matrix(W: Tensor) -> Operator:
    """The operator of a matrix (out, in)."""
    size = W.abs()
    return Operator(
        lambda z, q: F.linear(z, size**q),
        float(size.max()),
        W.shape[1:],
        spectral=(lambda: _spectral_of_matrix(W)) if W.numel() <= _DENSE else None,
        terms=W.shape[1],
    )


def of_convolution(module: nn.Conv1d | nn.Conv2d, shape: Sequence[int]) -> Operator:
    """The operator of a convolution with zero padding, at inputs (channels, …)."""
    K = module.weight.detach()
    size = K.abs()
    convolve: Callable[..., Tensor] = F.conv1d if K.ndim == 3 else F.conv2d
    rest = (module.stride, module.padding, module.dilation, module.groups)

    def spectral() -> float:
        inputs = math.prod(shape)
        if inputs * convolve(K.new_zeros(1, *shape), K, None, *rest).numel() > _DENSE // 4:
            return _spectral_of_kernel(module, shape)
        unit = torch.eye(inputs, dtype=K.dtype).reshape(-1, *shape)
        return _spectral_of_matrix(convolve(unit, K, None, *rest).flatten(1))

    return Operator(
        lambda z, q: convolve(z, size**q, None, *rest),
        float(size.max()),
        shape,
        spectral=spectral,
        terms=K[0].numel(),
    )


def _spectral_of_matrix(W: Tensor) -> float:
    # LAPACK's singular values are those of a matrix that differs by a few units per entry.
    return float(torch.linalg.matrix_norm(W, 2)) * (1 + 64 * max(W.shape) * _UNIT)


def _spectral_of_kernel(module: nn.Conv1d | nn.Conv2d, shape: Sequence[int]) -> float:
    """``max_ω ‖K̂(ω)‖₂`` on a torus that holds input and kernel side by side.

    There the circular convolution repeats the plain one without wrapping, so the matrix with zero padding
    and strides is a submatrix of it: its norm is no larger (Sedghi, Gupta & Long 2019).
    """
    K = module.weight.detach()
    spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    sides = [n + span - 1 for n, span in zip(shape[1:], spans, strict=True)]
    if math.prod(sides) > _FREQUENCIES:
        return math.inf
    spread = torch.zeros(*K.shape[:2], *spans, dtype=K.dtype)
    steps: list[Any] = [..., *(slice(None, None, d) for d in module.dilation)]
    spread[tuple(steps)] = K
    axes = tuple(range(2, K.ndim))
    found = 0.0
    for part in spread.chunk(module.groups):
        spectrum = torch.fft.fftn(part, s=sides, dim=axes).flatten(2).permute(2, 0, 1)
        found = max(found, float(torch.linalg.matrix_norm(spectrum, 2).max()))
    # The transform's error is far below this multiple of the kernel's whole size.
    slack = 64 * _UNIT * math.log2(2 + math.prod(sides)) * float(K.abs().sum())
    return found + slack


def of_average(pool: Callable[[Tensor], Tensor], count: int, shape: Sequence[int]) -> Operator:
    """The operator of means over ``count`` inputs each."""
    return Operator(lambda z, q: pool(z) * count ** (1.0 - q), 1.0 / count, shape, terms=count)
