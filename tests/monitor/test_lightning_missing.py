"""Without Lightning, its callback says how to get it."""

from __future__ import annotations

import importlib
import sys

import pytest

from marginflow.errors import MissingDependencyError


@pytest.mark.parametrize("kept", ["lightning", "pytorch_lightning"])
def test_the_install_command(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("lightning", "pytorch_lightning"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "marginflow.lightning", raising=False)
    # None in sys.modules: not installed. pytorch_lightning counts only where it is loaded already.
    monkeypatch.setitem(sys.modules, "lightning", None)
    if kept == "lightning":
        monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'marginflow\[lightning\]'$"):
        importlib.import_module("marginflow.lightning")
    assert "marginflow.lightning" not in sys.modules
