"""The work of one training step: the gradient of the loss at perturbed inputs."""

from marginflow.engine._autograd import AutogradEngine, LossGradient

__all__ = ["AutogradEngine", "LossGradient"]
