"""What a foreign loop hands over: models in wrappers, data in many forms."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from marginflow._checks import instance
from marginflow.attacks import build
from marginflow.datasets import Dataset
from marginflow.errors import InputError
from marginflow.losses import Loss
from marginflow.monitor._record import for_json

Data = Dataset | tuple[Any, Any] | Iterable[tuple[Any, Any]]
"""A data set, a pair (x, y), or batches of such pairs, as a ``DataLoader`` gives them."""

DECLARED = ("attack", "batch_size", "derivative", "epochs", "loss", "lr", "momentum", "seed")
"""What a loop may say of itself: the settings that verdicts and reports ask for."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def as_dataset(data: Data) -> Dataset:
    """One data set of what was given; batches are read once and kept in memory.

    Raises:
        InputError: none of the forms.
        DataError: examples or labels that cannot be used.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, tuple | list) and len(data) == 2 and not isinstance(data[0], tuple | list):
        return Dataset(*(_ordinary(torch.as_tensor(part)) for part in data))
    batches = []
    if isinstance(data, Iterable) and not isinstance(data, Tensor | str | Mapping | tuple):
        with _states_kept(data):
            # Of a copy: a loader with persistent workers keeps its first iterator.
            batches = list(copy.copy(data))
    pairs = [(b[0], b[1]) for b in batches if isinstance(b, tuple | list) and len(b) == 2]
    if not pairs or len(pairs) < len(batches):
        raise InputError(
            "data: expected a Dataset, a pair (x, y) or a loader of batches (x, y), got "
            f"{type(data).__name__}{' of something else' if batches else ''}"
        )
    x, y = ([torch.as_tensor(part) for part in side] for side in zip(*pairs, strict=True))
    return Dataset(_ordinary(torch.cat(x)), _ordinary(torch.cat(y)))


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd takes: those of inference mode it does not."""
    return tensor.clone() if tensor.is_inference() else tensor


@contextmanager
def _states_kept(loader: object) -> Iterator[None]:
    """Every random state that reading a loader may move, put back: training goes on with them."""
    parts = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    parts.append(getattr(parts[2], "sampler", None))
    own = {
        id(g): g for p in parts if isinstance(g := getattr(p, "generator", None), torch.Generator)
    }
    states = [(generator, generator.get_state()) for generator in own.values()]
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


def declared(training: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a loop as ``run.json`` holds them, None for what it does not say.

    Raises:
        InputError: a name that is none of :data:`DECLARED`.
    """
    if training is not None:
        instance("training", training, Mapping, "a mapping of settings")
    given = dict(training or {})
    for name in given:
        if name not in DECLARED:
            raise InputError(f"training: expected names out of {', '.join(DECLARED)}, got {name!r}")
    if "attack" in given:
        attack = build(given["attack"])
        given["attack"] = "none" if attack is None else attack.spec
    if isinstance(given.get("loss"), Loss):
        given["loss"] = given["loss"].name
    given = {name: plain(f"training: {name}", value) for name, value in given.items()}
    return {name: given.get(name) for name in DECLARED}


def plain(name: str, value: Any) -> Any:
    """What a caller adds to a record, as JSON can hold it: tensors and numpy's numbers as Python's."""
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", None) is not None and math.prod(value.shape) == 1:
        value = item()
    try:
        json.dumps(for_json(value))
    except (TypeError, ValueError):
        raise InputError(
            f"{name}: expected a number, text or a list of them, got {type(value).__name__}"
        ) from None
    return value
