"""auto-LiRPA as it is installed, and what its release 0.3 needs to run on today's PyTorch.

Release 0.3, the newest on the package index, was written for PyTorch 1. Each difference is bridged
only while the library is imported or reads a network; afterwards nothing of it is left. Releases
from 0.4 on (the project's own repository) are used as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from marginflow._checks import optional
from marginflow.errors import MissingDependencyError

INSTALL = "pip install --no-deps auto-LiRPA==0.3 appdirs pyyaml ninja tqdm"
"""Without dependencies: it asks for a PyTorch below 1.13, which it does not need."""

_PARSER = "auto_LiRPA.parse_graph"


def is_installed() -> bool:
    """Whether the library is there; it is not imported."""
    if "auto_LiRPA" in sys.modules:
        return sys.modules["auto_LiRPA"] is not None
    return importlib.util.find_spec("auto_LiRPA") is not None


def load() -> Any:
    """The module ``auto_LiRPA``.

    Raises:
        MissingDependencyError: it, or something that it imports, is not installed.
    """
    purpose = "bounding margins by intervals or CROWN"
    try:
        with _quiet(), _importable():
            return optional("auto_LiRPA", "auto-LiRPA", purpose, command=INSTALL)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(str(error.name), purpose, command=INSTALL) from error


def bounded_module(
    library: Any, model: torch.nn.Module, x: torch.Tensor, *, patches: bool = True
) -> Any:
    """The library's form of a network, read off a pass over x.

    Args:
        library: the module ``auto_LiRPA``.
        model: the network.
        x: inputs.
        patches: keep convolutions' linear bounds as patches, or as whole matrices.
    """

    class Bounded(library.BoundedModule):  # type: ignore[misc]
        # PyTorch 2 passes `remove_duplicate`, which the release's own method does not take.
        def _named_members(self, *args: Any, remove_duplicate: bool = True, **rest: Any) -> Any:
            return super()._named_members(*args, **rest)

    with computing():
        options = {"conv_mode": "patches" if patches else "matrix"}
        return (Bounded if _is_old() else library.BoundedModule)(model, x, bound_opts=options)


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Around everything that the library does: float64 throughout, no gradients, no warnings."""
    dtype = torch.get_default_dtype()
    with _quiet(), _readable(), torch.no_grad(), np.errstate(divide="ignore"):
        # It makes zeros of the default dtype, which a max-pool then mixes with the network's.
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def version() -> str:
    """Of the library."""
    return importlib.metadata.version("auto-LiRPA")


def _is_old() -> bool:
    major, minor = version().split(".")[:2]
    return (int(major), int(minor)) < (0, 4)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Deprecations of the library are no business of who asks for a bound, nor is what it prints."""
    # It logs the weights of a network that it refuses, as errors.
    logger = logging.getLogger("auto_LiRPA.utils")
    was_off, logger.disabled = logger.disabled, True
    try:
        # Recorded, not only ignored: the library sets a filter of its own when imported.
        with (
            warnings.catch_warnings(record=True),
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_off


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """What 0.3 imports and is no longer there; and it configures the root logger, which is ours."""
    # Under its full name: `torch.onnx.symbolic_helper` as an attribute is another module.
    symbolic_helper: Any = importlib.import_module("torch.onnx.symbolic_helper")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    gone = "numpy.lib.arraysetops"
    sets = types.ModuleType(gone)
    sets.isin = np.isin  # type: ignore[attr-defined]
    lent_sets = gone not in sys.modules
    lent_opset = not hasattr(symbolic_helper, "_set_opset_version")
    if lent_sets:
        sys.modules[gone] = sets
    if lent_opset:
        symbolic_helper._set_opset_version = _set_opset_version
    try:
        yield
    finally:
        if lent_sets:
            del sys.modules[gone]
        if lent_opset:
            del symbolic_helper._set_opset_version
        root.handlers[:] = handlers
        root.setLevel(level)


def _set_opset_version(number: int) -> None:
    """As PyTorch 1 had it; 0.3 reads graphs of operator set 12."""
    from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

    GLOBALS.export_onnx_opset_version = number


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Let 0.3 read a traced graph: nodes indexed by attribute, as in PyTorch 1."""
    if not _is_old():
        yield
        return
    from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

    node: Any = torch._C.Node
    number = GLOBALS.export_onnx_opset_version
    lent = not hasattr(node, "__getitem__")
    if lent:
        node.__getitem__ = lambda self, key: getattr(self, self.kindOf(key))(key)
    try:
        yield
    finally:
        if lent:
            del node.__getitem__
        GLOBALS.export_onnx_opset_version = number
