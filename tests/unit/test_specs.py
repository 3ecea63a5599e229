"""The grammar of specification strings: whatever the text, a Spec or a SpecificationError."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit_oracles import laws

from marginflow import _specs
from marginflow._checks import choice, real, unknown, whole
from marginflow._specs import Spec, flag, integer, interval, number, parse, word
from marginflow.attacks import Attack, build
from marginflow.errors import InputError, SpecificationError

anything = st.text(max_size=40)
# Text that looks like a specification: the grammar's own characters, more often than not.
almost = st.text(alphabet="afglmps:=,./ 0123456789e+-_∞\n\t\0", max_size=30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fgsm", ("fgsm", "", (), {})),
        ("fgsm:", ("fgsm", "", (), {})),
        ("mlp:1024,64", ("mlp", "1024,64", ("1024", "64"), {})),
        ("FGSM:eps=16/255", ("fgsm", "eps=16/255", (), {"eps": "16/255"})),
        (" mnist : 3, 8 ,n = 1000 ", ("mnist", " 3, 8 ,n = 1000", ("3", "8"), {"n": "1000"})),
        ("npz:/a/B.npz", ("npz", "/a/B.npz", ("/a/B.npz",), {})),
        ("a:b=c=d", ("a", "b=c=d", (), {"b": "c=d"})),
        ("a:b:c", ("a", "b:c", ("b:c",), {})),
    ],
)
def test_parse(text: str, expected: tuple[str, str, tuple[str, ...], dict[str, str]]) -> None:
    spec = parse(text, "thing")
    assert (spec.name, spec.rest, spec.args, dict(spec.options)) == expected
    assert spec.text == text


@laws
@given(anything | almost)
def test_parse_gives_a_spec_or_a_specification_error(text: str) -> None:
    try:
        spec = parse(text, "thing")
    except SpecificationError:
        return
    assert isinstance(spec, Spec)
    assert all(spec.args)
    assert all(key and value for key, value in spec.options.items())


names = st.text(alphabet="abcdefghij-", min_size=1, max_size=8)
atoms = st.text(alphabet="abcdefghij0123456789./-", min_size=1, max_size=8)


@laws
@given(names, st.lists(atoms, max_size=4), st.dictionaries(names, atoms, max_size=4))
def test_what_is_written_is_parsed(name: str, args: list[str], options: dict[str, str]) -> None:
    parts = [*args, *(f"{key}={value}" for key, value in options.items())]
    spec = parse(f"{name}:{','.join(parts)}", "thing")
    assert (spec.name, list(spec.args), dict(spec.options)) == (name, args, options)


@pytest.mark.parametrize("parser", [number, integer, flag, interval, word])
@laws
@given(anything | almost | st.floats().map(str) | st.integers().map(str))
def test_parsers_give_a_value_or_a_specification_error(
    parser: Callable[[str, str], object], text: str
) -> None:
    try:
        value = parser(text, "here")
    except SpecificationError:
        return
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, float):
            assert math.isfinite(one)


@laws
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_fractions_are_rounded_once(top: int, bottom: int) -> None:
    assert number(f"{top}/{bottom}", "here") == float(Fraction(top, bottom))


@laws
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_come_back(value: float) -> None:
    assert number(repr(value), "here") == value
    assert interval(f"{value!r}..{value!r}", "here") == (value, value)


def test_numbers_beyond_the_range() -> None:
    for text in ("1e400", "-1e400", "nan", "inf", "1e308/1e-308", "1/inf/2", "9" * 400):
        with pytest.raises(SpecificationError, match="here: expected"):
            number(text, "here")
    with pytest.raises(SpecificationError, match="expected a whole number"):
        integer("1" + "0" * 5000, "here")  # Python refuses to parse so many digits


@laws
@given(almost)
def test_attacks_from_any_text(text: str) -> None:
    """An attack, or an InputError (a SpecificationError, or a number out of range)."""
    for spec in (text, f"fgsm:{text}", f"pgd-l2:eps=1,{text}", f"exact-linear:p={text},eps=1"):
        try:
            attack = build(spec)
        except InputError:
            continue
        assert attack is None or isinstance(attack, Attack)


def test_options_and_their_parsers() -> None:
    spec = parse("a:n=3,x=1/4,name=b", "thing")
    assert spec.parsed({"n": integer, "x": number, "name": word, "more": flag}) == {
        "n": 3,
        "x": 0.25,
        "name": "b",
    }
    with pytest.raises(SpecificationError, match="unknown option of 'a' 'x'; did you mean 'xy'"):
        spec.parsed({"n": integer, "xy": number, "name": word})
    with pytest.raises(SpecificationError, match="'a:n=3,x=1/4,name=b': x: expected a whole"):
        spec.parsed({"n": integer, "x": integer, "name": word})


def test_the_grammar_knows_no_names() -> None:
    assert not {"torch", "numpy"} & set(vars(_specs))


# --- the argument checks that every floor shares


def test_unknown_names_the_nearest() -> None:
    error = unknown("fruit", "aple", ["pear", "apple"])
    assert isinstance(error, SpecificationError)
    assert str(error) == "unknown fruit 'aple'; did you mean 'apple'? (valid: apple, pear)"
    assert str(unknown("fruit", "xyz", ["pear"])) == "unknown fruit 'xyz' (valid: pear)"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, True, "1", None, 1j])
def test_real_refuses(value: object) -> None:
    with pytest.raises(InputError, match="eta: expected"):
        real("eta", value)


def test_real_and_its_range() -> None:
    assert real("eta", 3) == 3.0
    assert type(real("eta", 3)) is float
    assert real("eta", 0, least=0) == 0
    with pytest.raises(InputError, match="at least 0, got -1"):
        real("eta", -1, least=0)
    with pytest.raises(InputError, match="above 0, got 0"):
        real("eta", 0, above=0)


@pytest.mark.parametrize("value", [1.0, True, "1", None])
def test_whole_refuses(value: object) -> None:
    with pytest.raises(InputError, match="n: expected a whole number, got"):
        whole("n", value, least=0)


def test_whole_and_choice() -> None:
    assert whole("n", 4, least=4) == 4
    with pytest.raises(InputError, match="at least 4, got 3"):
        whole("n", 3, least=4)
    assert choice("way", "up", ["up", "down"]) == "up"
    for value in ("upp", None, 3):
        with pytest.raises(SpecificationError, match="unknown way"):
            choice("way", value, ["up", "down"])
