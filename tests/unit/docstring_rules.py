"""What a docstring of a public name must say: each rule yields what is missing, in words."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import docstring_sections as ds
from docstring_sections import Subject

from marginflow import errors

_ARRAY = re.compile(r"\b(?:Tensor|ndarray|NDArray|Array|Floats|Weights)\b")
_WORDS = "classes|examples|features|inputs|levels|outputs|rows|units"
_AXIS = rf"(?:…|\d+|[A-Za-zΣ]{{1,2}}\d?(?:_\w+)?[₀-₉ₖ]?|{_WORDS})"
_TERM = rf"{_AXIS}(?: ?[−+·×−-] ?{_AXIS})*"
SHAPE = re.compile(
    rf"\({_TERM},(?: {_TERM}(?:, {_TERM})*)?\)|\bscalar\b|\bflat\b|'s shape\b|\bof any shape\b"
    r"|\bshapes? (?:and dtype )?(?:of|as|that)\b|\b(?:its|same|their|these) shapes?\b|\bshaped like\b"
)
"""A shape: ``(n, d)``, ``(n,)``, ``(…)``, a scalar, or the shape of something else."""

SOURCE = re.compile(
    r"\bEqs?\. |\((?:Eq\. )?\d{1,3}\)|\bLemma \d|\bTheorem \d|\bSections? \d|\bDefinition \d"
    r"|\bDef\. \d|\bAssumptions? \d|\bAlgorithm \d|\bFigures? \d|\bAppendix |\bB\.5\b|§"
    r"|\((?:19|20)\d\d\)|\b(?:19|20)\d\d[,;.)]|^Source: \S",
    re.MULTILINE,
)
"""A statement of the paper, another publication with its year, or a line ``Source: …``."""


def summary(subject: Subject) -> Iterator[str]:
    """A docstring, with a first line that ends as a sentence does, and well-formed sections."""
    doc = subject.doc
    if not doc.summary:
        yield "no docstring"
        return
    if len(doc.summary) < 12:
        yield f"a summary that says little: {doc.summary!r}"
    for line in doc.odd:
        yield f"a line that is no entry of its section: {line!r}"
    for section, entries in doc.entries.items():
        if section not in ("Examples", "Returns", "Yields") and not entries:
            yield f"an empty section {section}"
        for name, text in entries.items():
            if not text.strip():
                yield f"{section}: nothing about {name!r}"


def arguments(subject: Subject) -> Iterator[str]:
    """Every parameter in Args, every attribute in Attributes, and none that does not exist."""
    doc = subject.doc
    if subject.kind in ("function", "method"):
        wanted = ds.parameters(subject.value, bound=subject.kind == "method")
        told = dict(doc["Args"])
        borrowed = ds.referred(subject) or ds.overridden(subject)
        for name in wanted:
            if name not in told and (borrowed is None or name not in borrowed["Args"]):
                yield f"Args: {name!r} is missing"
        for name in told:
            if name not in wanted:
                yield f"Args: {name!r} is no parameter"
    elif subject.kind == "class":
        made_with, held = ds.made_with(subject.value), ds.attributes(subject.value)
        said = {**_inherited_attributes(subject.value), **doc["Attributes"], **doc["Args"]}
        borrowed = ds.referred(subject)
        said |= {**ds.commented(subject.value), **(borrowed["Args"] if borrowed else {})}
        for name in {**made_with, **held}:
            if name not in said:
                field = name not in made_with or dataclasses.is_dataclass(subject.value)
                place = "Attributes" if field else "Args"
                yield f"{place}: {name!r} is missing"
        for name in doc["Args"]:
            if name not in made_with:
                yield f"Args: {name!r} is no argument of the class"
        for name in doc["Attributes"]:
            if name not in held and not hasattr(subject.value, name):
                yield f"Attributes: {name!r} is no attribute"


def _inherited_attributes(kind: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[1:]):
        if base.__module__.startswith(ds.PACKAGE):
            doc = ds.parse(base.__doc__ or "")
            found |= {**doc["Args"], **doc["Attributes"]}
    return found


def numbers(subject: Subject) -> Iterator[tuple[str, str, str]]:
    """What a subject takes, holds and gives: name, annotation as written, what is said of it."""
    doc = subject.doc
    if subject.kind == "class":
        said = {**doc["Args"], **doc["Attributes"]}
        held = {**ds.made_with(subject.value), **ds.attributes(subject.value)}
        for name, annotation in held.items():
            if name in said:
                yield name, annotation, said[name]
    elif subject.kind in ("function", "method"):
        found = ds.parameters(subject.value, bound=subject.kind == "method")
        for name, annotation in found.items():
            if name in doc["Args"]:
                yield name, annotation, doc["Args"][name]
    if subject.kind in ("function", "method", "property"):
        text = doc.free.get("Returns") or re.split(r"\n(?:Args|Raises):\n", doc.text)[0]
        yield "returns", ds.returned(subject.value), text


def shapes(subject: Subject) -> Iterator[str]:
    """The shape of every array that is taken, held or given."""
    for name, annotation, text in numbers(subject):
        if _ARRAY.search(annotation) and "Callable" not in annotation and not SHAPE.search(text):
            yield f"{name}: {annotation}, but no shape such as (n, d)"


_LEAD = r"(?:^|_)"
UNITS: dict[str, str] = {
    rf"{_LEAD}eps$": r"\bunits? of\b|\bpixel",
    r"^bounds$": r"\brange\b|\bclip_values\b",
    rf"{_LEAD}(?:seconds|every_seconds|timeout)$": r"\bseconds?\b",
    rf"{_LEAD}(?:bytes|memory)$": r"\bbytes\b",
    rf"{_LEAD}epochs?$": r"\bepochs?\b|\bpasses over the data\b",
    r"^(?:log|ln)_(?!every|to$)\w+$": r"\bln\b",
    r"^(?:rtol|atol|tolerance)$": r"\brelative|\babsolute",
    rf"{_LEAD}angle(?:_bound)?$": r"\bradians\b",
    rf"{_LEAD}(?:accuracy|share|fraction)$": r"\b[Ss]hares?\b|\[0, 1\]",
    r"^(?:lr|step_size|step)$": r"[ηξθ]|\blength\b|\bangle\b|\bvariable\b|\btrain\b",
    r"^p$": r"\bnorms?'?|\bexponent\b|\bdistance",
    rf"{_LEAD}inches$": r"\binch",
    r"^momentum$": r"\[0, 1\)",
}
"""What must be said of a number by its name: its unit, or how it is to be read."""

MEASURED = re.compile(
    r"``|[Α-Ωα-ω‖∞ξ]|\bln\b|[≤≥<>=]|[\[(][\d−-]+, ?[\d∞]+[\])]"
    r"|\b(?:[Ss]hare|radians|seconds|bytes|relative|absolute|inches|factor|epochs?|degree)\b"
    r"|\bunits? (?:of|that)\b|\b[KLRbmrt]\b"
)
"""Any other number: its formula or symbol, its range, or its unit."""


def units(subject: Subject) -> Iterator[str]:
    """The unit, the range or the formula of every real number; the unit of times, sizes and ε."""
    for name, annotation, text in numbers(subject):
        called = subject.path.rpartition(".")[2] if name == "returns" else name
        real = re.search(r"\bfloat\b", annotation) and "Callable" not in annotation
        whole = re.fullmatch(r"int(?: \| None)?", annotation) is not None
        wanted = [word for pattern, word in UNITS.items() if re.search(pattern, called)]
        if called == "step" and name == "returns":
            wanted = []  # a method that takes a step, and gives back a loss
        if not real and not (whole and re.search("seconds|bytes|epochs", called)):
            continue
        for word in wanted or [MEASURED.pattern] * bool(real):
            if not re.search(word, text):
                what = f"expected /{word}/" if wanted else "no unit, range or formula"
                yield f"{name}: {annotation}, but {what} in {text[:60]!r}"


def source(subject: Subject) -> Iterator[str]:
    """A statement of the paper, a publication, or "Source:", in the docstring or its module's."""
    if subject.kind in ("function", "class"):
        if SOURCE.search(subject.doc.text) or SOURCE.search(subject.module.__doc__ or ""):
            return
        yield "no source: neither here nor in the docstring of its module"


def raises(subject: Subject) -> Iterator[str]:
    """Every error of marginflow that the code raises, by itself or through private helpers."""
    doc = subject.doc
    named = set(doc["Raises"])
    borrowed = ds.referred(subject)
    if borrowed is not None and re.search(r"\berrors\b", doc.text):
        named |= set(borrowed["Raises"])
    for name in doc["Raises"]:
        if not hasattr(errors, name) and not hasattr(builtins, name):
            yield f"Raises: {name!r} is no exception"
    if subject.kind == "class":
        makers = [vars(subject.value).get(n) for n in ("__init__", "__post_init__", "__new__")]
    elif subject.kind in ("function", "method", "property"):
        makers = [ds.unwrapped(subject.value)]
    else:
        makers = []
    told = tuple(getattr(errors, name) for name in named if hasattr(errors, name))
    found = {error for maker in makers for error in raised_by(maker, subject.owner)}
    for error in sorted(found, key=lambda e: e.__name__):
        if (subject.path, error.__name__) in IMPOSSIBLE:
            continue
        if not (error in told or issubclass(error, told)):
            yield f"Raises: {error.__name__} is missing"


IMPOSSIBLE: dict[tuple[str, str], str] = {
    ("report.write_sweep", "SpecificationError"): "its themes are those of the page",
}
"""Errors that a helper raises but not from there, by path and error, and why: reading does not tell."""

_PUBLIC: set[int] = set()


def set_public(values: set[int]) -> None:
    """The ids of public functions: their errors are their own documentation's business."""
    _PUBLIC.clear()
    _PUBLIC.update(values)
    raised_by.cache_clear()


_RUNNING: list[Any] = []


@functools.cache
def raised_by(function: Any, owner: type | None = None) -> frozenset[type[Exception]]:
    """The errors of marginflow that a function raises, itself or through what is not public."""
    function = inspect.unwrap(function) if callable(function) else function
    definition = ds.definition_of(function)
    if definition is None or function in _RUNNING or len(_RUNNING) > 12:
        return frozenset()
    _RUNNING.append(function)
    try:
        return frozenset(_walk(definition.body, function, owner, ()))  # type: ignore[attr-defined]
    finally:
        _RUNNING.pop()


def _walk(
    nodes: list[ast.AST], function: Any, owner: type | None, caught: tuple[type, ...]
) -> Iterator[type[Exception]]:
    for node in nodes:
        if isinstance(node, ast.Try):
            kinds: list[type] = []
            for handler in node.handlers:
                kinds += _kinds(handler.type, function)
            yield from _walk(list(node.body), function, owner, (*caught, *kinds))
            rest = [*node.handlers, *node.orelse, *node.finalbody]
            yield from _walk(list(rest), function, owner, caught)
            continue
        found: list[type[Exception]] = []
        if isinstance(node, ast.Raise) and node.exc is not None:
            found = _error_of(node.exc, function, owner)
        elif isinstance(node, ast.Call):
            found = _through(node.func, function, owner)
        yield from (e for e in found if not issubclass(e, caught))
        yield from _walk(list(ast.iter_child_nodes(node)), function, owner, caught)


def _kinds(node: ast.expr | None, function: Any) -> list[type]:
    if node is None:
        return [BaseException]
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    found = [_resolve(part, function, None) for part in parts]
    return [kind for kind in found if inspect.isclass(kind)]


def _error_of(node: ast.expr, function: Any, owner: type | None) -> list[type[Exception]]:
    made = _resolve(node.func if isinstance(node, ast.Call) else node, function, owner)
    if inspect.isclass(made) and issubclass(made, errors.MarginflowError):
        return [made]
    if inspect.isfunction(made):  # a function that makes the error
        made = getattr(errors, ds.returned(made), None)
        return [made] if made is not None else []
    return []


def _through(node: ast.expr, function: Any, owner: type | None) -> list[type[Exception]]:
    called = _resolve(node, function, owner)
    if inspect.ismethod(called):
        called = called.__func__
    if isinstance(called, staticmethod | classmethod):
        called = called.__func__
    called = inspect.unwrap(called) if inspect.isfunction(called) else None
    if called is None or id(called) in _PUBLIC:
        return []
    return list(raised_by(called, owner if isinstance(node, ast.Attribute) else None))


def _resolve(node: ast.expr, function: Any, owner: type | None) -> Any:
    if isinstance(node, ast.Name):
        space = function.__globals__
        return space.get(
            node.id, _imported(function).get(node.id, getattr(builtins, node.id, None))
        )
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and owner:
            return inspect.getattr_static(owner, node.attr, None)
        holder = _resolve(node.value, function, owner)
        return getattr(holder, node.attr, None) if inspect.ismodule(holder) else None
    return None


@functools.cache
def _imported(function: Any) -> dict[str, Any]:
    """What a function imports from the package inside its body."""
    found: dict[str, Any] = {}
    definition = ds.definition_of(function)
    for node in ast.walk(definition) if definition else ():
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(ds.PACKAGE):
            module = importlib.import_module(str(node.module))
            found |= {a.asname or a.name: getattr(module, a.name, None) for a in node.names}
    return found


Rule = Callable[[Subject], Iterator[str]]
RULES: dict[str, Rule] = {
    "summary": summary,
    "arguments": arguments,
    "shapes": shapes,
    "units": units,
    "raises": raises,
    "source": source,
}
