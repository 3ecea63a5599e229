"""Networks from specification strings and from their recorded configuration.

Source: marginflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from marginflow._checks import unknown
from marginflow._specs import Spec, integer, parse, word
from marginflow.errors import InputError, ModelError, SpecificationError
from marginflow.models._networks import Network, cnn, deep_linear, mlp
from marginflow.models._structured import conv_linear, diagonal_linear
from marginflow.models._weights import check_weights, load_weights


def build(
    spec: str | Mapping[str, Any],
    *,
    input_shape: Sequence[int] = (),
    outputs: int = 1,
    seed: int | None = None,
) -> Network:
    """A network from its specification or from the ``config`` of another one.

    ``mlp:1024,64`` (hidden widths; input and output come from the data),
    ``mlp:1024,64,activation=squared-relu``, ``deep-linear:10,10``,
    ``diagonal-linear:depth=2``, ``conv-linear:depth=3``, ``cnn`` or
    ``cnn:32,64,hidden=128,kernel=5``.

    Args:
        spec: specification string, or a recorded configuration (which already
            holds all sizes; ``input_shape`` and ``outputs`` are then ignored).
        input_shape: shape of one example.
        outputs: number of outputs.
        seed: seed of the initialisation.

    Raises:
        SpecificationError: malformed, or an unknown name (the nearest is given).
        InputError: sizes that do not fit.
        ModelError: a recorded configuration that is not one of ours; more than 2³¹ weights, or than
            fit into memory.
    """
    if isinstance(spec, Mapping):
        return _from_config(spec, seed)
    parsed = parse(spec, "model")
    count = number_of_weights(spec, input_shape=input_shape, outputs=outputs)
    if count > _MOST_WEIGHTS:
        raise ModelError(
            f"model {spec[:80]!r}: expected at most {_MOST_WEIGHTS:,} weights, got {count:,}; make it "
            "smaller, or build it yourself"
        )
    try:
        return _KINDS[parsed.name](parsed, tuple(input_shape), outputs, seed)
    except (MemoryError, OverflowError, RuntimeError) as error:
        # PyTorch's allocator has no class of its own.
        if (
            not isinstance(error, MemoryError)
            and "alloc" not in str(error)
            and "size" not in str(error)
        ):
            raise
        raise ModelError(
            f"model {spec!r}: expected a network that fits into memory; make its layers smaller"
        ) from None


def _mlp(spec: Spec, shape: tuple[int, ...], outputs: int, seed: int | None) -> Network:
    options = spec.parsed({"activation": word})
    return mlp(_features(shape), *_widths(spec), outputs, **options, seed=seed)


def _deep_linear(spec: Spec, shape: tuple[int, ...], outputs: int, seed: int | None) -> Network:
    spec.parsed({})
    return deep_linear(_features(shape), *_widths(spec), outputs, seed=seed)


def _cnn(spec: Spec, shape: tuple[int, ...], outputs: int, seed: int | None) -> Network:
    options = spec.parsed({"activation": word, "hidden": integer, "kernel": integer})
    widths = _widths(spec)
    if widths:
        if len(widths) != 2:
            raise SpecificationError(
                f"model {spec.text!r}: expected two numbers of channels, as in cnn:32,64"
            )
        options["channels"] = (widths[0], widths[1])
    return cnn(shape, outputs, **options, seed=seed)


def _widths(spec: Spec) -> list[int]:
    return [integer(arg, f"model {spec.text!r}") for arg in spec.args]


def _features(shape: tuple[int, ...]) -> int:
    features = 1
    for side in shape:
        features *= side
    return features


def _structured(make: Callable[..., Network]) -> Callable[..., Network]:
    def build_it(spec: Spec, shape: tuple[int, ...], outputs: int, seed: int | None) -> Network:
        if spec.args or outputs != 1:
            raise SpecificationError(
                f"model {spec.text!r}: expected {spec.name}:depth=L and data of two classes"
            )
        return make(_features(shape), spec.parsed({"depth": integer}).get("depth", 2), seed=seed)

    return build_it


def rebuild(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Network:
    """The recorded network with these ``weights``, of their dtype.

    Shapes are compared before anything is allocated: whatever the record declares, no more memory is
    taken than the weights take.

    Args:
        config: a recorded configuration.
        weights: of a network of this configuration, by name, each of its shape.

    Raises:
        ModelError: the weights are those of another network, or the record is damaged.
        InputError: sizes that do not fit.
    """
    if not isinstance(config, Mapping):
        raise ModelError("the model is not recorded; build it yourself")
    depth, widths = config.get("depth"), config.get("widths")
    layers = len(widths) - 1 if isinstance(widths, Sequence) else 0
    if max(layers, depth if isinstance(depth, int) else 0) > len(weights):
        raise ModelError(
            f"the checkpoint is of another model: it has {len(weights)} weights, the recorded model "
            "has more layers"
        )
    try:
        with torch.device("meta"):
            check_weights(_from_config(config, 0), weights)
    except (RuntimeError, OverflowError) as error:
        raise ModelError(
            f"the recorded configuration of the model is damaged: {str(error).splitlines()[0]}"
        ) from None
    # A seed, that the global generator stays as it is; the weights are replaced.
    network = _from_config(config, 0).to(next(iter(weights.values())).dtype)
    load_weights(network, weights)
    return network


def number_of_weights(spec: str, *, input_shape: Sequence[int], outputs: int) -> int:
    """How many weights the network of a specification has, without allocating them.

    Args:
        spec: as for :func:`build`.
        input_shape: as for :func:`build`.
        outputs: as for :func:`build`.

    Raises:
        InputError: as for :func:`build`; or more than 10,000 layers.
        ModelError: sizes that no network has.
    """
    parsed = parse(spec, "model")
    if parsed.name not in _KINDS:
        raise unknown("model", parsed.name, _KINDS)
    depth = parsed.options.get("depth", "0")
    layers = max(len(parsed.args), int(depth) if depth.isdecimal() and len(depth) < 20 else 0)
    if layers > _MOST_LAYERS:
        raise SpecificationError(f"model: expected at most {_MOST_LAYERS:,} layers, got {layers:,}")
    try:
        with torch.device("meta"):
            network = _KINDS[parsed.name](parsed, tuple(input_shape), outputs, None)
    except (RuntimeError, OverflowError) as error:
        raise ModelError(f"model {spec[:80]!r}: {str(error).splitlines()[0]}") from None
    return sum(p.numel() for p in network.parameters())


_MOST_LAYERS = 10_000
_MOST_WEIGHTS = 2**31  # of a specification: 8 GiB in float32

_KINDS: dict[str, Callable[[Spec, tuple[int, ...], int, int | None], Network]] = {
    "cnn": _cnn,
    "conv-linear": _structured(conv_linear),
    "deep-linear": _deep_linear,
    "diagonal-linear": _structured(diagonal_linear),
    "mlp": _mlp,
}


def _from_config(config: Mapping[str, Any], seed: int | None) -> Network:
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    try:
        if kind == "mlp":
            return mlp(*arguments.pop("widths"), **arguments, seed=seed)
        if kind == "deep-linear":
            return deep_linear(*arguments.pop("widths"), **arguments, seed=seed)
        if kind in ("conv-linear", "diagonal-linear"):
            make = conv_linear if kind == "conv-linear" else diagonal_linear
            return make(**arguments, seed=seed)
        if kind == "cnn":
            arguments["channels"] = tuple(arguments["channels"])
            return cnn(**arguments, seed=seed)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise ModelError(f"the recorded configuration of the model is damaged: {error}") from None
    raise ModelError(f"the recorded model is of an unknown kind {kind!r}; build it yourself")
