"""The networks that marginflow brings along; any other torch module will do as well."""

from marginflow.models._build import build
from marginflow.models._networks import ACTIVATIONS, Network, SquaredReLU, cnn, deep_linear, mlp
from marginflow.models._weights import load_weights

__all__ = [
    "ACTIVATIONS",
    "Network",
    "SquaredReLU",
    "build",
    "cnn",
    "deep_linear",
    "load_weights",
    "mlp",
]
