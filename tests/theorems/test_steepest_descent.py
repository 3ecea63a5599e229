"""ℓ/‖W‖^K along steepest flows: where it must hold, where nothing is claimed, and forged paths."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

import marginflow as mf
from marginflow.ascent import SteepestFlow
from marginflow.attacks import FGM, FGSM, Attack, ExactLinear, FiniteSet
from marginflow.errors import InputError, SpecificationError
from marginflow.theorems import Verdict, verify_steepest
from marginflow.theorems.steepest_descent import _judge, _Measured

NORMS = ("l2", "sign", "spectral")
SETTINGS = {"steps": 120, "step": 0.03}


def crossed() -> mf.Dataset:
    """Not linearly separable."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(14, 5, generator=generator, dtype=torch.float64)
    return mf.Dataset(x, torch.sign(x[:, 0] * x[:, 1] + 0.3).long())


def net(activation: str) -> torch.nn.Module:
    return mf.models.mlp(5, 10, 1, activation=activation, seed=1)


def some_deltas() -> Attack:
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    return FiniteSet(0.1 * deltas / deltas.norm(dim=1, keepdim=True))


def met(verdict: Verdict, name: str) -> bool | None:
    (found,) = [h for h in verdict.hypotheses if h.name.startswith(name)]
    return found.met


def shown(verdict: Verdict) -> Verdict:
    print(f"\n{verdict.statement}: {verdict.outcome}; {verdict.measured}")
    return verdict


@pytest.mark.parametrize("norm", [*NORMS, "l1"])
@pytest.mark.parametrize("attack", [None, FGM(0.05), some_deltas()], ids=["clean", "fgm", "set"])
def test_it_holds_for_smooth_networks(norm: str, attack: Attack | None) -> None:
    """Squared ReLU, degrees 2 and 1: no step falls, with a total derivative or an exact maximum."""
    verdict = shown(verify_steepest(net("squared-relu"), crossed(), attack, norm=norm, **SETTINGS))
    assert verdict.outcome == "holds"
    assert verdict.statement == f"Steepest descent ({norm})"
    assert " 0, 0, 0 for η = 0.03" in verdict.measured
    assert met(verdict, "ln L continuous") is True
    assert verdict.hypotheses[0].detail == "K = 3"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", ["l2", "linf"])
def test_it_holds_for_deep_linear_networks_under_the_worst_case(norm: str, p: str) -> None:
    data = mf.load("separable:n=15,d=5,margin=0.3,seed=1")
    attack = ExactLinear(p, 0.03)
    model = mf.models.deep_linear(5, 4, 4, 1, seed=0)
    verdict = shown(verify_steepest(model, data, attack, norm=norm, **SETTINGS))
    assert verdict.outcome == "holds"
    assert not verdict.unmet


@pytest.mark.parametrize("norm", NORMS)
def test_on_kinks_paths_are_compared_at_common_points(norm: str) -> None:
    """The steps zigzag across kinks of ReLU and fall one by one, at any step size; the path does not."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    data = mf.Dataset(x, torch.sign(x[:, 0] * x[:, 1] + 0.3).long())
    model = mf.models.mlp(6, 12, 8, 1, seed=1)
    verdict = shown(verify_steepest(model, data, norm=norm, steps=200))
    assert verdict.outcome == "holds"
    assert met(verdict, "∇ ln L continuous") is False
    assert "sums of falls between 50 points " in verdict.measured
    assert ", 0 for η = 0.05, η/2, η/4, there on " in verdict.measured


@pytest.mark.parametrize("norm", NORMS)
def test_where_the_loss_jumps_nothing_is_claimed_but_shown(norm: str) -> None:
    verdict = shown(verify_steepest(net("relu"), crossed(), FGSM(0.1), norm=norm, **SETTINGS))
    assert verdict.outcome == "does not apply"
    assert met(verdict, "ln L continuous") is False
    assert "measured all the same: ℓ/‖W‖^K" in verdict.measured


def test_adam_claims_nothing() -> None:
    verdict = shown(verify_steepest(net("squared-relu"), crossed(), norm="adam", **SETTINGS))
    assert verdict.outcome == "does not apply"
    assert [h.detail for h in verdict.unmet] == ["β₁ = 0.9, β₂ = 0.999"]
    assert "of 480 steps (0 in the norm l2, " in verdict.measured


# What it refuses to judge


def test_other_networks_and_data() -> None:
    data = crossed()
    curved = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
    verdict = verify_steepest(curved, data)
    assert verdict.outcome == "does not apply"
    assert "a homogeneous network (not '1')" in verdict.measured
    three = mf.Dataset(data.x, torch.arange(14) % 3)
    verdict = verify_steepest(mf.models.mlp(5, 4, 3, seed=0), three)
    assert verdict.outcome == "does not apply"
    assert "two classes" in verdict.measured
    twins = mf.Dataset(torch.ones(2, 5), torch.tensor([1, -1]))
    verdict = verify_steepest(net("relu"), twins)
    assert verdict.outcome == "not reached"
    assert "train the network first" in verdict.advice


def test_misuse() -> None:
    with pytest.raises(InputError, match="at most 20000 weights, got 60100"):
        verify_steepest(mf.models.mlp(600, 100, 1), crossed())
    with pytest.raises(SpecificationError, match="unknown geometry 'nuclear'"):
        verify_steepest(net("relu"), crossed(), norm="nuclear")
    with pytest.raises(InputError, match="above 0"):
        verify_steepest(net("relu"), crossed(), step=-1.0)


def test_the_model_stays_as_it_was() -> None:
    model = net("squared-relu")
    before = [p.detach().clone() for p in model.parameters()]
    verify_steepest(model, crossed(), steps=5)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# Forged


@functools.cache
def signs_from_the_l2_direction() -> _Measured:
    """Deep linear, from where the ℓ2 flow arrived: signs lose ℓ2 margin there."""
    data = mf.load("separable:n=15,d=6,margin=0.3,seed=4")
    model = mf.models.deep_linear(6, 4, 1, seed=0)
    flow = SteepestFlow(model, data, geometry="l2")
    start = flow.follow(flow.separated(), step=0.05, steps=100).weights
    signs = SteepestFlow(model, data, geometry="sign")
    paths = tuple(signs.follow(start, step=0.08 / k, steps=375 * k) for k in (1, 2, 4))
    return _Measured(paths, signs.jumps(paths[-1]), data.n)


def test_judged_in_its_own_norm_the_path_of_signs_holds() -> None:
    assert shown(_judge("sign", [], signs_from_the_l2_direction())).outcome == "holds"


def test_judged_in_another_norm_it_fails() -> None:
    """Only the norm is changed: the falls of ℓ/‖W‖₂^K stay, whatever the step."""
    found = signs_from_the_l2_direction()
    forged = tuple(dataclasses.replace(path, geometry="l2") for path in found.paths)
    verdict = shown(_judge("l2", [], dataclasses.replace(found, paths=forged)))
    assert verdict.outcome == "fails"
    falls = [path.falls().total for path in forged]
    assert min(falls) > 0.04
    assert falls == sorted(falls)


@pytest.mark.parametrize("order", [1.0, 3.0])
def test_of_another_order_it_fails(order: float) -> None:
    """With K = 3 for 2 the ratio falls; with 1 it rises, but Euler's identity does not hold."""
    found = signs_from_the_l2_direction()
    forged = tuple(dataclasses.replace(path, order=order) for path in found.paths)
    assert shown(_judge("sign", [], dataclasses.replace(found, paths=forged))).outcome == "fails"


def test_a_gradient_too_small_fails() -> None:
    """‖∇ℓ‖_* reported by the wrong norm, ℓ∞ for ℓ1, breaks ⟨W,∇ℓ⟩ ≤ ‖W‖‖∇ℓ‖_*."""
    found = signs_from_the_l2_direction()
    forged = tuple(dataclasses.replace(path, dual=path.dual / 10) for path in found.paths)
    assert shown(_judge("sign", [], dataclasses.replace(found, paths=forged))).outcome == "fails"


def test_falls_too_small_to_tell_are_left_open() -> None:
    found = signs_from_the_l2_direction()
    forged = []
    for path in found.paths:
        smoothed = path.smoothed.copy()
        # Lowered to just below what the ratio was one step before.
        size = path.norms["sign"]
        smoothed[200] = smoothed[199] * (size[200] / size[199]) ** path.order * (1 - 1e-6)
        forged.append(dataclasses.replace(path, smoothed=smoothed))
    verdict = shown(_judge("sign", [], dataclasses.replace(found, paths=tuple(forged))))
    assert verdict.outcome == "not reached"
    assert "smaller steps" in verdict.advice


def test_sliding_paths_that_fall_are_set_aside() -> None:
    """Turns of ∇ℓ whose sum grows like 1/η excuse a fall; a sum that stays does not."""
    found = signs_from_the_l2_direction()
    assert found.more_turns == pytest.approx(1.0, abs=0.3)

    def verdict(turn: float) -> Verdict:
        """Of ℓ2, with turns of η^turn on each step."""
        forged = tuple(
            dataclasses.replace(path, geometry="l2", turns=np.full(len(path), path.step**turn))
            for path in found.paths
        )
        return shown(_judge("l2", [], dataclasses.replace(found, paths=forged)))

    assert verdict(0.0).outcome == "does not apply"
    assert "it turns 4 times as much by steps a quarter as long" in verdict(0.0).measured
    assert verdict(1.0).outcome == "fails"


def test_where_the_perturbation_turns_without_bound_nothing_is_claimed() -> None:
    """The path runs into ∇_x f = 0 of an example, where FGM's δ has no limit: no jump, no end of turning."""
    verdict = shown(
        verify_steepest(net("squared-relu"), crossed(), FGM(0.4), norm="sign", steps=60)
    )
    assert verdict.outcome == "does not apply"
    assert met(verdict, "∇ ln L continuous") is False
