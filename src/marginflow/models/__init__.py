"""The networks that marginflow brings along; any other torch module will do as well."""

from marginflow.models._build import build
from marginflow.models._linear import linear_layers
from marginflow.models._networks import ACTIVATIONS, Network, SquaredReLU, cnn, deep_linear, mlp
from marginflow.models._structured import conv_linear, diagonal_linear, predictor
from marginflow.models._weights import load_weights, read_weights

__all__ = [
    "ACTIVATIONS",
    "Network",
    "SquaredReLU",
    "build",
    "cnn",
    "conv_linear",
    "deep_linear",
    "diagonal_linear",
    "linear_layers",
    "load_weights",
    "mlp",
    "predictor",
    "read_weights",
]
