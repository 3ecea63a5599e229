"""Specification strings of attacks, both ways, and the check of a budget."""

from __future__ import annotations

import dataclasses
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from unit_oracles import laws

from marginflow.attacks import FGM, FGSM, PGD, Attack, ExactLinear, FiniteSet, build, check_budget
from marginflow.errors import InputError, SpecificationError


def fields(attack: Attack | None) -> tuple[type, dict[str, object]]:
    assert attack is not None
    return type(attack), {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}


@pytest.mark.parametrize(
    ("spec", "attack"),
    [
        ("fgm:eps=1.5", FGM(eps=1.5)),
        ("fgsm:eps=16/255", FGSM(eps=16 / 255)),
        ("  FGSM : eps = 16/255 ", FGSM(eps=16 / 255)),
        ("fgsm:eps=0", FGSM(eps=0)),
        ("fgsm:eps=0.1,bounds=0..1", FGSM(eps=0.1, bounds=(0, 1))),
        ("fgsm:eps=0.1,bounds=-0.5..1/2", FGSM(eps=0.1, bounds=(-0.5, 0.5))),
        ("fgm:eps=0.1,objective=loss", FGM(eps=0.1, objective="loss")),
        ("fgm:objective=margin,eps=1e-3", FGM(eps=0.001)),
        (
            "pgd-linf:eps=16/255,steps=5,step=6/255",
            PGD("linf", eps=16 / 255, steps=5, step_size=6 / 255),
        ),
        ("pgd-l2:eps=0.5", PGD("l2", eps=0.5)),
        ("pgd-l2:eps=0.5,random=true", PGD("l2", eps=0.5, random_start=True)),
        ("pgd-l2:eps=0.5,random=False", PGD("l2", eps=0.5)),
        ("exact-linear:p=2,eps=0.05", ExactLinear(p=2, eps=0.05)),
        ("exact-linear:p=linf,eps=0.05", ExactLinear(p=math.inf, eps=0.05)),
        ("exact-linear:p=inf,eps=0.05", ExactLinear(p=math.inf, eps=0.05)),
        ("exact-linear:p=l1.5,eps=0.05", ExactLinear(p=1.5, eps=0.05)),
    ],
)
def test_build(spec: str, attack: Attack) -> None:
    assert fields(build(spec)) == fields(attack)


def test_build_passes_on_what_is_built() -> None:
    attack = FGM(eps=1)
    assert build(attack) is attack
    assert build(None) is None
    assert build("none") is None


numbers = st.floats(0, 1e6)
intervals = st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3)).map(
    lambda pair: (pair[0], pair[0] + pair[1])
)
objectives = st.sampled_from(["margin", "loss"])
optional_bounds = st.none() | intervals
attacks = st.one_of(
    st.builds(FGM, eps=numbers, bounds=optional_bounds, objective=objectives),
    st.builds(FGSM, eps=numbers, bounds=optional_bounds, objective=objectives),
    st.builds(
        PGD,
        p=st.sampled_from(["l2", "linf"]),
        eps=numbers,
        steps=st.integers(1, 1000),
        step_size=st.none() | st.floats(1e-300, 1e6),
        random_start=st.booleans(),
        bounds=optional_bounds,
        objective=objectives,
    ),
    st.builds(ExactLinear, p=st.floats(1, 1e6) | st.just(math.inf), eps=numbers),
)


@laws
@given(attacks)
def test_a_spec_builds_the_same_attack(attack: Attack) -> None:
    """Every float survives: the run on disk says what was done to the last bit."""
    assert fields(build(attack.spec)) == fields(attack)
    assert str(attack) == attack.spec


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fgms:eps=0.1", "unknown attack 'fgms'; did you mean 'fgm'"),
        ("pdg-l2:eps=0.1", "unknown attack 'pdg-l2'; did you mean 'pgd-l2'"),
        ("pgd:eps=0.1", "unknown attack 'pgd'; did you mean 'pgd-l2'"),
        ("exactlinear:p=2,eps=1", "did you mean 'exact-linear'"),
        ("fgsm:esp=0.1", "unknown option of 'fgsm' 'esp'; did you mean 'eps'"),
        ("fgsm:eps=0.1,steps=3", "unknown option of 'fgsm' 'steps'"),
        ("pgd-l2:eps=0.1,setps=3", "'setps'; did you mean 'steps'"),
        ("pgd-l2:eps=0.1,bound=0..1", "'bound'; did you mean 'bounds'"),
        ("exact-linear:p=2,eps=0.1,bounds=0..1", "unknown option of 'exact-linear' 'bounds'"),
        ("fgsm:eps=0.1,objective=los", "unknown objective 'los'; did you mean 'loss'"),
        ("fgsm", "expected eps=…, as in fgsm:eps=16/255"),
        ("pgd-l2:steps=3", "expected eps=…"),
        ("exact-linear:eps=0.1", "expected p=…"),
        ("exact-linear:p=2", "expected eps=…"),
        ("exact-linear:p=two,eps=1", "expected 'l1', 'l2', 'linf' or a number"),
        ("fgsm:0.1", "'0.1' has no name; write eps=0.1"),
        ("fgsm:eps=", "empty part"),
        ("fgsm:,eps=1", "empty part"),
        ("fgsm:eps=1,", "empty part"),
        ("fgsm:=1", "empty part"),
        ("fgsm:eps=1,eps=2", "'eps' is given twice"),
        ("fgsm:eps=1,2", "stands after an option"),
        ("fgsm:eps=abc", "expected a number or a fraction like 16/255, got 'abc'"),
        ("fgsm:eps=1/0", "expected a number or a fraction"),
        ("fgsm:eps=1/2/3", "expected a number or a fraction"),
        ("fgsm:eps=nan", "expected a finite number, got 'nan'"),
        ("fgsm:eps=inf", "expected a finite number"),
        ("fgsm:eps=1e999", "expected a finite number"),
        ("pgd-l2:eps=1,steps=2.5", "expected a whole number, got '2.5'"),
        ("pgd-l2:eps=1,random=yes", "expected true or false, got 'yes'"),
        ("fgsm:eps=1,bounds=1", "expected an interval like 0..1, got '1'"),
        ("fgsm:eps=1,bounds=0..", "expected a number"),
        ("none:eps=1", "unknown option of 'none' 'eps'"),
        ("", "attack: expected a specification such as"),
        ("   ", "attack: expected a specification such as"),
        (":eps=1", "unknown attack ''"),
    ],
)
def test_bad_specs(spec: str, says: str) -> None:
    with pytest.raises(SpecificationError, match=says):
        build(spec)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fgsm:eps=-1", "eps: expected a number of at least 0, got -1"),
        ("pgd-l2:eps=1,steps=0", "steps: expected a whole number of at least 1"),
        ("pgd-l2:eps=1,step=0", "step_size: expected a number above 0"),
        ("pgd-l2:eps=1,step=-1", "step_size: expected a number above 0"),
        ("fgsm:eps=1,bounds=1..0", "expected low < high"),
        ("exact-linear:p=0.5,eps=1", "at least 1, got 0.5"),
    ],
)
def test_specs_with_numbers_out_of_range(spec: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(spec)


def test_what_is_no_spec() -> None:
    with pytest.raises(SpecificationError, match="got 5"):
        build(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("library", ["art", "foolbox", "torchattacks"])
def test_an_attack_object_of_another_library_is_told_its_way(library: str) -> None:
    theirs = type("Sweep", (), {"__module__": f"{library}.attacks.sweep"})
    for attack in (theirs, theirs()):
        with pytest.raises(SpecificationError, match=rf"mf\.attacks\.from_{library}\(Sweep, eps="):
            build(attack)
    other = type("Sweep", (), {"__module__": f"{library}2.attacks"})()
    with pytest.raises(SpecificationError, match="expected a specification such as"):
        build(other)


# --- finite sets from files


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8", "f2", np.longdouble])
def test_finite_set_from_a_file(tmp_path: Path, dtype: str) -> None:
    deltas = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(dtype)
    np.save(tmp_path / "a,b=c.npy", deltas)
    attack = build(f"finite-set:{tmp_path}/a,b=c.npy")
    assert isinstance(attack, FiniteSet)
    np.testing.assert_array_equal(attack.deltas.numpy(), deltas.astype(np.float64))
    assert attack.spec.startswith("finite-set(3 perturbations, eps=")


def test_finite_set_from_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npy").write_text("0.1 0.2")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and then rubbish")
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 3)))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "whole.npy", np.zeros((2, 3), dtype=np.int64))
    np.save(tmp_path / "complex.npy", np.zeros((2, 3), dtype=np.complex128))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "nan.npy", np.full((1, 2), np.nan))
    with zipfile.ZipFile(tmp_path / "zip.npy", "w") as archive:
        archive.writestr("a", "b")
    for path in (*sorted(tmp_path.iterdir()), tmp_path / "missing.npy", tmp_path):
        with pytest.raises(InputError, match=r"finite-set|FiniteSet"):
            build(f"finite-set:{path}")
    with pytest.raises(InputError, match="finite-set: cannot read"):
        build("finite-set")
    with pytest.raises(InputError, match="finite-set: cannot read"):
        build("finite-set:a\0b")


# --- budgets


@pytest.mark.parametrize(
    ("attack", "largest"),
    [
        (lambda eps: FGSM(eps=eps), 1.0),
        (lambda eps: FGM(eps=eps), 28.0),
        (lambda eps: PGD("l2", eps=eps), 28.0),
        (lambda eps: ExactLinear(p=1, eps=eps), 784.0),
        (lambda eps: ExactLinear(p=math.inf, eps=eps), 1.0),
    ],
)
def test_check_budget(attack: object, largest: float) -> None:
    shape = (1, 28, 28)
    check_budget(attack(largest), shape, (0.0, 1.0))  # type: ignore[operator]
    check_budget(attack(2 * largest), shape, (-1.0, 1.0))  # type: ignore[operator]
    check_budget(attack(1e9), shape, None)  # type: ignore[operator]
    too_large = attack(largest * (1 + 1e-12))  # type: ignore[operator]
    with pytest.raises(InputError, match=r"eps: expected at most .* 784 pixels.*Write eps=16/255"):
        check_budget(too_large, shape, (0.0, 1.0))
    check_budget(None, shape, (0.0, 1.0))


def test_a_budget_in_units_of_255_is_seen() -> None:
    with pytest.raises(InputError, match="expected at most 1, the ℓ∞ size of the pixel range"):
        check_budget(FGSM(eps=16), (784,), (0.0, 1.0))
    deltas = FiniteSet(torch.full((1, 4), 3.0))
    with pytest.raises(InputError, match="expected at most 2, the ℓ2 size"):
        check_budget(deltas, (4,), (0.0, 1.0))
