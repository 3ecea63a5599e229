"""Weights from files, and into a network: all of them or none.

Source: marginflow.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from marginflow._checks import place
from marginflow._reading import open_file, read_file
from marginflow.errors import InputError, ModelError

_INSIDE = ("state_dict", "model_state_dict", "model")
"""Where other people's checkpoints keep the weights."""

_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""What wrappers put before every name."""


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, wrapped: bool = False) -> None:
    """Put ``weights`` into ``model``, all of them or none.

    Args:
        model: changed.
        weights: by name, each of the shape of the model's own.
        wrapped: also take weights whose names have one of the usual prefixes of wrappers (``module.``,
            ``model.`` …) before the model's own, as ``DataParallel`` and Lightning save them.

    Raises:
        ModelError: names or shapes that are not the model's, or whole numbers for its weights; NaN or
            infinity in a weight, NaN in a buffer.
    """
    if wrapped:
        own = model.state_dict()
        weights = next((w for w in _unwrapped(weights) if w.keys() == own.keys()), weights)
    check_weights(model, weights)
    learned = {name for name, _ in model.named_parameters()}
    for name, value in weights.items():
        # A buffer may hold infinity on purpose, as a mask does.
        wrong = ~torch.isfinite(value) if name in learned else torch.isnan(value)
        if bool(wrong.any()):
            raise ModelError(
                f"the checkpoint: expected finite weights, got NaN or infinity in {int(wrong.sum())} of the "
                f"{value.numel()} entries of {name!r}; use an earlier checkpoint, or other weights"
            )
    model.load_state_dict(weights)


def check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of ``model``, which may lie on the meta device.

    Args:
        model: not changed.
        weights: by name.

    Raises:
        ModelError: names, shapes or kinds of numbers that are not the model's.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights:
            side = "the model" if name not in own else "the checkpoint"
            raise ModelError(f"the checkpoint is of another model: {side} has no {name!r}")
        if own[name].is_floating_point() != weights[name].is_floating_point():
            raise ModelError(
                f"the checkpoint is of another model: {name!r} is of {weights[name].dtype} in it"
            )
        if own[name].shape != weights[name].shape:
            raise ModelError(
                f"the checkpoint is of another model: {name!r} has shape {tuple(weights[name].shape)} "
                f"in it, {tuple(own[name].shape)} in the model"
            )


def _unwrapped(weights: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """``weights`` without the prefix of a wrapper, or of two, and without what stands beside it."""
    yield weights
    for prefix in _WRAPPERS:
        inner = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        if inner:
            yield from _unwrapped(inner)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights in a ``.safetensors`` file or a state dict that ``torch.save`` wrote.

    Reading runs no code: ``torch.load(weights_only=True)``. Of a checkpoint that holds more, the entry
    ``state_dict``, ``model_state_dict`` or ``model`` is taken.

    Args:
        path: the file.

    Returns:
        by name, each of the shape that it was saved with, on the CPU.

    Raises:
        InputError: no such file, a damaged one, or one that holds no weights or objects beside them.
    """
    path = place("path", path)
    try:
        if path.suffix == ".safetensors":
            return load_tensors(read_file(path))
        with open_file(path) as file:
            _check_archive(file)
            with warnings.catch_warnings():
                # Of pickles that PyTorch did not write; what it cannot restore, it refuses.
                warnings.simplefilter("ignore", UserWarning)
                found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no file {str(path)!r}") from None
    except (pickle.UnpicklingError, EOFError, LookupError):
        raise InputError(
            f"{str(path)!r} is no file of weights, or holds objects beside them that only running code could "
            "restore; save model.state_dict() alone, or as .safetensors"
        ) from None
    except Exception as error:
        # Whatever torch and zipfile may raise on a forged file: EOFError, RuntimeError, KeyError,
        # BadZipFile, OverflowError and more.
        raise InputError(f"cannot read weights from {str(path)!r}: {error}") from None
    while isinstance(found, Mapping) and not _is_state(found):
        inside = [found[name] for name in _INSIDE if isinstance(found.get(name), Mapping)]
        if not inside:
            break
        found = inside[0]
    if not _is_state(found):
        raise InputError(
            f"{str(path)!r}: expected weights by name, as model.state_dict() gives them, got "
            f"{type(found).__name__}"
        )
    return dict(found)


def _check_archive(file: BinaryIO) -> None:
    """Refuse compressed archives: torch.save makes none, and a small one may unpack to any size."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("it is compressed, as torch.save never does")
    file.seek(0)


def _is_state(found: object) -> bool:
    return (
        isinstance(found, Mapping)
        and bool(found)
        and all(isinstance(n, str) and isinstance(w, Tensor) for n, w in found.items())
    )
