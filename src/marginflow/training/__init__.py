"""Algorithm 1: adversarial training by (stochastic) gradient descent."""

from marginflow.training._callback import Callback
from marginflow.training._schedule import log_spaced
from marginflow.training._trainer import Trainer, TrainingState

__all__ = ["Callback", "Trainer", "TrainingState", "log_spaced"]
