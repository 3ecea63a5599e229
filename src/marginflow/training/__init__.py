"""Algorithm 1: adversarial training by (stochastic) gradient descent."""

from marginflow.training._callback import Callback
from marginflow.training._gauges import BalanceDrift, Descent, Gauge, NormGrowth
from marginflow.training._rates import Constant, Lemma2, LossBased, Rate, build_rate
from marginflow.training._schedule import latest_point, log_spaced
from marginflow.training._shrinking import Part, Shrinking
from marginflow.training._side_by_side import SideBySide, side_by_side_refusal
from marginflow.training._smoothness import printed_smoothness, smoothness
from marginflow.training._trainer import Trainer, TrainingState, deferred_interrupt

__all__ = [
    "BalanceDrift",
    "Callback",
    "Constant",
    "Descent",
    "Gauge",
    "Lemma2",
    "LossBased",
    "NormGrowth",
    "Part",
    "Rate",
    "Shrinking",
    "SideBySide",
    "Trainer",
    "TrainingState",
    "build_rate",
    "deferred_interrupt",
    "latest_point",
    "log_spaced",
    "printed_smoothness",
    "side_by_side_refusal",
    "smoothness",
]
