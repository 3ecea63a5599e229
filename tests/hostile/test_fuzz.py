"""Everything that is parsed, damaged at random: it is read, or refused in one line, and soon.

`benchmarks/fuzz.py` does the same at length; here are few examples, always the same ones.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hostile_mutations import STRANGE, any_json, mutated_json
from hostile_targets import SECONDS, SPECS, TARGETS, file_example, inside_folder, spec_example
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marginflow._reading import parse_json

few = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# Numbers and not st.randoms(): what that shrinks to is always the same damage.
seeds = st.integers(min_value=0, max_value=2**32).map(Random)


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """Damaged checkpoints are named in the log, which is not what is looked at here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", sorted(SPECS))
@settings(few, max_examples=100)
@given(random=seeds)
def test_specifications(kind: str, random: Random) -> None:
    spec_example(kind, random)


@pytest.mark.parametrize("name", sorted(TARGETS))
@settings(few)
@given(random=seeds)
def test_files(valid: Path, name: str, random: Random) -> None:
    with tempfile.TemporaryDirectory() as folder, inside_folder(Path(folder)):
        began = time.monotonic()
        file_example(TARGETS[name], valid, Path(folder), random, quick=True)
        assert time.monotonic() - began < SECONDS


@settings(few, max_examples=200)
@given(random=seeds)
def test_json_is_a_value_that_can_be_printed_or_a_value_error(random: Random) -> None:
    text = mutated_json(random, '{"a": [1, {"b": "text", "c": null}], "d": 0.5}')
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert "\x1b" not in repr(value)
    str(value).encode()  # no lone surrogate


@pytest.mark.parametrize("place", range(len(STRANGE)))
def test_json_of_a_stranger(place: int) -> None:
    """Nesting of 100,000 levels and of 900, and integers of 5,000 digits, are refused; the rest is read."""
    text = STRANGE[place]
    refused = text.startswith(("[[", '{"a":{', "111"))
    try:
        parse_json(text)
    except ValueError:
        assert refused
    else:
        assert not refused


def test_the_mutations_do_not_spare_any_node() -> None:
    """The fuzz would find nothing if it changed nothing: each leaf is reached, and damage is usual."""
    whole = '{"a": [1, {"b": "text", "c": null}], "d": 0.5}'
    found = [mutated_json(Random(seed), whole) for seed in range(400)]
    assert len(set(found)) > 200
    for part in ('"a"', '"b"', '"c"', '"d"', "0.5", "text"):
        assert any(part not in text for text in found)
        assert any(part in text for text in found)
    kinds = {type(any_json(Random(seed))) for seed in range(400)}
    assert kinds == {type(None), bool, int, float, str, list, dict}
