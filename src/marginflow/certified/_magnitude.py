"""How large the numbers inside a network can get on a ball, and how far rounding can carry them.

The network is run once more with the absolute value of every weight, on ``|x| + ε``: that bounds every
value of the network on the ball, and every sum of absolute values that a bound's rounding depends on.
Running it shows which operations it is made of; those whose bounds are not known to be sound are
refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from marginflow.errors import ModelError

_ASKING = ("__get__", "dim", "size", "numel", "is_floating_point", "__len__")
_SHAPING = (
    *("flatten", "view", "reshape", "unsqueeze", "squeeze", "contiguous", "transpose"),
    *("permute", "__getitem__", "dropout", "expand"),
)


class Magnitude(TorchFunctionMode):
    """Absolute values and counts of one pass; see :func:`measure`.

    Attributes:
        terms: the numbers of terms of all sums on the way, together.
        kinks: how many activations and max-pools there are.
        sizes: features of the inputs and behind each linear layer, in order.
        convolutions: whether there are any.
        direct: an operation other than a linear layer or convolution that takes the inputs
            themselves, or None.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.terms = 2
        self.kinks = 0
        self.sizes: list[int] = [x[0].numel()]
        self.convolutions = False
        self.direct: str | None = None
        self._inputs = [x]
        self._data = [x]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The same operation on absolute values."""
        options = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name in _ASKING or not self._moves(args):
            return func(*args, **options)
        if name in _SHAPING:
            if options.get("training"):
                raise _refused(name, "in training mode")
            found = func(*args, **options)
            if any(args[0] is v for v in self._inputs):
                self._inputs.append(found)
            self._data.append(found)
            return found
        if name not in _OPERATIONS:
            raise _refused(name)
        linear = name in ("linear", "conv1d", "conv2d")
        if not linear and self._moves(args, self._inputs):
            self.direct = name
        self.convolutions |= name.startswith("conv")
        found, terms, kink = _OPERATIONS[name](self._moves, args, options)
        if name.endswith("_"):
            found = args[0].copy_(found)
        self.terms += terms
        self.kinks += kink
        if linear:
            self.sizes.append(found[0].numel())
        self._data.append(found)
        return found

    def _moves(self, values: object, among: Sequence[Tensor] | None = None) -> bool:
        """Whether an argument depends on the inputs."""
        if isinstance(values, Tensor):
            return any(values is v for v in (self._data if among is None else among))
        if isinstance(values, list | tuple):
            return any(self._moves(v, among) for v in values)
        return False


def measure(model: nn.Module, x: Tensor, eps: float) -> tuple[Tensor, Magnitude]:
    """The magnitudes of the outputs on the ball, shape of the outputs, and the counts.

    Args:
        model: the network in float64 and evaluation mode.
        x: examples, (n, …), float64.
        eps: ‖δ‖_∞ is at most this.

    Raises:
        ModelError: an operation that is not among those known to be bounded soundly, by name.
    """
    start = x.abs() + eps
    mode = Magnitude(start)
    with torch.no_grad(), mode:
        outputs: Tensor = model(start)
    return outputs, mode


def _refused(name: str, why: str = "") -> ModelError:
    known = "linear, convolution, batch norm, ReLU, leaky ReLU, pools, sums, scaling and reshaping"
    return ModelError(
        f"bounds by auto-LiRPA: expected a network of {known}, got the operation {name!r}"
        + (f" {why}" if why else "")
    )


Found = tuple[Tensor, int, int]
Moves = Callable[[object], bool]


def _given(
    args: Sequence[Any], options: Mapping[str, Any], place: int, name: str, other: Any
) -> Any:
    """An argument by place or by name."""
    return args[place] if len(args) > place else options.get(name, other)


def _size(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) else abs(value)


def _linear(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
    W, bias = _given(args, options, 1, "weight", None), _given(args, options, 2, "bias", None)
    return F.linear(args[0], W.abs(), None if bias is None else bias.abs()), W.shape[1] + 2, 0


def _convolution(convolve: Callable[..., Tensor]) -> Callable[..., Found]:
    def act(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
        K, bias = _given(args, options, 1, "weight", None), _given(args, options, 2, "bias", None)
        rest = {k: v for k, v in options.items() if k not in ("input", "weight", "bias")}
        found = convolve(args[0], K.abs(), None if bias is None else bias.abs(), *args[3:], **rest)
        return found, K[0].numel() + 2, 0

    return act


def _batch_norm(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
    x, mean, variance = args[:3]
    weight, bias = _given(args, options, 3, "weight", None), _given(args, options, 4, "bias", None)
    if _given(args, options, 5, "training", False) or mean is None:
        raise _refused("batch_norm", "with the statistics of the batch")
    found = F.batch_norm(
        x,
        -mean.abs(),
        variance,
        None if weight is None else weight.abs(),
        None if bias is None else bias.abs(),
        False,
        0.0,
        _given(args, options, 7, "eps", 1e-5),
    )
    return found, 8, 0


def _relu(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
    return args[0].clone(), 1, 1


def _leaky(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
    slope = _given(args, options, 1, "negative_slope", 0.01)
    if not 0 <= slope <= 1:
        raise _refused("leaky_relu", f"with the slope {slope:g}; expected one in [0, 1]")
    return args[0].clone(), 1, 1


def _pool(pool: Callable[..., Tensor], greatest: bool) -> Callable[..., Found]:
    def act(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
        kernel = _pair(_given(args, options, 1, "kernel_size", None))
        stride = _given(args, options, 2, "stride", None)
        plain = _pair(kernel if stride in (None, []) else stride) == kernel
        plain &= _pair(_given(args, options, 3, "padding", 0)) == (0, 0)
        if greatest:
            plain &= _pair(_given(args, options, 4, "dilation", 1)) == (1, 1)
            plain &= not options.get("ceil_mode") and not options.get("return_indices")
        else:
            plain &= not any(args[4:5]) and not options.get("ceil_mode")
            plain &= _given(args, options, 6, "divisor_override", None) is None
        if not plain:
            raise _refused(pool.__name__, "with padding, overlap or other options")
        return pool(args[0], kernel), kernel[0] * kernel[1] + 1, int(greatest)

    return act


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _mean(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
    if _pair(_given(args, options, 1, "output_size", None)) != (1, 1):
        raise _refused("adaptive_avg_pool2d", "to more than one position")
    x = args[0]
    return F.adaptive_avg_pool2d(x, 1), x.shape[-1] * x.shape[-2] + 1, 0


def _sum(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
    if options.get("alpha", 1) not in (1, -1):
        raise _refused("add", "with a factor")
    return _size(args[0]) + _size(args[1]), 2, 0


def _scale(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
    if moves(args[0]) and moves(args[1]):
        raise _refused("mul", "of two values that both depend on the input")
    return _size(args[0]) * _size(args[1]), 2, 0


def _divide(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
    if moves(args[1]) or options:
        raise _refused("div", "by a value that depends on the input")
    return _size(args[0]) / _size(args[1]), 2, 0


def _join(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
    return torch.cat([v.abs() for v in args[0]], *args[1:], **options), 0, 0


def _negative(moves: Moves, args: Sequence[Any], options: Mapping[str, Any]) -> Found:
    return args[0].clone(), 0, 0


_OPERATIONS: dict[str, Callable[[Moves, Sequence[Any], Mapping[str, Any]], Found]] = {
    "linear": _linear,
    "conv1d": _convolution(F.conv1d),
    "conv2d": _convolution(F.conv2d),
    "batch_norm": _batch_norm,
    "relu": _relu,
    "relu_": _relu,
    "leaky_relu": _leaky,
    "max_pool2d": _pool(F.max_pool2d, True),
    "avg_pool2d": _pool(F.avg_pool2d, False),
    "adaptive_avg_pool2d": _mean,
    **dict.fromkeys(
        ("add", "add_", "__add__", "__radd__", "sub", "sub_", "__rsub__", "rsub"), _sum
    ),
    **dict.fromkeys(("mul", "mul_", "__mul__", "__rmul__"), _scale),
    **dict.fromkeys(("div", "div_", "true_divide", "__truediv__"), _divide),
    "cat": _join,
    "neg": _negative,
}
