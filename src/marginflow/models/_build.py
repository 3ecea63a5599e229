"""Networks from specification strings and from their recorded configuration.

Source: marginflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from marginflow._checks import unknown
from marginflow._specs import Spec, integer, parse, word
from marginflow.errors import ModelError, SpecificationError
from marginflow.models._networks import Network, cnn, deep_linear, mlp
from marginflow.models._structured import conv_linear, diagonal_linear


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
        ModelError: a recorded configuration that is not one of ours.
    """
    if isinstance(spec, Mapping):
        return _from_config(spec, seed)
    parsed = parse(spec, "model")
    if parsed.name not in _KINDS:
        raise unknown("model", parsed.name, _KINDS)
    return _KINDS[parsed.name](parsed, tuple(input_shape), outputs, seed)


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
    except (KeyError, TypeError) as error:
        raise ModelError(f"the recorded configuration of the model is damaged: {error}") from None
    raise ModelError(f"the recorded model is of an unknown kind {kind!r}; build it yourself")
