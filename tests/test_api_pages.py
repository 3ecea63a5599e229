"""Every public name stands on exactly one page of the API reference, and every name there is public."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import marginflow as mf
from page_blocks import DOCS

FOLDER = DOCS / "api"
NEEDS_LIGHTNING = "marginflow.lightning"  # cannot be imported where Lightning is not installed
NO_REFERENCE = {"cli"}  # `marginflow --help` is the reference of the command line


def names_of(module: str) -> list[str]:
    """``__all__``, or what a module without one defines under public names."""
    if module == NEEDS_LIGHTNING:
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        defined = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
        kinds = (ast.ClassDef, ast.FunctionDef)
        return [n.name for n in defined if isinstance(n, kinds) and not n.name.startswith("_")]
    loaded = importlib.import_module(module)
    if hasattr(loaded, "__all__"):
        return list(loaded.__all__)
    return [
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]


def thing(path: str) -> object:
    """What a path means: the same for all paths of one object."""
    module, _, name = path.rpartition(".")
    if module == NEEDS_LIGHTNING:
        return path
    value = getattr(importlib.import_module(module), name)
    if isinstance(value, ModuleType):
        return value.__name__
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__module__, value.__qualname__
    # Constants and aliases of types know no home; one that is exported twice is the same object.
    return name, id(value)


def public() -> dict[object, list[str]]:
    """Every public object, with the paths under which it is public, shortest first."""
    found: dict[object, list[str]] = defaultdict(list)
    modules = {info.name for info in pkgutil.iter_modules(mf.__path__)} - NO_REFERENCE
    for name in mf.__all__:
        if name not in modules:
            found[thing(f"marginflow.{name}")].append(f"marginflow.{name}")
    for module in sorted(modules):
        if not module.startswith("_"):
            for name in names_of(f"marginflow.{module}"):
                path = f"marginflow.{module}.{name}"
                found[thing(path)].append(path)
    return found


def on_pages() -> dict[str, str]:
    """Every path of the reference, and its page."""
    listed = [
        (path, page.name)
        for page in sorted(FOLDER.glob("*.md"))
        for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    twice = [path for path, count in Counter(path for path, _ in listed).items() if count > 1]
    assert twice == []
    return dict(listed)


def test_every_public_name_is_on_exactly_one_page() -> None:
    pages, names = on_pages(), public()
    missing = [paths[0] for paths in names.values() if not any(p in pages for p in paths)]
    assert missing == [], "write `::: PATH` on the page of docs/api/ where a reader looks for it"
    twice = [[p for p in paths if p in pages] for paths in names.values()]
    assert [paths for paths in twice if len(paths) > 1] == []


def test_every_name_of_the_pages_is_public() -> None:
    known = {path for paths in public().values() for path in paths}
    assert sorted(set(on_pages()) - known) == []


def test_a_name_of_the_top_level_is_shown_as_such() -> None:
    """A reader writes ``mf.Dataset``, not ``mf.datasets.Dataset``."""
    pages = on_pages()
    short = [paths[0] for paths in public().values() if paths[0].count(".") == 1]
    assert [path for path in short if path not in pages] == []


def test_the_overview_names_every_page() -> None:
    text = (FOLDER / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\((\w+\.md)\)", text)
    assert sorted(listed) == sorted(p.name for p in FOLDER.glob("*.md") if p.name != "index.md")
