"""Lower bounds of margins from the norms of layers: a Lipschitz bound on the ball, no library needed.

How far a perturbation can move the outputs of a layer is kept in three norms at once, ‖Δh‖₁, ‖Δh‖₂
and ‖Δh‖_∞, and each layer maps them by its operator norms between any two of them: the product of
layer norms, in whichever norm is best at each layer. The last layer enters by the rows' differences:
``m_ij(x + δ) ≥ f[y] − f[j] − min_r ‖Δh‖_r ‖w_y − w_j‖_{r*}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from marginflow.certified._operators import Operator, of_average, of_convolution, of_matrix
from marginflow.errors import ModelError
from marginflow.models import SquaredReLU
from marginflow.models._structured import CircularConvolution, Diagonal
from marginflow.norms import dual_exponent

_UNIT = torch.finfo(torch.float64).eps / 2
_NORMS = (1.0, 2.0, math.inf)


@dataclass(frozen=True)
class _State:
    """What is known behind a layer, of a batch of n examples.

    Attributes:
        h: outputs at x, (n, …), float64.
        size: the same of the network with absolute values, which bounds every rounding.
        reach: by norm r, ``max ‖Δh_i‖_r``, (n,).
        terms: roundings on the way: h is off by at most ``terms · u · size``.
    """

    h: Tensor
    size: Tensor
    reach: dict[float, Tensor]
    terms: float


Step = Callable[[_State], _State]


class NormBounds:
    """Margins' lower bounds of a chain of layers.

    Args:
        model: the network in float64 and evaluation mode.
        p, eps: the ball.

    Raises:
        ModelError: a module that is not known, by name.
    """

    def __init__(self, model: nn.Module, p: float, eps: float) -> None:
        self.p = p
        self.eps = eps
        modules = list(_chain(model, ""))
        self._last: nn.Linear | None = None
        if modules and type(modules[-1][1]).forward is nn.Linear.forward:
            last = modules.pop()[1]
            self._last = last if isinstance(last, nn.Linear) else None
        self._steps = [_step(name, module) for name, module in modules]

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lower bounds of m_i on the ball, the rounding in them and in m_i itself, (n,) each.

        Args:
            x: examples in float64.
            y: labels.
        """
        state = _State(x, x.abs(), self._ball(x), 1.0)
        for step in self._steps:
            state = step(state)
        if self._last is None:
            outputs, size, terms = state.h, state.size, state.terms
        else:
            W, bias = self._last.weight.detach(), self._last.bias
            outputs, size = self._last(state.h), state.size @ W.abs().T
            if bias is not None:
                size = size + bias.abs()
            terms = state.terms + W.shape[1] + 2
        outputs, size = (v.reshape(len(x), -1) for v in (outputs, size))
        falls = self._falls(state.reach, outputs.shape[1], len(x))
        if outputs.shape[1] == 1:
            values, sizes = (y * outputs[:, 0]).unsqueeze(1), size
            falls = falls[:, 0, :1]
        else:
            rows = torch.arange(len(x))
            values = outputs.gather(1, y.unsqueeze(1)) - outputs
            values[rows, y] = math.inf
            sizes = size.gather(1, y.unsqueeze(1)) + size
            falls = falls[rows, y]
        # The falls are products of positive numbers: off by a share, not by an amount.
        plain = (terms + 4) * _UNIT * sizes
        rounding = plain + 16 * (terms + 4) * _UNIT * falls
        bounds = values - falls - rounding
        least, worst = bounds.min(dim=1)
        return least, rounding.gather(1, worst.unsqueeze(1)).squeeze(1), plain.amax(dim=1)

    def _ball(self, x: Tensor) -> dict[float, Tensor]:
        """``max ‖δ‖_r`` over the ball ``‖δ‖_p ≤ ε`` in d dimensions: ``ε d^{max(0, 1/r − 1/p)}``."""
        features = x[0].numel()
        found = {}
        for r in {*_NORMS, self.p}:
            power = max(0.0, 1 / r - 1 / self.p)
            largest = self.eps * features**power * (1 + 8 * _UNIT)
            found[r] = x.new_full((len(x),), largest)
        return found

    def _falls(self, reach: dict[float, Tensor], outputs: int, n: int) -> Tensor:
        """By how much ``f[y] − f[j]`` can fall, (n, y, j); of one output (n, 1, 1)."""
        if self._last is None:
            # |Δf_y| + |Δf_j| ≤ ‖(1, 1)‖_{r*} ‖Δf‖_r.
            pair = 1 if outputs == 1 else 2
            least = torch.stack([reach[r] * pair ** (1 / dual_exponent(r)) for r in _NORMS]).amin(
                dim=0
            )
            return least.reshape(n, 1, 1).expand(n, outputs, outputs)
        W = self._last.weight.detach()
        gaps = W.unsqueeze(0) if outputs == 1 else W.unsqueeze(1) - W.unsqueeze(0)
        norms = (torch.linalg.vector_norm(gaps, ord=dual_exponent(r), dim=-1) for r in reach)
        parts = [v.reshape(n, 1, 1) * norm for v, norm in zip(reach.values(), norms, strict=True)]
        return torch.stack(parts).amin(dim=0)


def _chain(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested sequences in their order, with their names."""
    if module._forward_hooks or module._forward_pre_hooks:
        raise _unknown(name, module, "it has a hook")
    if type(module).forward is nn.Sequential.forward:
        for child, part in module.named_children():
            yield from _chain(part, f"{name}.{child}" if name else child)
    else:
        yield name, module


def _unknown(name: str, module: nn.Module, why: str = "") -> ModelError:
    what = f"{name or 'the model'!r} ({type(module).__name__})"
    return ModelError(
        f"bounds by norms: expected a chain of linear, convolution, ReLU, pooling and batch-norm layers, "
        f"got {what}" + (f": {why}" if why else "")
    )


def _step(name: str, module: nn.Module) -> Step:
    """How a module acts on a state; by its forward and not by its class."""
    forward = type(module).forward
    for known, make in _KNOWN:
        if forward is known:
            return make(name, module)
    raise _unknown(name, module)


def _affine(state: _State, operator: Operator, h: Tensor, bias: Tensor | None = None) -> _State:
    """Behind ``h ↦ Ah + b``; ``bias`` in a shape that can be added."""
    size = operator.powered(state.size, 1.0)
    if bias is not None:
        size = size + bias.abs()
    reach = {
        s: torch.stack([v * operator.norm(r, s) for r, v in state.reach.items()]).amin(dim=0)
        for s in _NORMS
    }
    return _State(h, size, _tightened(reach, h[0].numel()), state.terms + operator.terms + 2)


def _tightened(reach: dict[float, Tensor], features: int) -> dict[float, Tensor]:
    """The same bounds, each no larger than the others allow in this many dimensions."""
    one, two, most = (reach[r] for r in _NORMS)
    one = torch.minimum(one, torch.minimum(two * math.sqrt(features), most * features))
    two = torch.minimum(torch.minimum(two, one), (one * most).sqrt())
    return {1.0: one, 2.0: two, math.inf: torch.minimum(most, two)}


def _stretched(
    state: _State, h: Tensor, size: Tensor, factor: Tensor | float, terms: int
) -> _State:
    """Behind a map that stretches every norm by at most ``factor``."""
    reach = {r: v * factor for r, v in state.reach.items()}
    return _State(h, size, reach, state.terms + terms)


def _linear(name: str, module: nn.Module) -> Step:
    if not isinstance(module, nn.Linear):
        raise _unknown(name, module)
    operator = of_matrix(module.weight.detach())

    def step(state: _State) -> _State:
        if state.h.ndim != 2:
            raise _unknown(name, module, "its inputs are no vectors; flatten them")
        return _affine(state, operator, module(state.h), module.bias)

    return step


def _convolution(name: str, module: nn.Module) -> Step:
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or module.padding_mode != "zeros":
        raise _unknown(name, module, "its padding is not of zeros")
    operators: dict[tuple[int, ...], Operator] = {}

    def step(state: _State) -> _State:
        shape = tuple(state.h.shape[1:])
        if shape not in operators:
            operators[shape] = of_convolution(module, shape)
        bias = module.bias
        if bias is not None:
            bias = bias.reshape(-1, *(1 for _ in shape[1:]))
        return _affine(state, operators[shape], module(state.h), bias)

    return step


def _average(name: str, module: nn.Module) -> Step:
    if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        if any(side != 1 for side in _sides(module.output_size, 1)):
            raise _unknown(name, module, "expected the mean of all positions")
    elif not isinstance(module, nn.AvgPool1d | nn.AvgPool2d) or module.ceil_mode:
        raise _unknown(name, module, "with ceil_mode")
    elif not module.count_include_pad or getattr(module, "divisor_override", None):
        raise _unknown(name, module, "its means divide by changing numbers")

    def step(state: _State) -> _State:
        shape = state.h.shape[1:]
        count = math.prod(shape[1:])
        if isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
            count = math.prod(_sides(module.kernel_size, len(shape) - 1))
        return _affine(state, of_average(module, count, shape), module(state.h))

    return step


def _sides(value: int | Sequence[int | None] | None, count: int) -> tuple[int, ...]:
    """One number a dimension; None, which stands for "as it is", as 0."""
    if value is None or isinstance(value, int):
        return (value or 0,) * count
    return tuple(v or 0 for v in value)


def _greatest(name: str, module: nn.Module) -> Step:
    if not isinstance(module, nn.MaxPool1d | nn.MaxPool2d) or module.return_indices:
        raise _unknown(name, module, "it returns indices")
    dimensions = 1 if isinstance(module, nn.MaxPool1d) else 2
    pairs = zip(
        _sides(module.kernel_size, dimensions), _sides(module.stride, dimensions), strict=True
    )
    # An input lies in at most this many windows, and |max a − max b| ≤ max |a − b| in each.
    overlap = math.prod(math.ceil(k / s) for k, s in pairs)

    def step(state: _State) -> _State:
        reach = {r: v * overlap ** (1 / r) for r, v in state.reach.items()}
        return replace(state, h=module(state.h), size=module(state.size), reach=reach)

    return step


def _batch_norm(name: str, module: nn.Module) -> Step:
    if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) or module.running_mean is None:
        raise _unknown(name, module, "it keeps no running statistics")
    mean, variance = module.running_mean, module.running_var
    if variance is None:
        raise _unknown(name, module, "it keeps no running statistics")
    scale = (variance + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().abs()
    shift = torch.zeros_like(mean) if module.bias is None else module.bias.detach().abs()

    def step(state: _State) -> _State:
        shape = (-1, *(1 for _ in state.h.shape[2:]))
        size = (state.size + mean.abs().reshape(shape)) * scale.reshape(shape)
        return _stretched(
            state, module(state.h), size + shift.reshape(shape), float(scale.abs().max()), 8
        )

    return step


def _no_steeper(name: str, module: nn.Module) -> Step:
    """Activations elementwise: kinked at 0, with slopes a and 1."""
    slope = abs(module.negative_slope) if isinstance(module, nn.LeakyReLU) else 0.0
    factor = max(1.0, slope)
    return lambda state: _stretched(state, module(state.h), state.size * factor, factor, 1)


def _squared(name: str, module: nn.Module) -> Step:
    """``max(u, 0)²`` on the ball: its slope is at most ``2 max(u, 0) + ‖Δu‖_∞`` on the way."""

    def step(state: _State) -> _State:
        top = state.h + state.terms * _UNIT * state.size
        factor = 2 * top.clamp(min=0).flatten(1).amax(dim=1) + state.reach[math.inf]
        found = _stretched(state, module(state.h), state.size.square(), factor, 2)
        return replace(found, terms=2 * state.terms + 4)

    return step


def _passing(name: str, module: nn.Module) -> Step:
    return lambda state: replace(state, h=module(state.h), size=module(state.size))


def _diagonal(name: str, module: nn.Module) -> Step:
    if not isinstance(module, Diagonal):
        raise _unknown(name, module)
    size = module.weight.detach().abs()
    return lambda state: _stretched(state, module(state.h), state.size * size, float(size.max()), 1)


def _circular(name: str, module: nn.Module) -> Step:
    if not isinstance(module, CircularConvolution):
        raise _unknown(name, module)
    w = module.weight.detach()
    index = torch.arange(len(w))
    matrix = w[(index.unsqueeze(0) - index.unsqueeze(1)) % len(w)] / math.sqrt(len(w))
    operator = of_matrix(matrix)
    # Its own product, and not the Fourier transform, whose rounding is of another kind.
    return lambda state: _affine(state, operator, state.h @ matrix.T)


_KNOWN: tuple[tuple[Callable[..., Tensor], Callable[[str, nn.Module], Step]], ...] = (
    (nn.Linear.forward, _linear),
    (nn.Conv1d.forward, _convolution),
    (nn.Conv2d.forward, _convolution),
    (nn.AvgPool1d.forward, _average),
    (nn.AvgPool2d.forward, _average),
    (nn.AdaptiveAvgPool1d.forward, _average),
    (nn.AdaptiveAvgPool2d.forward, _average),
    (nn.MaxPool1d.forward, _greatest),
    (nn.MaxPool2d.forward, _greatest),
    (nn.BatchNorm2d.forward, _batch_norm),  # that of all batch norms
    (nn.ReLU.forward, _no_steeper),
    (nn.LeakyReLU.forward, _no_steeper),
    (SquaredReLU.forward, _squared),
    (nn.Identity.forward, _passing),
    (nn.Flatten.forward, _passing),
    (nn.Dropout.forward, _passing),
    (Diagonal.forward, _diagonal),
    (CircularConvolution.forward, _circular),
)
