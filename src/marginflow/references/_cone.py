"""The door to cvxpy and Clarabel: lazy import, norm cones, and one patient solve."""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any

from marginflow.errors import MissingDependencyError

# Interior points end where the arithmetic ends: ask for all, then for less. "Almost solved" counts
# only when it is as good as the last rung.
_TOLERANCES = (1e-13, 1e-11, 1e-9, 1e-7)


def cvxpy() -> Any:
    """The module cvxpy, with Clarabel installed.

    Raises:
        MissingDependencyError: one of the two is not installed.
    """
    try:
        importlib.import_module("clarabel")
        return importlib.import_module("cvxpy")
    except ImportError as error:
        missing = (error.name or "cvxpy").partition(".")[0]
        raise MissingDependencyError(missing, "this convex oracle", extra="oracles") from error


def norm_bound(v: Any, p: float, size: int) -> tuple[list[Any], Any]:
    """Constraints, and an expression s, such that s >= ``‖v‖_p`` with equality attainable.

    For 1 < p < ∞ exactly (no rational approximation of p) by power cones:
    ``|v_j| <= r_j^{1/p} s^{1−1/p}`` and ``Σ r_j <= s``. For p = 2 these end closer to the optimum
    than Clarabel's second-order cone does (1e-13 against 1e-9 relative, measured).
    """
    cp = cvxpy()
    if p == 1.0:
        return [], cp.norm1(v)
    if p == math.inf:
        return [], cp.norm_inf(v)
    s = cp.Variable(nonneg=True)
    r = cp.Variable(size, nonneg=True)
    one = [1.0] * size
    return [cp.PowCone3D(r, cp.multiply(one, s), v, 1.0 / p), cp.sum(r) <= s], s


def solved(problem: Any) -> bool:
    """Solve in place by Clarabel; False if no rung of the tolerances was reached."""
    cp = cvxpy()
    for tolerance in _TOLERANCES:
        asked = {f"tol_{kind}": tolerance for kind in ("gap_abs", "gap_rel", "feas")}
        almost = {f"reduced_tol_{kind}": _TOLERANCES[-1] for kind in ("gap_abs", "gap_rel", "feas")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cvxpy warns of an inexact end; callers certify it
            try:
                problem.solve(solver=cp.CLARABEL, **asked, **almost)
            except cp.error.SolverError:
                continue
        if problem.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
            return True
    return False
