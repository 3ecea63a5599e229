"""Google-style docstrings and the public names of the package, as data for test_docstrings.py."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import pkgutil
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

PACKAGE = "marginflow"
SECTIONS = ("Args", "Attributes", "Examples", "Raises", "Returns", "Yields")
_HEADER = re.compile(rf"^({'|'.join(SECTIONS)}):$")
_ENTRY = re.compile(r"^ {4}(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*): (.*)$")
_AS_FOR = re.compile(r"\b[Aa]rguments?\b[^.:]*? as (?:for|of) :(?:func|meth|class):`~?([\w.]+)`")


@dataclasses.dataclass(frozen=True)
class Docstring:
    """A docstring in parts: what stands before the sections, entries by name, free sections."""

    text: str
    summary: str
    entries: dict[str, dict[str, str]]
    free: dict[str, str]
    odd: tuple[str, ...]

    def __getitem__(self, section: str) -> dict[str, str]:
        return self.entries.get(section, {})


def parse(text: str) -> Docstring:
    """The sections of a docstring; lines of Args, Attributes and Raises that are no entries are odd."""
    lines = inspect.cleandoc(text).splitlines()
    entries: dict[str, dict[str, str]] = {}
    free: dict[str, list[str]] = {}
    odd: list[str] = []
    section, names = "", ()
    for line in lines:
        header = _HEADER.match(line)
        if header:
            section, names = header[1], ()
            entries.setdefault(section, {})
            free.setdefault(section, [])
        elif section and line and not line.startswith(" "):
            section = ""  # prose after the sections
        elif section in ("Args", "Attributes", "Raises"):
            entry = _ENTRY.match(line)
            if entry:
                names = tuple(name.strip("* ") for name in entry[1].split(","))
                for name in names:
                    entries[section][name] = entry[2]
            elif line.startswith(" " * 6) and names:
                for name in names:
                    entries[section][name] += " " + line.strip()
            elif line:
                odd.append(line.strip())
        elif section:
            free[section].append(line)
    joined = {name: "\n".join(body).strip() for name, body in free.items()}
    return Docstring("\n".join(lines), lines[0] if lines else "", entries, joined, tuple(odd))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A public name, or a public member of a public class."""

    path: str
    kind: str  # "function", "class", "method", "property" or "value"
    value: Any
    owner: type | None = None

    @functools.cached_property
    def doc(self) -> Docstring:
        if self.kind == "value":
            return parse(self.value or "")
        text = inspect.getdoc(self.value) or ""
        if self.owner is not None and not text:
            text = _inherited(self.owner, self.path.rpartition(".")[2])
        generated = self.kind == "class" and text.startswith(f"{self.value.__name__}(")
        return parse("" if generated else text)

    @property
    def module(self) -> ModuleType:
        return importlib.import_module((self.owner or self.value).__module__)


def _inherited(owner: type, name: str) -> str:
    for base in owner.__mro__[1:]:
        text = inspect.getdoc(vars(base)[name]) if name in vars(base) else None
        if text:
            return text
    return ""


def modules() -> list[str]:
    """The public modules of the package, and those public modules that ``__all__`` of one leads to."""
    package = importlib.import_module(PACKAGE)
    return sorted(
        info.name
        for info in pkgutil.iter_modules(package.__path__)
        if not info.name.startswith("_")
    )


def names_of(module: ModuleType) -> list[str]:
    """``__all__``, or what a module without one defines under public names."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def public(module_name: str) -> Iterator[Subject]:
    """Every public name of ``marginflow.module_name``, each followed by the members of its class."""
    module = importlib.import_module(f"{PACKAGE}.{module_name}")
    for name in names_of(module):
        value = getattr(module, name)
        path = f"{module_name}.{name}"
        if inspect.isclass(value):
            yield Subject(path, "class", value)
            yield from _members(value, path)
        elif inspect.isfunction(value):
            yield Subject(path, "function", value)
        elif not inspect.ismodule(value):
            yield Subject(path, "value", comment_of(module, name))


def _members(owner: type, path: str) -> Iterator[Subject]:
    seen = set()
    for base in owner.__mro__:
        if not base.__module__.startswith(PACKAGE):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen:
                continue
            seen.add(name)
            if isinstance(value, staticmethod | classmethod):
                yield Subject(f"{path}.{name}", "method", value.__func__, base)
            elif inspect.isfunction(value):
                yield Subject(f"{path}.{name}", "method", value, base)
            elif isinstance(value, property | functools.cached_property):
                yield Subject(f"{path}.{name}", "property", value, base)


@functools.cache
def tree_of(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def comment_of(module: ModuleType, name: str) -> str:
    """The string under the assignment of a constant, wherever in the package it stands."""
    body = tree_of(module).body
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in _assigned(node):
            return _comments(body).get(name, "")
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(PACKAGE):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return comment_of(importlib.import_module(str(node.module)), alias.name)
    return ""


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [getattr(t, "id", getattr(t, "attr", "")) for t in targets]


def _comments(body: list[ast.stmt]) -> dict[str, str]:
    """The strings that stand under assignments."""
    found: dict[str, str] = {}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
            text = after.value.value if isinstance(after.value, ast.Constant) else None
            if isinstance(text, str):
                found |= dict.fromkeys(_assigned(node), inspect.cleandoc(text))
    return found


def commented(kind: type) -> dict[str, str]:
    """The attributes of a class with a string under them, in its body or in ``__init__``."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith(PACKAGE):
            for node in ast.walk(tree_of(importlib.import_module(base.__module__))):
                if isinstance(node, ast.ClassDef) and node.name == base.__name__:
                    found |= _comments(node.body)
            init: Any = definition_of(vars(base).get("__init__"))
            found |= _comments(init.body) if init else {}
    return found


def unwrapped(value: Any) -> Callable[..., Any]:
    """The function of a property or of a decorated function."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property):
        value = value.func
    return inspect.unwrap(value)  # type: ignore[no-any-return]


def parameters(function: Callable[..., Any], *, bound: bool) -> dict[str, str]:
    """The parameters of a function and their annotations as written; without ``self``."""
    found = list(inspect.signature(unwrapped(function)).parameters.values())
    if bound and found and found[0].name in ("self", "cls"):
        found = found[1:]
    return {
        p.name: p.annotation if isinstance(p.annotation, str) else _written(p.annotation)
        for p in found
        if not p.name.startswith("_")
    }


def returned(function: Callable[..., Any]) -> str:
    """What a function is annotated to return, as written."""
    annotation = unwrapped(function).__annotations__.get("return", "")
    return annotation if isinstance(annotation, str) else _written(annotation)


def _written(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    forward = getattr(annotation, "__forward_arg__", None)  # of a named tuple
    return forward or getattr(annotation, "__name__", str(annotation))


def made_with(kind: type) -> dict[str, str]:
    """The arguments that a class of the package is made with, and their annotations."""
    init = kind.__init__  # type: ignore[misc]
    if not str(getattr(init, "__module__", "")).startswith(PACKAGE):
        return {}
    return parameters(init, bound=True)


def attributes(kind: type) -> dict[str, str]:
    """The public attributes of a class: annotated in its body, or set by its ``__init__``."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith(PACKAGE):
            continue
        for name, annotation in vars(base).get("__annotations__", {}).items():
            if not name.startswith("_"):
                found[name] = annotation if isinstance(annotation, str) else _written(annotation)
        definition = definition_of(vars(base).get("__init__"))
        for node in ast.walk(definition) if definition else ():
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own = isinstance(node.value, ast.Name) and node.value.id == "self"
                if own and not node.attr.startswith("_"):
                    found.setdefault(node.attr, "")
    others = [base for base in kind.__mro__ if not base.__module__.startswith(PACKAGE)]
    foreign = {name for base in others for name in vars(base).get("__annotations__", {})}
    return {name: annotation for name, annotation in found.items() if name not in foreign}


@functools.cache
def _definitions(module: ModuleType) -> dict[int, ast.AST]:
    return {
        line: node
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for line in [node.lineno, *(d.lineno for d in node.decorator_list)]
    }


def definition_of(function: Any) -> ast.AST | None:
    """The syntax tree of a function of the package; None of any other."""
    code = getattr(function, "__code__", None)
    home = str(getattr(function, "__module__", ""))
    if code is None or not home.startswith(PACKAGE):
        return None
    return _definitions(importlib.import_module(home)).get(code.co_firstlineno)


def referred(subject: Subject) -> Docstring | None:
    """The docstring that "Arguments as for :func:`other`" refers to."""
    match = _AS_FOR.search(subject.doc.text.replace("\n", " "))
    if match is None:
        return None
    *path, name = match[1].removeprefix(f"{PACKAGE}.").split(".")
    if not path and subject.owner is not None and hasattr(subject.owner, name):
        return parse(inspect.getdoc(getattr(subject.owner, name)) or "")
    holder: Any = subject.module
    for part in path:
        holder = getattr(holder, part, None) or getattr(importlib.import_module(PACKAGE), part)
    target = getattr(holder, name, None) or getattr(importlib.import_module(PACKAGE), name, None)
    return parse(inspect.getdoc(target) or "") if target is not None else None


def overridden(subject: Subject) -> Docstring | None:
    """The docstring of the method of a base that a method overrides; with arguments, if there is one."""
    if subject.owner is None:
        return None
    name = subject.path.rpartition(".")[2]
    for base in subject.owner.__mro__[1:]:
        doc = parse(inspect.getdoc(vars(base)[name]) or "") if name in vars(base) else None
        if doc is not None and doc["Args"]:
            return doc
    return None
