"""Norms on the weights, their duals and directions of steepest ascent.

Steepest descent in a norm moves along ``argmin_{‖V‖ ≤ 1} ⟨V, G⟩``; which max-margin problem it is
biased towards depends on the norm (Tsilivis, Gronich, Vardi & Kempe 2025, arXiv:2410.22069).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from marginflow.errors import InputError
from marginflow.homogeneity import power
from marginflow.norms import dual_exponent, dual_vector, per_example_norm

_SAFE = (1e-140, 1e140)  # norms whose squares are numbers


class Geometry(ABC):
    """A norm on all weights together, given as a sequence of tensors, one a parameter.

    Nothing is assumed of the network: with ``f(x; aW) = a^K f(x; W)``, ``m_i/‖W‖^K`` does not
    change when all of W is multiplied by a > 0, in any norm, with equal or unequal degrees c_k,
    ``K = Σ c_k``.

    Attributes:
        name: what :func:`get_geometry` calls it.
    """

    name: str

    @abstractmethod
    def norm(self, weights: Sequence[Tensor]) -> float:
        """``‖W‖``, accumulated in float64.

        Args:
            weights: one tensor a layer, of any shape.
        """

    @abstractmethod
    def dual_norm(self, gradients: Sequence[Tensor]) -> float:
        """``‖G‖_* = max_{‖V‖ ≤ 1} ⟨V, G⟩``, accumulated in float64.

        Args:
            gradients: one tensor a layer, of any shape.
        """

    @abstractmethod
    def direction(self, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The direction of steepest *ascent*, ``argmax_{‖V‖ ≤ 1} ⟨V, G⟩``, in the shapes of G.

        ``⟨V, G⟩ = ‖G‖_*`` and ``‖V‖ = 1``, both to rounding. Where many V do, the one that does not move
        what G does not touch (0 where G = 0). It does not change when G is multiplied by a power of two.

        Args:
            gradients: one tensor a layer, of any shape.
        """

    def normalized_margin(self, weights: Sequence[Tensor], margin: float, order: float) -> float:
        """``m/‖W‖^K``, the margin in this norm.

        ``sign`` and ``spectral`` are maxima over the layers. A layer below the maximum can be
        multiplied until it reaches it, which only raises a positive margin: the best value over all W is
        that of ``m/Π ‖W_k‖^{c_k}`` as well, and is attained with all ‖W_k‖ equal. For ``l2`` it is
        attained with ``‖W_k‖_F² ∝ c_k``.

        Args:
            weights: W, one tensor a layer, of any shape.
            margin: m, as a rule ``min_i m_i``.
            order: K.

        Raises:
            InputError: W = 0.
        """
        size = self.norm(weights)
        if size == 0:
            raise InputError("expected weights that are not all 0, whose margin can be normalised")
        return margin / power(size, order)


class Entrywise(Geometry):
    """``‖W‖_p`` over all entries: p = 2 is gradient, ∞ sign and 1 coordinate descent.

    The dual norm is ‖G‖_q, 1/p + 1/q = 1; the direction ``sgn(G) |G|^{q−1}/‖G‖_q^{q−1}``.

    Args:
        p: the exponent, in [1, ∞].
        name: what it is called.
    """

    def __init__(self, p: float, name: str) -> None:
        self.p = p
        self.name = name

    def norm(self, weights: Sequence[Tensor]) -> float:
        """The norm of all weights, ``‖W‖_p``.

        Raises:
            InputError: no weights.
        """
        return _entrywise_norm(weights, self.p)

    def dual_norm(self, gradients: Sequence[Tensor]) -> float:
        """The dual norm of all gradients, ``‖G‖_q``.

        Raises:
            InputError: no gradients.
        """
        return _entrywise_norm(gradients, dual_exponent(self.p))

    def direction(self, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``sgn(G) |G|^{q−1}/‖G‖_q^{q−1}``; p = ∞: ``sgn(G)``, with sgn(0) = 0."""
        require_some(gradients)
        if math.isinf(self.p):
            return tuple(torch.sgn(g.detach()) for g in gradients)
        whole = torch.cat([g.detach().reshape(-1) for g in gradients])
        found = dual_vector(whole.unsqueeze(0), self.p).squeeze(0)
        parts = torch.split(found, [g.numel() for g in gradients])
        return tuple(part.reshape(g.shape) for part, g in zip(parts, gradients, strict=True))


class Spectral(Geometry):
    """``max_k ‖W_k‖₂``, the largest singular value of any parameter; dual: the sum of nuclear norms.

    A convolution kernel counts as the matrix (outputs, all the rest), a vector as one of a single row:
    its ℓ2 norm. The direction is ``U Vᵀ`` of ``G_k = U S Vᵀ`` in each parameter (without its rounding:
    singular values up to ``max(shape) · eps`` of the largest count as 0).

    By LAPACK's singular value decomposition. The Newton–Schulz iteration of Muon (torch.optim has it
    too) stops at singular values between 0.7 and 1.2, so that neither ‖V‖ = 1 nor ⟨V, G⟩ = ‖G‖_*
    holds; carried on until they do it takes longer than the decomposition.
    """

    name = "spectral"

    def norm(self, weights: Sequence[Tensor]) -> float:
        """``max_k ‖W_k‖₂``."""
        require_some(weights)
        return max(_largest_singular_value(_matrix(w)) for w in weights)

    def dual_norm(self, gradients: Sequence[Tensor]) -> float:
        """``Σ_k ‖G_k‖_nuclear``."""
        require_some(gradients)
        return sum(float(torch.linalg.svdvals(_matrix(g).double()).sum()) for g in gradients)

    def direction(self, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``U_k V_kᵀ``."""
        require_some(gradients)
        return tuple(_polar(_matrix(g)).reshape(g.shape).to(g.dtype) for g in gradients)


def require_some(tensors: Sequence[Tensor]) -> None:
    """Refuse an empty sequence."""
    if not tensors:
        raise InputError("expected at least one tensor, got none")


def _entrywise_norm(tensors: Sequence[Tensor], p: float) -> float:
    require_some(tensors)
    rows = [t.detach().reshape(1, -1) for t in tensors if t.numel()]
    size = _norm_of_norms(rows, p)
    if not _SAFE[0] < size < _SAFE[1]:
        # Squares may not be numbers: in units of the largest entry.
        peak = _norm_of_norms(rows, math.inf)
        if 0 < peak < math.inf:
            size = peak * _norm_of_norms([row.double() / peak for row in rows], p)
    return size


def _norm_of_norms(rows: Sequence[Tensor], p: float) -> float:
    parts = [per_example_norm(row, p) for row in rows]
    return float(per_example_norm(torch.cat(parts).unsqueeze(0), p)) if parts else 0.0


def _matrix(t: Tensor) -> Tensor:
    """A parameter as a matrix (outputs, all the rest); a vector as one row."""
    t = t.detach()
    return t.reshape(1, -1) if t.ndim < 2 else t.flatten(1)


def _largest_singular_value(m: Tensor) -> float:
    """``‖M‖₂`` from the smaller Gram matrix, as accurate as by singular values, and three times faster."""
    size = float(m.abs().max()) if m.numel() else 0.0
    if size == 0 or not math.isfinite(size):
        return size
    unit = m.double() / size
    gram = unit @ unit.T if m.shape[0] <= m.shape[1] else unit.T @ unit
    return size * math.sqrt(float(torch.linalg.eigvalsh(gram)[-1]))


def _polar(m: Tensor) -> Tensor:
    """``U Vᵀ`` of the singular vectors that belong to singular values above rounding."""
    wide = m if m.dtype in (torch.float32, torch.float64) else m.float()
    size = wide.abs().max() if wide.numel() else wide.new_zeros(())
    if not bool(size > 0):
        return torch.zeros_like(wide)
    # A power of two: nothing under- or overflows, and no bit of the result depends on the scale.
    _, exponent = torch.frexp(size)
    half = torch.div(-exponent, 2, rounding_mode="floor")
    unit = wide * torch.exp2(half.to(wide.dtype)) * torch.exp2((-exponent - half).to(wide.dtype))
    u, s, vh = torch.linalg.svd(unit, full_matrices=False)
    kept = s > s[0] * max(m.shape) * torch.finfo(wide.dtype).eps
    direction: Tensor = u[:, kept] @ vh[kept]
    return direction
