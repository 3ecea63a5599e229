"""Oracles: what the theory says the answer is, by other means than the library's.

Uses numpy, scipy and, where a problem is a general cone program, cvxpy with Clarabel (the extra
``oracles``). Imports neither torch nor marginflow's own numerics, so that an oracle cannot share a
bug with what it judges.

| oracle | question |
|---|---|
| :func:`max_margin` | ū and γ_m of linear data, ℓp distance |
| :func:`robust_svm`, :func:`largest_feasible_eps` | the same under ℓp perturbations |
| :func:`w_perp`, :func:`limit_angle_times_log_time`, … | how fast one layer turns to ū |
| :func:`kappa` | how firmly the support holds ū (Lemma 7) |
| :func:`reduced_flow` | the product of a balanced deep linear network along the flow |
| :func:`one_layer_norm`, :func:`two_layer_norm` | its norm for one example, in closed form |
| :func:`diagonal_limit`, :func:`convolutional_limit` | the predictors of other linear networks |
"""

from marginflow.references.closed_forms import one_layer_norm, two_layer_norm
from marginflow.references.kappa import Kappa, kappa
from marginflow.references.predictor_space import (
    PredictorLimit,
    convolutional_limit,
    diagonal_limit,
)
from marginflow.references.rates import (
    Residual,
    limit_angle_times_log_time,
    memory_exponent,
    predicted_angle,
    w_perp,
)
from marginflow.references.reduced_flow import ReducedFlow, reduced_flow
from marginflow.references.robust import RobustSVM, largest_feasible_eps, robust_svm
from marginflow.references.svm import MaxMargin, max_margin

__all__ = [
    "Kappa",
    "MaxMargin",
    "PredictorLimit",
    "ReducedFlow",
    "Residual",
    "RobustSVM",
    "convolutional_limit",
    "diagonal_limit",
    "kappa",
    "largest_feasible_eps",
    "limit_angle_times_log_time",
    "max_margin",
    "memory_exponent",
    "one_layer_norm",
    "predicted_angle",
    "reduced_flow",
    "robust_svm",
    "two_layer_norm",
    "w_perp",
]
