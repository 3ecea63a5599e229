"""Bias-free homogeneous networks: dense, deep linear, and the paper's convolutional one.

Source: the networks of Eq. (2) and of Appendix C.1.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from marginflow._checks import choice, whole
from marginflow.errors import InputError


class SquaredReLU(nn.Module):
    """``max(u, 0)²``, of degree 2: the first layers of a deep network get degrees 4, 2, 1 …."""

    def forward(self, u: Tensor) -> Tensor:
        """``max(u, 0)²``, elementwise.

        Args:
            u: of any shape.

        Returns:
            of the same shape.
        """
        return torch.relu(u).square()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "leaky-relu": lambda: nn.LeakyReLU(0.01),
    "relu": nn.ReLU,
    "squared-relu": SquaredReLU,
}
"""What makes an activation of each name; all are positively homogeneous, squared ReLU of degree 2."""


class Network(nn.Sequential):
    """A sequential network that knows how it was built.

    Args:
        modules: in the order of their use; each gets a name such as ``linear1``.

    Attributes:
        config: the factory's name and arguments, enough to build the network again
            (:func:`marginflow.models.build` takes it); weights are not in it.
    """

    def __init__(self, modules: Sequence[nn.Module], config: dict[str, Any]) -> None:
        super().__init__(OrderedDict(_named(modules)))
        self.config = config


def mlp(*widths: int, activation: str = "relu", seed: int | None = None) -> Network:
    """A dense network without biases, ``f(x) = W_L σ(W_{L−1} … σ(W_1 x))`` (the paper's Eq. 2).

    Inputs (n, …) are flattened to (n, widths[0]); outputs are (n, widths[-1]).
    Degrees ``c_k = q^{L−k}`` with q the activation's degree (1, or 2 for squared ReLU).

    Args:
        widths: numbers of features of input, hidden layers and output: ``mlp(784, 1024, 64, 1)``.
        activation: ``relu``, ``leaky-relu`` (slope 0.01), ``squared-relu`` or ``identity``.
        seed: seed of PyTorch's default initialisation, uniform in ±1/√fan_in; the global
            random state is then left alone. None: drawn from the global random state.

    Raises:
        InputError: fewer than two widths, or one below 1.
        SpecificationError: an unknown activation.
    """
    if len(widths) < 2:
        raise InputError(f"mlp: expected at least an input and an output width, got {widths}")
    for width in widths:
        whole("mlp: width", width, least=1)
    choice("activation", activation, ACTIVATIONS)
    config = {"kind": "mlp", "widths": list(widths), "activation": activation}
    with seeded(seed):
        modules: list[nn.Module] = [nn.Flatten()]
        for k, (fan_in, fan_out) in enumerate(pairwise(widths)):
            if k:
                modules.append(ACTIVATIONS[activation]())
            modules.append(nn.Linear(fan_in, fan_out, bias=False))
        return Network(modules, config)


def deep_linear(*widths: int, seed: int | None = None) -> Network:
    """A deep linear network ``f(x) = W_L ⋯ W_1 x`` (Section 3.1): :func:`mlp` without activation.

    Args:
        widths: numbers of features of input, hidden layers and output.
        seed: as in :func:`mlp`.

    Raises:
        InputError: fewer than two widths, or one below 1.
    """
    network = mlp(*widths, activation="identity", seed=seed)
    modules = [module for module in network if not isinstance(module, nn.Identity)]
    return Network(modules, {"kind": "deep-linear", "widths": list(widths)})


def cnn(
    input_shape: Sequence[int],
    outputs: int,
    *,
    channels: tuple[int, int] = (32, 64),
    hidden: int = 128,
    kernel: int = 5,
    activation: str = "relu",
    seed: int | None = None,
) -> Network:
    """The paper's CNN without biases (C.1): conv, act, max-pool, conv, act, max-pool, FC, act, FC.

    The paper does not give its sizes; the defaults are those of the usual MNIST network.
    Convolutions keep the size (odd kernel, zero padding), pools halve it.

    Args:
        input_shape: (channels, height, width) of an example, height and width at least 4.
        outputs: number of outputs (1 for two classes −1/+1).
        channels: numbers of channels of the two convolutions.
        hidden: width of the first dense layer.
        kernel: side of the convolution kernels, odd.
        activation: as in :func:`mlp`.
        seed: as in :func:`mlp`.

    Raises:
        InputError: a shape or size that does not fit.
        SpecificationError: an unknown activation.
    """
    shape = tuple(input_shape)
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise InputError(
            f"cnn: expected inputs of shape (channels, height, width), both sides at least 4, got {shape}"
        )
    for name, value in [("outputs", outputs), ("hidden", hidden), ("kernel", kernel)]:
        whole(f"cnn: {name}", value, least=1)
    if len(channels) != 2:
        raise InputError(f"cnn: expected two numbers of channels, got {channels}")
    for value in channels:
        whole("cnn: channels", value, least=1)
    if kernel % 2 == 0:
        raise InputError(f"cnn: expected an odd kernel, got {kernel}")
    choice("activation", activation, ACTIVATIONS)
    config = {
        "kind": "cnn",
        "input_shape": list(shape),
        "outputs": outputs,
        "channels": list(channels),
        "hidden": hidden,
        "kernel": kernel,
        "activation": activation,
    }
    act = ACTIVATIONS[activation]
    flat = channels[1] * (shape[1] // 4) * (shape[2] // 4)
    with seeded(seed):
        modules = [
            nn.Conv2d(shape[0], channels[0], kernel, padding=kernel // 2, bias=False),
            act(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels[0], channels[1], kernel, padding=kernel // 2, bias=False),
            act(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(flat, hidden, bias=False),
            act(),
            nn.Linear(hidden, outputs, bias=False),
        ]
        return Network(modules, config)


def _named(modules: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """``flatten1``, ``linear1``, ``relu1``, ``linear2`` …: names that errors and tables can show."""
    counts: Counter[str] = Counter()
    for module in modules:
        kind = type(module).__name__.lower()
        counts[kind] += 1
        yield f"{kind}{counts[kind]}", module


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seeded random state inside the block; None leaves everything as it is."""
    if seed is None:
        yield
        return
    whole("seed", seed, least=0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
