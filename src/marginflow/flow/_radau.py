"""scipy's Radau with Jacobians of low rank, factorised in the space in which they act."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import Radau  # noqa: TID253  this module is only imported where it is used
from scipy.linalg import lapack  # noqa: TID253

from marginflow.flow._chain import LowRank

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class _Identity:
    """I, or μI: what scipy multiplies by μ and subtracts the Jacobian from."""

    factor: complex = 1.0
    __array_ufunc__ = None  # numpy's numbers shall leave the arithmetic to this class

    def __rmul__(self, factor: complex) -> _Identity:
        return _Identity(factor * self.factor)

    def __sub__(self, jacobian: LowRank) -> tuple[complex, LowRank]:
        return self.factor, jacobian


class _Factors:
    """``(μI − P K Pᵀ)⁻¹ = (I − PPᵀ)/μ + P (μI − K)⁻¹ Pᵀ``."""

    def __init__(self, shift: complex, jacobian: LowRank) -> None:
        self.shift = shift
        self.basis = jacobian.basis
        system: NDArray[Any] = shift * np.eye(len(jacobian.core)) - jacobian.core
        split, self.solve_split = (
            (lapack.zgetrf, lapack.zgetrs)
            if np.iscomplexobj(system)
            else (lapack.dgetrf, lapack.dgetrs)
        )
        self.factors, self.pivots, _ = split(system, overwrite_a=True)

    def solve(self, b: NDArray[Any]) -> NDArray[Any]:
        within = _from_left(self.basis, b)
        solved, _ = self.solve_split(self.factors, self.pivots, within)
        found: NDArray[Any] = b / self.shift
        found += _onto(self.basis, solved - within / self.shift)
        return found


def _from_left(basis: Matrix, b: NDArray[Any]) -> NDArray[Any]:
    """``Pᵀ b`` without making P complex."""
    if np.iscomplexobj(b):
        parts = np.ascontiguousarray(b).view(np.float64).reshape(-1, 2).T @ basis
        found: NDArray[Any] = parts[0] + 1j * parts[1]
        return found
    within: NDArray[Any] = b @ basis
    return within


def _onto(basis: Matrix, c: NDArray[Any]) -> NDArray[Any]:
    """``P c`` without making P complex."""
    if np.iscomplexobj(c):
        parts = basis @ np.ascontiguousarray(c).view(np.float64).reshape(-1, 2)
        found: NDArray[Any] = parts[:, 0] + 1j * parts[:, 1]
        return found
    onto: NDArray[Any] = basis @ c
    return onto


class LowRankRadau(Radau):  # type: ignore[misc]  # scipy is untyped
    """Radau IIA of order 5 as in scipy, for ``jac(t, y) -> LowRank``.

    The same steps to rounding: only the solution of the linear systems differs, r³ + rN instead of N³.

    Args:
        fun: the right-hand side. t0, y0, t_bound: as in scipy.
        jac: the Jacobian. options: ``rtol``, ``atol``, ``first_step``.
    """

    def __init__(
        self,
        fun: Callable[[float, Matrix], Matrix],
        t0: float,
        y0: Matrix,
        t_bound: float,
        jac: Callable[[float, Matrix], LowRank],
        **options: Any,
    ) -> None:
        super().__init__(fun, t0, y0, t_bound, jac=jac, **options)
        self.lu = self._split
        self.solve_lu = _solve
        self.I = _Identity()

    def _validate_jac(
        self, jac: Callable[[float, Matrix], LowRank], sparsity: None
    ) -> tuple[Callable[..., LowRank], LowRank]:
        """Take the Jacobian as it is, where scipy would make an array of it."""

        def counted(t: float, y: Matrix, _: Matrix | None = None) -> LowRank:
            self.njev += 1
            return jac(t, y)

        return counted, counted(self.t, self.y)

    def _split(self, system: tuple[complex, LowRank]) -> _Factors:
        self.nlu += 1
        return _Factors(*system)


def _solve(factors: _Factors, b: NDArray[Any]) -> NDArray[Any]:
    return factors.solve(b)
