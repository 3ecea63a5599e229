"""The audit of hypotheses, against grids over the ball, numpy and textbook gradients."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive_flows import gradient, naive_flow, net, norm

import marginflow as mf
from marginflow.attacks import FGM, FGSM, Attack, ExactLinear
from marginflow.cli import main

DATA = "separable:n=6,d=3,margin=0.4,seed=2"


@pytest.fixture(scope="module")
def linear() -> mf.Flow:
    return mf.gradient_flow("deep-linear:4", DATA, attack="fgm:eps=0.1", log_time=8)


def relu_flow(attack: Attack, **options: Any) -> tuple[mf.Audit, torch.nn.Module]:
    """Euler's steps of a ReLU network, which is left at the weights of the last record."""
    model = net(3, 8, 1, seed=1)
    run = naive_flow(model, mf.load(DATA), attack, size=2e-3, every=50, steps=150, **options)
    return mf.audit(run, model=model), model


def fits(found: mf.Audit) -> None:
    lines = str(found).splitlines()
    assert 12 <= len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(a.answer + a.meaning for a in found.answers)
    assert "…" not in str(found)
    assert len(found.answers) == 8
    json.dumps(found.as_dict(), allow_nan=False)
    statements = [*found.applies, *found.without_sufficient, *found.missing]
    assert sorted(statements) == sorted(v.statement for v in found.verdicts)


def test_a_deep_linear_flow_meets_every_hypothesis(linear: mf.Flow) -> None:
    found = mf.audit(linear)
    fits(found)
    assert found.degrees == (1.0, 1.0)
    assert found.order == 2.0
    assert found.separated is found.positive_margins is True
    assert found.scale_invariant is True
    assert found.scale_changes == 0.0
    assert found.inner is not None
    assert found.inner.exact
    assert abs(found.inner.gap) < 1e-12
    assert (found.inner.newly_wrong, found.inner.examples, found.inner.steps) == (0.0, 6, 50)
    assert found.regularity.kinks is False
    assert found.regularity.sliding is False
    assert found.regularity.margin_jump is not None
    assert found.regularity.margin_jump < 1e-6
    assert found.derivative_gap is not None
    assert found.derivative_gap < 1e-12
    assert found.exponential
    assert found.gradient_flow
    assert all(a.answer.startswith(("yes", "total", "no jump")) for a in found.answers)
    assert {"Lemma 3", "Lemma 10", "Theorem 4 (monotone)", "Theorem 3 (rate)"} <= {*found.applies}
    assert found.verdicts == mf.verify(linear)


def test_relu_under_fgsm_violates_assumption_2() -> None:
    """The stronger attack against the least margin on a grid of the ball, faces included."""
    data, eps = mf.load(DATA), 0.3
    found, model = relu_flow(FGSM(eps))
    fits(found)
    weights = [p.detach().numpy() for p in model.parameters()]
    x, y = data.x.numpy(), data.y.numpy()

    def margins(points: Any) -> Any:
        return np.maximum(points @ weights[0].T, 0.0) @ weights[1][0]

    active = (x @ weights[0].T > 0) * weights[1]
    own = y * margins(x - eps * y[:, None] * np.sign(active @ weights[0]))
    grid = eps * np.array(list(product(np.linspace(-1, 1, 31), repeat=3)))
    least = (y[:, None] * margins(x[:, None] + grid)).min(axis=1)
    scale = np.abs(own).max()
    inner = found.inner
    assert inner is not None
    assert not inner.exact
    assert inner.gap > 0.01
    assert inner.gap == pytest.approx((own.min() - least.min()) / scale, abs=0.01)
    # PGD may stay in a local minimum of one example: what it finds is a lower bound.
    assert 0.1 < inner.mean_gap <= (own - least).mean() / scale + 0.01
    assert inner.newly_wrong <= ((own > 0) & (least <= 0)).mean()
    assert found.separated == (np.exp(-own).sum() < 1)
    assert found.regularity.kinks is True
    assert found.regularity.delta_jump == pytest.approx(2.0)  # a sign flips: from −ε to ε
    for name in ("Lemma 10", "Theorem 3 (growth)", "Theorem 4 (monotone)"):
        assert any(h.startswith("Assumption 2") for h in found.missing[name])
    assert {"Lemma 3", "Lemma 4", "Lemma 9", "Lemma 11"} <= set(found.applies)
    assert "(not met: Assumption 2)" in " ".join(str(found).split())


def test_how_far_the_detached_gradient_is_from_the_total_one() -> None:
    found, model = relu_flow(FGM(0.3), derivative="detached")
    data = mf.load(DATA)
    one, two = (
        gradient(model, data, FGM(0.3), derivative, "exponential")[1]
        for derivative in ("detached", "total")
    )
    apart = norm([a - b for a, b in zip(one, two, strict=True)]) / norm(two)
    assert apart > 1e-3
    assert found.derivative == "detached"
    assert found.derivative_gap == pytest.approx(apart, rel=1e-9)


def test_positive_margins_are_less_than_separation() -> None:
    """Training stopped between the two, by the margins themselves."""
    model = net(3, 8, 1)
    run = mf.train(model, DATA, attack="fgsm:eps=0.05", lr=0.1, epochs=30, keep_weights=True)
    found = mf.audit(run)
    fits(found)
    values = mf.adversarial_margins(model, mf.load(DATA).x, mf.load(DATA).y, FGSM(0.05)).values
    assert bool((values > 0).all())
    assert float(torch.nn.functional.softplus(-values).sum()) > np.log(2)
    assert (found.separated, found.positive_margins) == (False, True)
    assert found.answers[1].answer == "not yet, but all margins are positive"
    assert not found.gradient_flow
    assert not found.exponential
    assert found.answers[7].answer == "no, discrete steps"
    assert found.regularity.sliding is found.regularity.falls is None
    assert "Theorem 4 (monotone)" in found.missing


def test_an_attack_on_the_loss_is_not_scale_invariant() -> None:
    spec = "fgm:eps=0.1,objective=loss"
    run = mf.train("mlp:8", DATA, attack=spec, lr=0.1, epochs=5, dtype="float64", keep_weights=True)
    found = mf.audit(run)
    fits(found)
    assert not found.scale_invariant
    assert found.scale_changes is not None
    assert 0 < found.scale_changes <= 1
    assert found.missing["Lemma 3"] == ("the attack follows the margin, not the loss",)
    assert "Lemma 4" in found.without_sufficient


def test_several_classes() -> None:
    """A linear map to three classes: the smallest margin is known, FGM attacks one rival only."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(12) % 3
    x = 3 * torch.eye(3, dtype=torch.float64)[y]
    x = x + torch.randn(12, 3, generator=generator, dtype=torch.float64)
    data = mf.Dataset(x, y)
    model = mf.models.deep_linear(3, 3, 3, seed=0).double()
    run = mf.train(model, data, attack="fgm:eps=1.0", lr=0.1, epochs=20)
    found = mf.audit(run, data)
    fits(found)
    w = np.linalg.multi_dot([p.detach().numpy() for p in reversed(list(model.parameters()))])
    least, own = np.full(12, np.inf), np.full(12, np.inf)
    for i, c in enumerate(y.tolist()):
        f = w @ x[i].numpy()
        rivals = [j for j in range(3) if j != c]
        rival = max(rivals, key=lambda j: f[j])
        way = w[c] - w[rival]
        g = w @ (x[i].numpy() - way / np.linalg.norm(way))
        own[i] = g[c] - max(g[j] for j in rivals)
        least[i] = min(f[c] - f[j] - np.linalg.norm(w[c] - w[j]) for j in rivals)
    inner = found.inner
    assert inner is not None
    assert not inner.exact
    assert inner.gap == pytest.approx((own.min() - least.min()) / np.abs(own).max(), abs=1e-9)
    assert inner.mean_gap == pytest.approx((own - least).mean() / np.abs(own).max(), abs=1e-9)
    assert inner.mean_gap > 1e-3
    assert "Theorem 3 (growth)" in found.missing


def test_a_single_example_without_and_with_a_perturbation() -> None:
    data = mf.Dataset(torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64), torch.tensor([1]))
    for attack in (None, ExactLinear(2.0, 0.1)):
        model = mf.models.deep_linear(3, 4, 1, seed=0).double()
        run = mf.train(model, data, attack=attack, lr=0.1, epochs=40, keep_weights=True)
        found = mf.audit(run, data)
        fits(found)
        assert found.scale_invariant
        assert (found.inner is None) == (attack is None)
        assert found.inner is None or found.inner.exact
        assert found.separated is True


def test_a_network_that_is_not_homogeneous() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
    run = mf.train(model.double(), DATA, attack="fgm:eps=0.1", lr=0.1, epochs=2, measure=False)
    found = mf.audit(run)
    fits(found)
    assert found.degrees is found.order is found.scale_changes is found.derivative_gap is None
    assert found.answers[0].answer.startswith("no")


@pytest.mark.parametrize(
    "wrong", [None, 3, {}, mf.models.mlp(2, 1)], ids=["None", "3", "{}", "net"]
)
def test_what_is_no_run_is_refused(wrong: Any) -> None:
    for judge in (mf.audit, mf.verify):
        with pytest.raises(
            mf.errors.InputError, match=f"a run directory, got {type(wrong).__name__}"
        ):
            judge(wrong)


def test_the_command_prints_the_audit_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    mf.train("mlp:8", DATA, attack="fgsm:eps=0.1", lr=0.1, epochs=5, dtype="float64", out=out)
    assert main(["verify", str(out)]) == 0
    first, rest = capsys.readouterr().out.split("\n\n", 1)
    assert first == str(mf.audit(out))
    assert len(first.splitlines()) <= 24
    assert max(map(len, first.splitlines())) <= 80
    assert rest.startswith("statement")
    written = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(mf.audit(out).as_dict()))
    assert written["scale_changes"] == 0.0
    assert written["step"] == 5
    assert main(["verify", str(out), "--json"]) == 0
    verdicts = json.loads(capsys.readouterr().out)
    assert verdicts == json.loads((out / "verdicts.json").read_text(encoding="utf-8"))
    mf.train("mlp:8", DATA, lr=0.1, epochs=1, out=out, force=True)
    assert not (out / "audit.json").exists()
