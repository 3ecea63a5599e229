"""Section 3.2 from the outside: from disk, from the command line, with what must be given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import marginflow as mf
from marginflow.attacks import FiniteSet
from marginflow.cli import main
from marginflow.errors import InputError, RunError
from marginflow.theorems import Verdict, verify

DATA = "separable:n=12,d=5,margin=0.3"
DELTAS = np.array([[0.1, 0.0, -0.1, 0.0, 0.1], [0.0, -0.2, 0.0, 0.1, 0.0], [0.0] * 5])


def outcomes(verdicts: tuple[Verdict, ...]) -> dict[str, str]:
    return {v.statement: v.outcome for v in verdicts}


def test_a_network_from_disk_gets_the_same_verdicts(tmp_path: Path) -> None:
    options = {
        "attack": "fgm:eps=0.1", "loss": "exponential", "lr": 0.1, "epochs": 12,
        "dtype": "float64", "derivative": "total", "keep_weights": True,
    }  # fmt: skip
    spec = "mlp:8,activation=squared-relu"
    disk = mf.train(spec, DATA, **options, out=tmp_path / "run")
    memory = mf.train(spec, DATA, **options)
    assert verify(disk) == verify(memory) == verify(tmp_path / "run")
    found = outcomes(verify(disk))
    for name in ("Lemma 3", "Lemma 4", "Lemma 9", "Lemma 10", "Lemma 11", "Theorem 4 (identity)"):
        assert found[name] == "holds"
    assert "fails" not in found.values()


def test_a_finite_set_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "deltas.npy", DELTAS)
    np.save(tmp_path / "others.npy", 2 * DELTAS)
    spec = f"finite-set:{tmp_path / 'deltas.npy'}"
    out = tmp_path / "run"
    mf.train("mlp:6", DATA, attack=spec, lr=0.1, epochs=5, dtype="float64", out=out)
    with pytest.raises(InputError, match=r"give it: verify\(run, attack=…\)"):
        verify(out)
    with pytest.raises(RunError, match="was made against"):
        verify(out, attack=FiniteSet(torch.from_numpy(2 * DELTAS)))
    found = outcomes(verify(out, attack=FiniteSet(torch.from_numpy(DELTAS))))
    assert found["Lemma 4"] == found["Theorem 4 (identity)"] == found["Lemma 10"] == "holds"

    assert main(["verify", str(out)]) == 2
    assert "attack=" in capsys.readouterr().err
    assert main(["verify", str(out), "--attack", spec, "--json"]) == 0
    written = json.loads((out / "verdicts.json").read_text(encoding="utf-8"))
    assert {v["statement"]: v["outcome"] for v in written} == found
    assert main(["verify", str(out), "--attack", f"finite-set:{tmp_path / 'others.npy'}"]) == 2


def own() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 1, bias=False)
    ).double()


def test_a_network_of_another_make(tmp_path: Path) -> None:
    """From disk its architecture must be given; in memory it is there. Its ReLU works in place."""
    torch.manual_seed(0)
    model = own()
    run = mf.train(model, DATA, attack="fgsm:eps=0.05", lr=0.1, epochs=5, out=tmp_path / "run")
    stored = mf.load_run(tmp_path / "run")
    found = outcomes(verify(stored))
    assert found["Lemma 9"] == "does not apply"
    verdict = {v.statement: v for v in verify(stored)}["Lemma 9"]
    assert "verify(run, model=…)" in verdict.measured
    assert found["Lemma 11"] == "holds"
    assert outcomes(verify(run))["Lemma 9"] == "holds"
    given = own()
    before = [p.detach().clone() for p in given.parameters()]
    found = outcomes(verify(stored, model=given))
    for name in ("Lemma 3", "Lemma 4", "Lemma 9", "Lemma 13", "Theorem 4 (identity)"):
        assert found[name] == "holds"
    assert all(torch.equal(p, b) for p, b in zip(given.parameters(), before, strict=True))


def test_a_network_that_is_not_homogeneous() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 1)).double()
    run = mf.train(model, DATA, attack="fgm:eps=0.1", lr=0.1, epochs=2, measure=False)
    found = {v.statement: v for v in verify(run)}
    for name in ("Lemma 3", "Lemma 4", "Lemma 9", "Lemma 10", "Lemma 11", "Lemma 13"):
        assert found[name].outcome == "does not apply"
        assert "a multi-homogeneous network" in found[name].measured
    assert "fails" not in {v.outcome for v in found.values()}


def test_judging_leaves_the_network_alone() -> None:
    model = mf.models.mlp(5, 6, 1, seed=0)
    run = mf.train(model, DATA, attack="pgd-l2:eps=0.1,steps=2,random=true", lr=0.1, epochs=3)
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    one, two = verify(run), verify(run)
    assert one == two
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        assert p.grad is None
        assert p.requires_grad
        assert torch.equal(p, before[name])


def test_only_some_of_many_examples_are_examined() -> None:
    data = mf.load("separable:n=1500,d=5,margin=0.3")
    run = mf.train("mlp:4", data, attack="fgm:eps=0.1", lr=0.1, epochs=1, dtype="float64")
    found = {v.statement: v for v in verify(run, data)}
    assert "1000 of 1500 examples" in found["Lemma 4"].measured
    wide = mf.train("mlp:60000", DATA, attack="fgm:eps=0.1", lr=0.01, epochs=1, dtype="float64")
    assert "12 examples" in {v.statement: v for v in verify(wide)}["Lemma 9"].measured


def test_a_dead_network_fails_nothing() -> None:
    model = mf.models.mlp(5, 6, 1, seed=0).double()
    data = mf.load(DATA)
    run = mf.train(model, data, attack="fgm:eps=0.1", lr=0.1, epochs=2, keep_weights=True)
    for weights in run.weights.values():
        weights["linear1.weight"].copy_(-weights["linear1.weight"].abs())
    dead = mf.Dataset(data.x.abs(), data.y, name=data.name)
    run.config["data_sha256"] = dead.fingerprint()
    found = outcomes(verify(run, dead))
    assert "fails" not in found.values()
    for weights in run.weights.values():
        weights["linear2.weight"].zero_()
    assert "fails" not in outcomes(verify(run, dead)).values()
