"""What a foreign loop hands over: models in wrappers, data in many forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from marginflow.attacks import Attack
from marginflow.datasets import Dataset
from marginflow.errors import InputError
from marginflow.losses import Loss

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
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], tuple | list):
        return Dataset(*data)
    batches = []
    if isinstance(data, Iterable) and not isinstance(data, Tensor | str | Mapping | tuple):
        # A shuffling loader draws from the global generator, whose state is not ours to change.
        with torch.random.fork_rng(devices=[]):
            batches = list(data)
    pairs = [(b[0], b[1]) for b in batches if isinstance(b, tuple | list) and len(b) == 2]
    if not pairs or len(pairs) < len(batches):
        raise InputError(
            "data: expected a Dataset, a pair (x, y) or a loader of batches (x, y), got "
            f"{type(data).__name__}{' of something else' if batches else ''}"
        )
    x, y = ([torch.as_tensor(part) for part in side] for side in zip(*pairs, strict=True))
    return Dataset(torch.cat(x), torch.cat(y))


def declared(training: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a loop as ``run.json`` holds them, None for what it does not say.

    Raises:
        InputError: a name that is none of :data:`DECLARED`.
    """
    given = dict(training or {})
    for name in given:
        if name not in DECLARED:
            raise InputError(f"training: expected names out of {', '.join(DECLARED)}, got {name!r}")
    attack, loss = given.get("attack"), given.get("loss")
    if "attack" in given:
        given["attack"] = "none" if attack is None else attack
    if isinstance(attack, Attack):
        given["attack"] = attack.spec
    if isinstance(loss, Loss):
        given["loss"] = loss.name
    return {name: given.get(name) for name in DECLARED}
