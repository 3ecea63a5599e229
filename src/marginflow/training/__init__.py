"""Algorithm 1: adversarial training by (stochastic) gradient descent."""

from marginflow.training._callback import Callback
from marginflow.training._gauges import BalanceDrift, Descent, Gauge, NormGrowth
from marginflow.training._rates import Constant, Lemma2, LossBased, Rate, build_rate
from marginflow.training._schedule import log_spaced
from marginflow.training._shrinking import Shrinking
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
    "Rate",
    "Shrinking",
    "Trainer",
    "TrainingState",
    "build_rate",
    "deferred_interrupt",
    "log_spaced",
    "printed_smoothness",
    "smoothness",
]
