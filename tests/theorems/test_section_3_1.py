"""Section 3.1 on real runs: the verdicts, against oracles that share no code with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.cells import cell_len

import marginflow as mf
from marginflow.alignment import angle, matrices_along, measure_alignment
from marginflow.cli import main
from marginflow.errors import RunError
from marginflow.references import limit_angle_times_log_time, robust_svm, w_perp
from marginflow.theorems import Verdict, verify
from marginflow.training import Callback, Trainer

DATA = "separable:n=20,d=6,margin=0.3"


def trained(
    *widths: int,
    data: str = DATA,
    attack: str | None = "exact-linear:p=2,eps=0.1",
    **options: object,
) -> tuple[mf.Run, mf.Dataset]:
    loaded = mf.load(data)
    model = mf.models.deep_linear(*widths, seed=1).double()
    return mf.train(model, loaded, attack=attack, **options), loaded  # type: ignore[arg-type]


def by_name(verdicts: tuple[Verdict, ...]) -> dict[str, Verdict]:
    return {v.statement: v for v in verdicts}


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_theorem_2_with_its_rates(depth: int) -> None:
    run, data = trained(6, *[5] * (depth - 1), 1, lr="loss-based:a=0.1", epochs=3000)
    room = 0.3 - 0.1
    gaps = np.array([room - r["normalized_margin"] for r in run.metrics])
    assert gaps.min() > 0, "γ̂_m ≤ γ_m − ε at every measured point"
    separated = np.array([r["normalized_margin"] > 0 for r in run.metrics])
    assert gaps[-1] < 0.02 * gaps[separated][0]
    verdicts = by_name(verify(run, data))
    for part in ("direction", "rank one", "alignment"):
        verdict = verdicts[f"Theorem 2 ({part})"]
        print(f"L = {depth}, {part}: {verdict.outcome}: {verdict.measured}")
        assert verdict.outcome == "holds", verdict
    # The direction once more, against the construction of the data and not the SVM oracle.
    last = list(matrices_along(run).values())[-1]
    if data.max_margin_direction is None:
        pytest.fail("the synthetic data know their direction")
    assert measure_alignment(last).angle_to(data.max_margin_direction) < 0.01
    ratio = next(iter(reversed(run.metrics)))["normalized_margin"] / room
    assert 0.99 < ratio < 1


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_margin_never_exceeds_its_bound_at_any_step(depth: int) -> None:
    run, _ = trained(6, *[5] * (depth - 1), 1, lr=0.2, epochs=400, schedule=range(401))
    gaps = np.array([0.3 - 0.1 - r["normalized_margin"] for r in run.metrics])
    assert len(gaps) == 401
    assert gaps.min() > 0
    assert gaps[-1] < gaps[200] < gaps[0]


def test_lemma_2_and_its_neighbours_with_its_own_step_size() -> None:
    run, data = trained(6, 5, 4, 1, lr="lemma2", epochs=2000)
    verdicts = by_name(verify(run, data))
    for name in ("Lemma 1", "Lemma 2", "Lemma 6", "Eq. 36", "Lemma 7", "Lemma 8"):
        assert verdicts[name].outcome == "holds", verdicts[name]
    assert verdicts["Theorem 2 (direction)"].outcome == "not reached"
    losses = [r["log_loss"] for r in run.metrics]
    assert losses == sorted(losses, reverse=True)


def test_the_printed_constant_is_a_check_and_not_a_schedule() -> None:
    printed, data = trained(6, 5, 4, 1, lr="lemma2:constant=printed", epochs=50)
    corrected, _ = trained(6, 5, 4, 1, lr="lemma2", epochs=50)
    assert by_name(verify(printed, data))["Lemma 2"].outcome == "holds"
    ratio = corrected.final["learning_rate"] / printed.final["learning_rate"]
    print(f"corrected / printed step size: {ratio:.3g}")
    assert ratio > 1e3


def test_with_momentum_eq_36_does_not_apply() -> None:
    run, data = trained(6, 5, 4, 1, lr=0.05, epochs=20, momentum=0.9)
    verdict = by_name(verify(run, data))["Eq. 36"]
    assert verdict.outcome == "does not apply"
    assert "momentum 0.9" in verdict.measured


def test_eq_36_fails_where_the_weights_are_tampered_with() -> None:
    class Tamper(Callback):
        def on_step(self, trainer: Trainer) -> None:
            if trainer.step == 10:
                with torch.no_grad():
                    next(trainer.model.parameters()).mul_(1 + 1e-8)

    run, data = trained(6, 5, 4, 1, lr=0.05, epochs=20, callbacks=[Tamper()])
    assert by_name(verify(run, data))["Eq. 36"].outcome == "fails"


def test_beyond_the_margin_nothing_applies_and_eq_8_is_named() -> None:
    run, data = trained(6, 5, 1, attack="exact-linear:p=2,eps=0.4", lr=0.05, epochs=20)
    for name, verdict in by_name(verify(run, data)).items():
        if name.startswith(("Theorem 2", "Lemma 1", "Lemma 2", "Lemma 8")):
            assert verdict.outcome == "does not apply"
            assert "Eq. (8): ε < γ_m (ε = 0.4, γ_m = 0.3)" in verdict.measured


@pytest.mark.parametrize(("p", "eps"), [("inf", 0.12), ("1.5", 0.2), ("3", 0.16)])
def test_under_lp_attack_the_direction_is_the_robust_one(p: str, eps: float) -> None:
    data = "separable:n=20,d=4,margin=0.3,seed=5"
    run, loaded = trained(
        4, 5, 1, data=data, attack=f"exact-linear:p={p},eps={eps}", lr="loss-based", epochs=3000
    )
    verdict = by_name(verify(run, loaded))["Appendix B.5"]
    print(f"p = {p}: {verdict.measured}")
    assert verdict.outcome == "holds"
    oracle = robust_svm(loaded.x.numpy(), loaded.y.numpy(), eps, p=float(p))
    last = measure_alignment(list(matrices_along(run).values())[-1])
    to_robust = last.angle_to(torch.from_numpy(oracle.direction))
    if loaded.max_margin_direction is None:
        pytest.fail("the synthetic data know their direction")
    to_svm = last.angle_to(loaded.max_margin_direction)
    assert to_robust < 0.02
    assert to_svm > 0.1


@pytest.mark.parametrize("seed", [2, 4])
def test_the_adversary_speeds_the_direction_up(seed: int) -> None:
    """One layer: ``angle · ln t → ‖w⊥*‖(γ_m − ε)``, extrapolated in 1/ln t from ln t = 50 … 12 000."""
    data = mf.load(f"separable:n=12,d=3,margin=2.0,seed={seed},supports=3")
    oracle = w_perp(data.x.numpy(), data.y.numpy())
    assert oracle.spans
    reference = torch.from_numpy(oracle.direction)
    limits = {}
    for share in (0.0, 0.5, 0.8):
        eps = share * 2.0
        run = mf.train(
            mf.models.deep_linear(3, 1, seed=0).double(),
            data,
            attack=f"exact-linear:p=2,eps={eps}",
            loss="exponential",
            lr=f"loss-based:a=1,fall={(2 - eps) ** 2}",  # keeps a at 1
            epochs=3000,
        )
        log_time = {r["step"]: r["log_time"] for r in run.metrics if r["step"] > 300}
        angles = {s: angle(w[0][0], reference) for s, w in matrices_along(run).items()}
        inverse = [1 / log_time[s] for s in log_time]
        products = [angles[s] * log_time[s] for s in log_time]
        limits[share] = float(np.polyfit(inverse, products, 1)[1])
        predicted = limit_angle_times_log_time(oracle, eps)
        print(
            f"ε = {share} γ: {limits[share]:.6f}, predicted {predicted:.6f}; {products[-1]:.6f} at the end"
        )
        assert limits[share] == pytest.approx(predicted, rel=0.02)
    assert limits[0.0] / limits[0.5] == pytest.approx(2, rel=0.03)
    assert limits[0.0] / limits[0.8] == pytest.approx(5, rel=0.03)


def test_a_relu_network_is_outside_section_3_1() -> None:
    data = mf.load(DATA)
    run = mf.train(mf.models.mlp(6, 5, 1, seed=0).double(), data, attack="fgm:eps=0.1", epochs=3)
    for verdict in verify(run, data):
        if verdict.statement != "Lemma 7":  # of the data alone
            assert verdict.outcome == "does not apply"
            assert "a deep linear network" in verdict.measured


def test_verify_from_disk_and_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = str(tmp_path / "run")
    arguments = ["train", "--data", DATA, "--model", "deep-linear:5,4", "--lr", "lemma2", "--quiet"]
    more = ["--attack", "exact-linear:p=2,eps=0.1", "--epochs", "200", "--dtype", "float64"]
    assert main([*arguments, *more, "--out", out]) == 0
    capsys.readouterr()
    assert main(["verify", out]) == 0
    text = capsys.readouterr().out
    assert max(cell_len(line) for line in text.splitlines() if out not in line) <= 80
    assert "Lemma 2" in text
    written = json.loads((tmp_path / "run" / "verdicts.json").read_text())
    found = {v["statement"]: v["outcome"] for v in written}
    assert found == {v.statement: v.outcome for v in verify(mf.load_run(out))}
    assert found["Lemma 2"] == found["Eq. 36"] == "holds"

    other = mf.load("separable:n=20,d=6,margin=0.3,seed=9")
    with pytest.raises(RunError, match="not those that the run was trained on"):
        verify(mf.load_run(out), other)
    assert main(["verify", str(tmp_path / "nothing")]) == 2


def test_a_failing_statement_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--data", DATA, "--model", "deep-linear:5", "--lr", "0.05", "--quiet"]
    more = ["--attack", "fgm:eps=0.1", "--epochs", "30", "--dtype", "float64", "--out", str(out)]
    assert main([*arguments, *more]) == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    forged = json.loads(lines[-1]) | {"balance_drift": 1e-3}
    (out / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(forged)]) + "\n")
    capsys.readouterr()
    assert main(["verify", str(out)]) == 1
    assert "failed: Eq. 36" in capsys.readouterr().out


def test_figures_6_and_7(tmp_path: Path) -> None:
    from marginflow.experiments import deep_linear_runs, fig6, fig7

    runs = deep_linear_runs(tmp_path, epochs=300)
    again = deep_linear_runs(tmp_path, epochs=300)
    assert [r.metrics for r in runs] == [r.metrics for r in again], "finished runs are read"
    for figure in (fig6(runs), fig7(runs)):
        assert [panel.title for panel in figure.panels] == ["L = 2", "L = 3", "L = 4"]
        assert [len(panel.curves) for panel in figure.panels] == [2, 3, 4]
    for depth, panel in zip((2, 3, 4), fig6(runs).panels, strict=True):
        final = runs[depth - 2].final["layer_norms"]
        drawn = [curve.y[-1] for curve in panel.curves]
        assert drawn == pytest.approx(final, rel=1e-12)
    for panel in fig7(runs).panels:
        assert panel.curves[-1].y[-1] == pytest.approx(1, abs=1e-15), "one row has rank one"
        assert all(0 < y <= 1 + 1e-15 for curve in panel.curves for y in curve.y if y is not None)
