"""What ``measure`` measures: the network of a run, or a file of weights with a model to hold them."""

from __future__ import annotations

import importlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marginflow.errors import InputError, ModelError

if TYPE_CHECKING:
    from torch import nn

    from marginflow import Dataset, Run

_FILES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, eq=False)
class Subject:
    """A network with its weights, and the data it is measured on.

    Attributes:
        model: the network.
        data: the whole data set.
        run: where both come from, or None for a file of weights; then one in memory.
        loss: whose logarithm is printed, or None.
        attack: the attack that is measured with unless another is asked for.
        dtype: that of the run, or of the weights.
    """

    model: nn.Module
    data: Dataset
    run: Run
    loss: str | None
    attack: str
    dtype: str


def subject_of(
    path: Path, *, model: str | None, data: str | None, data_dir: Path | None
) -> Subject:
    """The network in the run directory or the file of weights ``path``.

    Args:
        path: a run directory, a ``.safetensors`` file, or a state dict that ``torch.save`` wrote.
        model: a specification, or ``package.module:function``, which returns the network.
        data: the specification of the data; by default the run's own.
        data_dir: folder of the MNIST files.

    Raises:
        InputError: something that is missing, or that cannot be used.
        RunError: no run there.
        ModelError: weights of another network.
    """
    return (
        _of_weights(path, model, data, data_dir)
        if os.path.isfile(path) or path.suffix in _FILES
        else _of_run(path, model, data, data_dir)
    )


def _of_run(path: Path, model: str | None, data: str | None, data_dir: Path | None) -> Subject:
    import marginflow as mf

    run = mf.load_run(path)
    config = run.config
    found = run.load_data(data_dir=data_dir) if data is None else mf.load(data, data_dir=data_dir)
    if model is None and not config.get("model"):
        raise InputError(
            f"the run {run.name!r} trained a model of its own kind; name the function that builds it: "
            "--model package.module:function"
        )
    network = run.load_model(None if model is None else build_model(model, found))
    return Subject(
        network,
        found,
        run,
        config.get("loss"),
        str(config.get("measure_with") or "none"),
        str(config.get("dtype") or "float32"),
    )


def _of_weights(path: Path, model: str | None, data: str | None, data_dir: Path | None) -> Subject:
    import marginflow as mf
    from marginflow.models import load_weights, read_weights
    from marginflow.runs import Metrics

    for option, value, example in (
        ("--model", model, "mlp:256,32 or package.module:function"),
        ("--data", data, "mnist:3,8 or npz:PATH"),
    ):
        if value is None:
            raise InputError(f"{str(path)!r} holds weights only: give {option} ({example})")
    found = mf.load(str(data), data_dir=data_dir)
    weights = read_weights(path)
    network = build_model(str(model), found)
    kinds = {
        str(w.dtype).removeprefix("torch.") for w in weights.values() if w.dtype.is_floating_point
    }
    load_weights(network, weights, wrapped=True)
    config: dict[str, Any] = {"model_spec": model, "data": data}
    dtype = "float64" if kinds == {"float64"} else "float32"
    return Subject(network, found, mf.Run(config, Metrics(), None, network), None, "none", dtype)


def own_parts(
    path: Path, *, model: str | None, data: str | None, data_dir: Path | None
) -> tuple[Dataset | None, nn.Module | None]:
    """The data and the architecture that the run in ``path`` cannot name itself, as far as given.

    Raises:
        InputError: something that cannot be used.
        RunError: no run there, or other data than its own.
    """
    import marginflow as mf

    if model is None and data is None:
        return None, None
    run = mf.load_run(path)
    given = None if data is None else mf.load(data, data_dir=data_dir)
    found = run.load_data(given, data_dir=data_dir)
    return found, None if model is None else build_model(model, found)


def build_model(spec: str, data: Dataset) -> nn.Module:
    """A network of ours for ``data``, or what ``package.module:function`` returns.

    The function is called without arguments; modules are looked for in the working folder too.

    Raises:
        InputError: no such module or function, or one that gives no network.
        SpecificationError: no such network of ours.
    """
    from torch import nn

    from marginflow.models import build

    if not _FUNCTION.fullmatch(spec):
        if "." in spec.partition(":")[0]:
            raise InputError(f"--model: expected package.module:function, got {spec!r}")
        return build(spec, input_shape=data.shape, outputs=1 if data.binary else data.num_classes)
    place, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(place)
    except ImportError as error:
        raise InputError(
            f"--model: cannot import {place!r} ({error}); call from the folder that holds it"
        ) from None
    function = getattr(module, name, None)
    if isinstance(function, nn.Module):
        return function
    if not callable(function):
        raise InputError(f"--model: the module {place!r} has no function {name!r}")
    try:
        found = function()
    except Exception as error:
        raise InputError(f"--model: {spec} failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise ModelError(
            f"--model: expected {spec} to return a torch.nn.Module, got {type(found).__name__}"
        )
    return found
