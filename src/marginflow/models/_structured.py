"""Deep linear networks with structure: diagonal, and circular convolutions of full width.

Their predictors are linear in x, but the norm of the weights measures the predictor by
another penalty than ‖w‖₂: the ℓ_{2/L} quasi-norm of w (diagonal) or of its Fourier transform
(convolutional), Gunasekar et al. 2018. Under an ℓp attack the limit direction minimises that
penalty subject to ``y_i⟨w, x_i⟩ − ε‖w‖_q ≥ 1``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from marginflow._checks import whole
from marginflow.models._networks import Network, seeded


class Diagonal(nn.Module):
    """``h ↦ w ⊙ h`` with a weight per feature, drawn uniformly from ±1."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features).uniform_(-1, 1))

    def forward(self, h: Tensor) -> Tensor:
        """``w ⊙ h``, shape (n, features)."""
        return h * self.weight


class CircularConvolution(nn.Module):
    """``h ↦ (1/√D) Σ_k w[k] h[(· + k) mod D]``, a circular convolution of full width D.

    With the unitary Fourier transform F: ``F(output) = conj(F(w)) ⊙ F(h)``. Weights are drawn
    uniformly from ±√3, of variance 1, so that the norm of h is kept on average.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        bound = math.sqrt(3.0)
        self.weight = nn.Parameter(torch.empty(features).uniform_(-bound, bound))

    def forward(self, h: Tensor) -> Tensor:
        """The convolution, shape (n, features)."""
        size = self.weight.shape[0]
        spectrum = torch.fft.rfft(self.weight, norm="ortho").conj()
        transformed = torch.fft.rfft(h, norm="ortho") * spectrum
        convolved: Tensor = torch.fft.irfft(transformed, n=size, norm="ortho")
        return convolved


def diagonal_linear(features: int, depth: int, *, seed: int | None = None) -> Network:
    """``f(x) = ⟨w_L ⊙ ⋯ ⊙ w_1, x⟩``: depth − 1 diagonal layers and a linear read-out.

    Args:
        features: D, the number of inputs (examples are flattened).
        depth: L ≥ 1.
        seed: seed of the initialisation; None draws from the global random state.

    Raises:
        InputError: a size below 1.
    """
    return _structured("diagonal-linear", Diagonal, features, depth, seed)


def conv_linear(features: int, depth: int, *, seed: int | None = None) -> Network:
    """``f(x) = ⟨w_L, w_{L−1} ⋆ ⋯ ⋆ w_1 ⋆ x⟩``: circular convolutions of full width, a read-out.

    Arguments and errors as for :func:`diagonal_linear`.
    """
    return _structured("conv-linear", CircularConvolution, features, depth, seed)


def predictor(network: nn.Module, features: int) -> Tensor:
    """The vector w with ``f(x) = ⟨w, x⟩`` of a linear network with one output, in float64.

    Shape (features,). Read off the outputs at the unit vectors, so it serves any module
    that is linear in its input.

    Args:
        network: any module that is linear in its input, with one output.
        features: d, the number of its inputs.

    Returns:
        (d,), float64, on the CPU.
    """
    like = next(network.parameters())
    with torch.no_grad():
        outputs: Tensor = network(torch.eye(features, dtype=like.dtype, device=like.device))
    return outputs.reshape(features).double().cpu()


def _structured(
    kind: str, layer: type[nn.Module], features: int, depth: int, seed: int | None
) -> Network:
    whole(f"{kind}: features", features, least=1)
    whole(f"{kind}: depth", depth, least=1)
    with seeded(seed):
        modules: list[nn.Module] = [nn.Flatten()]
        modules += [layer(features) for _ in range(depth - 1)]
        modules.append(nn.Linear(features, 1, bias=False))
    return Network(modules, {"kind": kind, "features": features, "depth": depth})
