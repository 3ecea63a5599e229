"""The layers of any torch module, their degrees, their norms, and the normalised network.

A network is multi-homogeneous when its trainable parameters fall into layers
W_1, …, W_L with ``f(x; …, a W_k, …) = a^{c_k} f(x; W)`` for every a > 0. Nothing is
assumed from a layer's type: the degrees c_k are *measured* by scaling in float64,
and a network that is not multi-homogeneous is refused with the name of what breaks it.

Source: the homogeneity of Section 3.2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from marginflow._checks import instance
from marginflow.errors import InputError, ModelError, NotHomogeneousError

# A homogeneous network obeys its law to rounding (about 1e-14 in float64 for the depths
# in use); a bias or a GELU breaks it by far more than this.
_TOLERANCE = 1e-9
_SCALES = (2.0, 0.5, 3.0)
_PROBES = 16
# A parameter whose largest entry has a binary exponent beyond this is probed in units of its own.
_FAR = 30


@dataclass(frozen=True)
class Layer:
    """One layer W_k: the parameters that scale together, and their degree c_k.

    Source: Section 3.2.

    Attributes:
        name: that of its first parameter.
        parameters: the names of all its parameters.
        degree: c_k > 0 with ``f(x; …, a W_k, …) = a^{c_k} f(x; W)``, as measured.
    """

    name: str
    parameters: tuple[str, ...]
    degree: float


@dataclass(frozen=True)
class Homogeneity:
    """The layers of a multi-homogeneous network, in the order of its parameters.

    Source: Section 3.2.

    Attributes:
        layers: W_1 … W_L with their degrees c_k.
    """

    layers: tuple[Layer, ...]

    @property
    def degrees(self) -> tuple[float, ...]:
        """``(c_1, …, c_L)``."""
        return tuple(layer.degree for layer in self.layers)

    @property
    def order(self) -> float:
        """``K = Σ c_k``, so that ``f(x; aW) = a^K f(x; W)``."""
        return sum(self.degrees)

    def table(self) -> list[dict[str, Any]]:
        """The layers for JSON: name, parameters, degree of each."""
        return [asdict(layer) | {"parameters": list(layer.parameters)} for layer in self.layers]

    def norms(self, model: nn.Module) -> Tensor:
        """``ρ_k = ‖W_k‖_F``, shape (L,), float64, on the CPU, without gradient.

        Args:
            model: the network that was measured, or one with the same parameters.

        Raises:
            ModelError: a parameter of the layers that ``model`` does not have.
        """
        named = dict(model.named_parameters())
        try:
            groups = [[named[name] for name in layer.parameters] for layer in self.layers]
        except KeyError as error:
            raise ModelError(
                f"the model has no parameter {error.args[0]!r}: these layers were measured on another model"
            ) from None
        # One norm over the norms of a group: no overflow for weights up to 1e150.
        norms = [
            torch.linalg.vector_norm(
                torch.stack(
                    [torch.linalg.vector_norm(w.detach(), dtype=torch.float64) for w in group]
                )
            )
            for group in groups
        ]
        return torch.stack(norms).cpu()

    def norm_product(self, model: nn.Module) -> float:
        """``ρ = Π ρ_k^{c_k}``.

        Args:
            model: as for :meth:`norms`.

        Raises:
            ModelError: as for :meth:`norms`.
        """
        norms: list[float] = self.norms(model).tolist()
        powers = [power(norm, c) for norm, c in zip(norms, self.degrees, strict=True)]
        return math.prod(powers)

    def total_norm(self, model: nn.Module) -> float:
        """``‖W‖ = sqrt(Σ_k ‖W_k‖_F²)``.

        Args:
            model: as for :meth:`norms`.

        Raises:
            ModelError: as for :meth:`norms`.
        """
        return float(torch.linalg.vector_norm(self.norms(model)))


def measure_homogeneity(
    model: nn.Module, x: Tensor, *, groups: Sequence[Sequence[str]] = ()
) -> Homogeneity:
    """Measure the layers and degrees of ``model`` (Definition of multi-homogeneity, Section 3.2).

    Each trainable parameter is a layer; the parameters of the module that the input
    meets first (weight and bias) form one layer, as does every group in ``groups``.
    Layer k is scaled by 2, 1/2 and 3 in float64 and the outputs compared with
    ``a^{c_k} f``. The model itself is not changed: its weights, buffers, mode,
    gradients and the random state stay as they are.

    The size of the weights plays no part: a parameter whose largest entry is beyond 1e9 or below
    1e-9 is brought to about 1 for the probes, so that no product leaves the range of float64,
    and nothing looks linear (a tanh, say) for being small.

    Args:
        model: any module that maps x to outputs (n,), (n, 1) or (n, C).
        x: some inputs, (n, …); a few are used as probes.
        groups: names of parameters that form one layer together.

    Returns:
        the layers with their degrees (unequal degrees are normal:
        ``c_k = q^{L−k}`` for activations of degree q).

    Raises:
        NotHomogeneousError: names the parameter or module that breaks homogeneity.
        ModelError: no trainable parameter, a random network, one that is 0 at every probe.
        InputError: an unknown or doubly grouped parameter name.

    Examples:
        >>> import marginflow as mf
        >>> data = mf.load("separable:n=20,d=6")
        >>> model = mf.models.mlp(6, 5, 4, 1, activation="squared-relu", seed=0)
        >>> mf.measure_homogeneity(model, data.x).degrees
        (4, 2, 1)
    """
    instance("model", model, nn.Module, "a torch.nn.Module")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ModelError("the model has no trainable parameter; nothing to measure")
    # One fork around all evaluations: they draw on from each other, so randomness shows.
    device = next(iter(named.values())).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        probe = _Probe(model, x)
        members = _groups(named, groups, probe)
        degrees = [probe.degree(group) for group in members]
        if None in degrees:
            failing = [g for g, degree in zip(members, degrees, strict=True) if degree is None]
            raise _refusal(probe, failing)
    layers = (Layer(g[0], g, c) for g, c in zip(members, degrees, strict=True) if c is not None)
    return Homogeneity(tuple(layers))


def normalized_network(model: nn.Module, homogeneity: Homogeneity) -> nn.Module:
    """A copy with every layer at norm 1: ``f(x; W) = ρ · f(x; Ŵ)``, ``Ŵ_k = W_k/ρ_k``.

    Source: Section 3.2.

    Args:
        model: the network; it is not changed.
        homogeneity: its layers, as :func:`measure_homogeneity` gives them.

    Raises:
        ModelError: a layer of norm 0.
    """
    norms = homogeneity.norms(model).tolist()
    normalized = copy.deepcopy(model)
    named = dict(normalized.named_parameters())
    with torch.no_grad():
        for layer, norm in zip(homogeneity.layers, norms, strict=True):
            if norm == 0:
                raise ModelError(f"layer {layer.name!r} is 0 and cannot be normalised")
            for name in layer.parameters:
                named[name].div_(norm)
    return normalized


def within_range(model: nn.Module, homogeneity: Homogeneity) -> tuple[nn.Module, float]:
    """The network in units in which its outputs are numbers of its dtype: ``f = 2^s · f̃``.

    At weights of 1e30 the products of two layers overflow float32, at 1e-30 they underflow. Where
    ``Σ c_k |log2 ρ_k|``, which bounds the exponent of every product of layers, exceeds half the range
    of the dtype, f̃ is a copy whose layers are divided by powers of two, to norms in [1, 2). That
    rounds nothing and leaves every scale-invariant perturbation as it is (Lemma 3).

    Source: marginflow.

    Args:
        model: the network; it is not changed.
        homogeneity: its layers.

    Returns:
        the network itself and 0 where nothing is in danger, else the copy and ``s = Σ c_k e_k``.
    """
    exponents = [_exponent(norm) for norm in homogeneity.norms(model).tolist()]
    reach = sum(abs(e) * c for e, c in zip(exponents, homogeneity.degrees, strict=True))
    parameters = dict(model.named_parameters())
    dtype = parameters[homogeneity.layers[0].name].dtype
    if reach <= math.log2(torch.finfo(dtype).max) / 2:
        return model, 0.0
    scaled = copy.deepcopy(model)
    named = dict(scaled.named_parameters())
    with torch.no_grad():
        for layer, e in zip(homogeneity.layers, exponents, strict=True):
            for name in layer.parameters:
                named[name].copy_(_times_power_of_two(named[name], -e))
    shift = sum(c * e for c, e in zip(homogeneity.degrees, exponents, strict=True))
    return scaled, shift


def _exponent(norm: float) -> int:
    """``floor(log2(norm))``, 0 for what is 0 or not finite."""
    return math.frexp(norm)[1] - 1 if norm > 0 and math.isfinite(norm) else 0


def _times_power_of_two(p: Tensor, exponent: int) -> Tensor:
    """``p · 2^exponent`` in halves: the power itself may be outside the range of the dtype."""
    half = exponent // 2
    return p * 2.0**half * 2.0 ** (exponent - half)


def power(norm: float, degree: float) -> float:
    """``norm^degree``, infinite where it overflows.

    Args:
        norm: a norm, ≥ 0.
        degree: c_k ≥ 0, the exponent.
    """
    try:
        return math.pow(norm, degree)
    except OverflowError:
        return math.inf


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside the block, each as it was afterwards.

    Args:
        model: its modules' ``training`` is set and restored.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Probe:
    """Evaluates a model in float64 with scaled parameters, leaving no trace on it."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model = model
        # Zero parameters (a bias before training) hide their degree: give them a value.
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            name: _of_usual_size(_filled(p.detach().double(), generator))
            for name, p in model.named_parameters()
        }
        self.buffers = {
            name: b.detach().double() if b.is_floating_point() else b.detach().clone()
            for name, b in model.named_buffers()
        }
        # By identity, for a tensor that several modules share bears the name of the first only.
        self.values = {id(p): self.parameters[name] for name, p in model.named_parameters()}
        self.values |= {id(b): self.buffers[name] for name, b in model.named_buffers()}
        self.x = _probe_inputs(x, generator).to(next(iter(self.parameters.values())).device)
        self.outputs = self(self.parameters)
        if not bool(torch.isfinite(self.outputs).all()):
            raise ModelError("the model's outputs are not finite; check its weights and the data")
        if not torch.equal(self.outputs, self(self.parameters)):
            random = [n for n, m in model.named_modules() if "dropout" in type(m).__name__.lower()]
            where = f" (its module {random[0]!r})" if random else ""
            raise ModelError(
                f"the model{where} is random: two evaluations differ; "
                "remove the source of randomness or call model.eval()"
            )
        if not bool(self.outputs.any()):
            raise ModelError(
                "the model is 0 at every probe (dead units or zero weights), so its degrees "
                "cannot be measured; initialise it anew"
            )

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        # Buffers are cloned: batch norm in training mode updates its statistics in place.
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        with torch.no_grad():
            try:
                outputs = functional_call(self.model, {**parameters, **buffers}, (self.x.clone(),))
            except (RuntimeError, TypeError) as error:
                raise ModelError(
                    f"the model does not take inputs of shape {tuple(self.x.shape)}: "
                    f"{str(error).splitlines()[0]}"
                ) from error
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"the model: expected a tensor as output, got {type(outputs).__name__}"
            )
        return outputs

    def degree(self, members: Sequence[str]) -> float | None:
        """C > 0 with ``f(a W_k) = a^c f`` for all scales tried, or None."""
        return _degree(
            self.outputs,
            lambda a: self({n: p * a if n in members else p for n, p in self.parameters.items()}),
        )

    def calls(self) -> Iterator[tuple[str, nn.Module, _Arguments]]:
        """The leaf modules in the order in which they run, each with its arguments."""
        seen: list[tuple[str, nn.Module, _Arguments]] = []

        def record(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
            def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
                seen.append((name, module, _Arguments(args, kwargs).scaled(1.0)))

            return module.register_forward_pre_hook(hook, with_kwargs=True)

        handles = [
            record(n, m)
            for n, m in self.model.named_modules()
            if not any(True for _ in m.children())
        ]
        try:
            self(self.parameters)
        finally:
            for handle in handles:
                handle.remove()
        yield from seen

    def input_degree(self, module: nn.Module, arguments: _Arguments) -> float | None:
        """Q > 0 with ``module(a x) = a^q module(x)``, or None."""
        state = {n: self.values[id(p)] for n, p in module.named_parameters()}
        state |= {n: self.values[id(b)] for n, b in module.named_buffers()}

        def call(a: float) -> Tensor:
            fresh = {name: value.clone() for name, value in state.items()}
            given = arguments.scaled(a)
            with torch.no_grad():
                outputs = functional_call(module, fresh, given.args, given.kwargs)
            parts = outputs if isinstance(outputs, tuple | list) else [outputs]
            return torch.cat([p.reshape(-1) for p in parts if isinstance(p, Tensor)])

        return _degree(call(1.0), call)


@dataclass(frozen=True)
class _Arguments:
    """What a module was called with."""

    args: tuple[object, ...]
    kwargs: dict[str, object]

    def scaled(self, a: float) -> _Arguments:
        """The arguments with every floating tensor multiplied by a, in copies of their own."""

        def scale(value: object) -> object:
            # Always a copy: a later in-place module may overwrite the original.
            if isinstance(value, Tensor) and value.is_floating_point():
                return value * a
            return value

        return _Arguments(
            tuple(map(scale, self.args)), {k: scale(v) for k, v in self.kwargs.items()}
        )


def _degree(base: Tensor, scaled: Callable[[float], Tensor]) -> float | None:
    if not bool(base.any()):
        return None
    size = float(base.abs().max())
    # In units of the largest output: the squares of very small or large ones are not numbers.
    unit = base / size
    ratio = float((scaled(2.0) / size * unit).sum()) / float((unit * unit).sum())
    if not math.isfinite(ratio) or ratio <= 0:
        return None
    degree = math.log2(ratio)
    if abs(degree - round(degree)) < 1e-6:
        degree = round(degree)
    if degree <= 1e-6:
        return None
    for a in _SCALES:
        if float((scaled(a) - a**degree * base).abs().max()) > _TOLERANCE * size * max(
            1.0, a**degree
        ):
            return None
    return degree


def _filled(p: Tensor, generator: torch.Generator) -> Tensor:
    if bool(p.any()):
        return p
    return (0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)).to(p.device)


def _of_usual_size(p: Tensor) -> Tensor:
    """``p``, or where it is very large or small ``p`` by the power of two that brings it to about 1."""
    exponent = _exponent(float(p.abs().max())) if p.numel() else 0
    return p if abs(exponent) <= _FAR else _times_power_of_two(p, -exponent)


def _probe_inputs(x: Tensor, generator: torch.Generator) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim < 1 or x.shape[0] == 0:
        raise InputError("expected inputs of shape (n, …) with n ≥ 1 to probe the model with")
    x = x[:_PROBES].detach().double()
    # Gaussian probes beside the data: data of one sign leaves some units dead.
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    size = x.abs().max()
    return torch.cat([x, noise * torch.where(size > 0, size, torch.ones_like(size))])


def _groups(
    named: Mapping[str, Tensor], groups: Sequence[Sequence[str]], probe: _Probe
) -> list[tuple[str, ...]]:
    """The layers' members: the asked groups, the first module's, single parameters."""
    asked = [tuple(group) for group in groups]
    first = _first_module(named, probe)
    if first and not any(set(first) & set(group) for group in asked):
        asked.append(first)
    owner: dict[str, tuple[str, ...]] = {}
    for group in asked:
        for name in group:
            if name not in named:
                raise InputError(f"groups: the model has no trainable parameter {name!r}")
            if name in owner:
                raise InputError(f"groups: the parameter {name!r} stands in two groups")
            owner[name] = group
    return list(dict.fromkeys(owner.get(name, (name,)) for name in named))


def _first_module(named: Mapping[str, Tensor], probe: _Probe) -> tuple[str, ...]:
    for name, _, _ in probe.calls():
        prefix = f"{name}." if name else ""
        members = tuple(n for n in named if n.rpartition(".")[0] == name and n.startswith(prefix))
        if members:
            return members
    return ()


def _refusal(probe: _Probe, failing: Sequence[tuple[str, ...]]) -> NotHomogeneousError:
    """The error for groups that failed, blaming the module or parameter that breaks the law."""
    met_weights = False
    for name, module, arguments in probe.calls():
        own = dict(module.named_parameters())
        if not met_weights:
            # Ahead of the first weights nothing is scaled, so nothing can break.
            met_weights = bool(own)
            continue
        if probe.input_degree(module, arguments) is not None:
            continue
        kind = type(module).__name__
        if "bias" in own and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            bias = f"{name}.bias"
            return NotHomogeneousError(
                f"not multi-homogeneous: the bias {bias!r} of a hidden layer has another degree than "
                f"its weight (the network is quasi-homogeneous at best); build {kind}(…, bias=False)",
                bias,
            )
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
            advice = "remove it, or measure raw margins only"
        else:
            advice = "use a positively homogeneous one (ReLU, leaky ReLU, squared ReLU, identity)"
        return NotHomogeneousError(
            f"not multi-homogeneous: the module {name!r} ({kind}) does not scale with its input; {advice}",
            name,
        )
    # No module is to blame by itself: a parameter is. One that fails because of another (a
    # weight below a hidden bias) is usually the larger of the two.
    sizes = {group: sum(probe.parameters[n].numel() for n in group) for group in failing}
    offender = min(failing, key=lambda group: sizes[group])[0]
    return NotHomogeneousError(
        f"not multi-homogeneous: scaling {offender!r} by a does not scale the output by a power of a "
        "(is it a bias or a slope inside a hidden layer, or followed by a function that is not "
        "positively homogeneous?); remove it, or use ReLU-like activations without biases",
        offender,
    )
