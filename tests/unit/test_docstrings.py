"""Every public name says what it is, takes, holds, gives and raises, in which units, and its source."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import docstring_rules as rules
import docstring_sections as ds
import pytest
from docstring_sections import Subject

import marginflow as mf

EXAMPLES = [
    "Monitor",
    "attacks.PGD",
    "certified_margins",
    "gradient_flow",
    "kkt_certificate",
    "load",
    "load_run",
    "maximize",
    "adversarial_margins",
    "measure_homogeneity",
    "train",
    "verify",
]


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, list[Subject]]]:
    """The public names by module; of what several modules offer, the first one only."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lightning") is None:
            stub = ModuleType("lightning.pytorch")
            stub.Callback = object  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "lightning.pytorch", stub)
            importlib.import_module("marginflow.lightning")
            patch.delitem(sys.modules, "marginflow.lightning")  # put back, to be dropped at the end
            patch.delattr(mf, "lightning")
            importlib.import_module("marginflow.lightning")
        seen: set[int] = set()
        found: dict[str, list[Subject]] = {}
        for module in ds.modules():
            found[module] = []
            for subject in ds.public(module):
                if subject.kind == "value" or id(subject.value) not in seen:
                    seen.add(id(subject.value))
                    found[module].append(subject)
        every = [subject for subjects in found.values() for subject in subjects]
        functions = [s.value for s in every if s.kind not in ("class", "value")]
        rules.set_public({id(ds.unwrapped(value)) for value in functions})
        yield found


@pytest.mark.parametrize("rule", rules.RULES)
@pytest.mark.parametrize("module", ds.modules())
def test_every_public_name_is_documented(
    names: dict[str, list[Subject]], module: str, rule: str
) -> None:
    """The message names each public name and what is missing there."""
    missing = [
        f"marginflow.{subject.path}: {words}"
        for subject in names[module]
        for words in rules.RULES[rule](subject)
    ]
    assert not missing, "\n".join(["", *missing])


def test_what_users_meet_first_has_its_source_itself() -> None:
    """Of the names in ``marginflow.__all__`` the docstring of a private module does not count."""
    without = []
    for name in mf.__all__:
        value = getattr(mf, name)
        if not isinstance(value, ModuleType) and not rules.SOURCE.search(
            inspect.getdoc(value) or ""
        ):
            without.append(f"marginflow.{name}: no source such as 'Section 3.2' or 'Source: …'")
    assert not without, "\n".join(["", *without])


def test_the_public_names_are_all_walked(names: dict[str, list[Subject]]) -> None:
    walked = {id(subject.value) for subjects in names.values() for subject in subjects}
    homes = [mf, mf.attacks, mf.models, mf.references, mf.losses, mf.ascent, mf.errors]
    for home in homes:
        for name in ds.names_of(home):
            value = getattr(home, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert id(value) in walked, f"{home.__name__}.{name}"


SAMPLE = '''
"""A module without a source."""
from marginflow._checks import real
from marginflow.errors import DataError, InputError
from torch import Tensor

__all__ = ["Thing", "broken", "given"]

LIMIT = 3
"""A number under which a string stands."""

def _check(eps):
    if eps < 0:
        raise InputError("eps")

def broken(x: Tensor, eps: float, seconds: float, other: int) -> Tensor:
    """What is said of too little.

    Args:
        x: examples.
        eps: a number.
        seconds: how long.
        gone: is no parameter.
    """
    _check(eps)
    if not len(x):
        raise DataError("none")
    return x

def given(x: Tensor, eps: float) -> Tensor:
    """What is said of everything, Eq. (7).

    Args:
        x: examples, (n, d).
        eps: ε, in the units of x.

    Returns:
        of the shape of x.

    Raises:
        InputError: a negative ε.
    """
    try:
        _check(eps)
        raise DataError("caught below")
    except DataError:
        return x

class Thing:
    """A thing (2020).

    Attributes:
        a: the first.
        c: is not there.
    """
    a: int
    b: Tensor
    """The second, of any length."""

    def __init__(self, size: int) -> None:
        self.size = real("size", size)

    def turn(self, angle: float) -> None:
        pass
'''


def test_the_rules_find_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "marginflow_sample.py").write_text(SAMPLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("marginflow_sample")
    monkeypatch.setattr(rules, "_PUBLIC", set())
    rules.raised_by.cache_clear()

    def of(subject: Subject) -> list[str]:
        return [words for rule in rules.RULES.values() for words in rule(subject)]

    assert of(Subject("given", "function", module.given)) == []
    assert of(Subject("LIMIT", "value", ds.comment_of(module, "LIMIT"))) == []
    assert of(Subject("broken", "function", module.broken)) == [
        "Args: 'other' is missing",
        "Args: 'gone' is no parameter",
        "x: Tensor, but no shape such as (n, d)",
        "returns: Tensor, but no shape such as (n, d)",
        "eps: float, but expected /\\bunits? of\\b|\\bpixel/ in 'a number.'",
        "seconds: float, but expected /\\bseconds?\\b/ in 'how long.'",
        "Raises: DataError is missing",
        "Raises: InputError is missing",
        "no source: neither here nor in the docstring of its module",
    ]
    assert of(Subject("Thing", "class", module.Thing)) == [
        "Args: 'size' is missing",
        "Attributes: 'c' is no attribute",
        "Raises: InputError is missing",
    ]
    turn = Subject("Thing.turn", "method", module.Thing.turn, module.Thing)
    assert of(turn) == ["no docstring", "Args: 'angle' is missing"]


def test_the_sections_of_a_docstring() -> None:
    doc = ds.parse(
        """One line.

        Args:
            a, b: two of them,
                over two lines.
            *rest: more.
           odd

        Returns:
            (n,).

        Raises:
            ValueError: never.
        """
    )
    assert doc.summary == "One line."
    assert doc["Args"] == dict.fromkeys("ab", "two of them, over two lines.") | {"rest": "more."}
    assert doc.free["Returns"] == "(n,)."
    assert doc["Raises"] == {"ValueError": "never."}
    assert doc.odd == ("odd",)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("examples, (n, d)", True),
        ("m_i, (n,), float64", True),
        ("outputs (n, 1) or (n, C)", True),
        ("neighbours, (L−1,)", True),
        ("a scalar", True),
        ("of the shape of x", True),
        ("of any kind (or none, as the case may be)", False),
        ("weights (the last)", False),
        ("f(x, y)", True),  # a call looks like one; it is a formula, at least
        ("", False),
    ],
)
def test_what_counts_as_a_shape(text: str, is_one: bool) -> None:
    assert bool(rules.SHAPE.search(text)) is is_one


def _target(path: str) -> object:
    value: object = mf
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("path", EXAMPLES)
def test_the_most_used_names_have_examples(path: str) -> None:
    assert ">>> import marginflow as mf" in str(_target(path).__doc__)


def test_examples_in_docstrings_run(
    names: dict[str, list[Subject]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a namespace of its own, so that it can be copied as it stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MARGINFLOW_DATA", raising=False)
    parser, report = doctest.DocTestParser(), []
    every = [subject for subjects in names.values() for subject in subjects]
    with_examples = [subject for subject in every if ">>> " in subject.doc.text]
    assert len(with_examples) >= len(EXAMPLES)
    for subject in with_examples:
        case = parser.get_doctest(subject.doc.text, {}, subject.path, None, None)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
        runner.run(case, out=report.append)
    assert not report, re.sub(r"\n{2,}", "\n", "".join(report))
