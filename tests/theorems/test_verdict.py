"""How a claim becomes a verdict."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import pytest

import marginflow.theorems as theorems
from marginflow.theorems import Hypothesis, Outcome, Verdict
from marginflow.theorems._verdict import Claim

MET = Hypothesis("two layers", True, "L = 3")
UNMET = Hypothesis("Eq. (8): ε < γ_m", False, "ε = 0.5, γ_m = 0.3")
PLAIN = Hypothesis("the logistic loss", False)
UNKNOWN = Hypothesis("a small step", None)
SPARE = Hypothesis("a tiny step", False, "η = 1", needed=False)


def claim(*hypotheses: Hypothesis) -> Claim:
    return Claim("Lemma 0", "all is well", hypotheses, "trouble", "none", "1e-9: rounding")


def test_public_names() -> None:
    assert theorems.__all__ == sorted(theorems.__all__)
    assert theorems.__all__ == [
        "Audit",
        "Evidence",
        "Hypothesis",
        "Outcome",
        "Verdict",
        "audit",
        "verify",
        "verify_steepest",
    ]
    assert get_args(Outcome) == ("holds", "fails", "does not apply", "not reached")


@pytest.mark.parametrize(
    ("ok", "outcome"), [(True, "holds"), (False, "fails"), (None, "not reached")]
)
def test_a_measured_value_decides(ok: bool | None, outcome: Outcome) -> None:
    found = claim(MET, SPARE).judge(ok, "0.1", "train longer")
    assert found == Verdict(
        "Lemma 0", "all is well", (MET, SPARE), "trouble", "none", "0.1", "1e-9: rounding",
        outcome, "train longer",
    )  # fmt: skip
    assert found.unmet == ()


@pytest.mark.parametrize("hypotheses", [(), (MET,), (MET, UNKNOWN), (SPARE,), (UNKNOWN, SPARE)])
def test_it_applies_where_nothing_needed_is_known_to_be_broken(
    hypotheses: tuple[Hypothesis, ...],
) -> None:
    assert claim(*hypotheses).inapplicable is None


def test_it_does_not_apply_otherwise_and_names_every_broken_hypothesis() -> None:
    found = claim(MET, UNMET, UNKNOWN, PLAIN, SPARE).inapplicable
    assert found is not None
    assert found.outcome == "does not apply"
    assert found.measured == ("not met: Eq. (8): ε < γ_m (ε = 0.5, γ_m = 0.3); the logistic loss")
    assert found.unmet == (UNMET, PLAIN)
    assert found.hypotheses == (MET, UNMET, UNKNOWN, PLAIN, SPARE)
    assert found.advice == ""


def test_a_verdict_is_json_and_frozen() -> None:
    found = claim(MET, SPARE).judge(True, "0")
    read = json.loads(json.dumps(found.as_dict()))
    assert read["outcome"] == "holds"
    assert read["hypotheses"][1] == {
        "name": "a tiny step", "met": False, "detail": "η = 1", "needed": False,
    }  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.outcome = "fails"  # type: ignore[misc]
