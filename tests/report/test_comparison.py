from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

import marginflow as mf
from marginflow.errors import InputError, RunError
from marginflow.experiments import Panel
from marginflow.monitor import QUANTILES
from marginflow.report import comparison
from marginflow.runs import Run


def panels(*runs: Run) -> dict[str, Panel]:
    return {panel.title: panel for panel in comparison(runs).panels}


def test_one_run(adversarial: Run) -> None:
    found = panels(adversarial)
    assert list(found) == [
        "Normalised margin γ̂_m",
        "Adversarial accuracy",
        "Clean accuracy",
        "Layer norms ρ_k",
        "Loss",
    ]
    margin = found["Normalised margin γ̂_m"]
    assert (margin.xlabel, margin.ylabel, margin.xscale) == ("epoch", "γ̂_m (×10⁻³)", "symlog")
    smallest, clean = margin.curves
    records = adversarial.metrics
    assert list(smallest.x) == [r["epoch"] for r in records]
    assert list(smallest.y) == pytest.approx([1e3 * r["normalized_margin"] for r in records])
    assert list(clean.y) == pytest.approx([1e3 * r["clean_normalized_margin"] for r in records])
    assert clean.dashed
    for band, level in ((smallest.low, 0.05), (smallest.high, 0.95)):
        place = QUANTILES.index(level)
        expected = [1e3 * r["normalized_margin_quantiles"][place] for r in records]
        assert list(band) == pytest.approx(expected)
    train, test = found["Adversarial accuracy"].curves
    assert list(train.y) == pytest.approx([100 * r["adversarial_accuracy"] for r in records])
    assert list(test.y) == pytest.approx([100 * r["test_adversarial_accuracy"] for r in records])
    assert (train.label, train.dashed, test.label, test.dashed) == ("train", False, "test", True)
    norms = found["Layer norms ρ_k"].curves
    assert [curve.label for curve in norms] == ["1.weight", "3.weight"]
    assert list(norms[1].y) == [r["layer_norms"][1] for r in records]
    assert [list(c.y) for c in found["Loss"].curves] == [[r["log_loss"] for r in records]]


def test_adversarial_beside_standard(adversarial: Run, standard: Run) -> None:
    found = panels(adversarial, standard)
    margin = found["Normalised margin γ̂_m"]
    assert [(c.label, c.color) for c in margin.curves] == [("fgsm", 0), ("standard", 1)]
    assert all(c.low and c.high for c in margin.curves)
    assert margin.curves[0].y[-1] > margin.curves[1].y[-1]  # type: ignore[operator]
    accuracy = found["Adversarial accuracy"].curves
    assert [c.label for c in accuracy] == [
        "fgsm, train",
        "fgsm, test",
        "standard, train",
        "standard, test",
    ]
    assert [c.color for c in accuracy] == [0, 0, 1, 1]
    rho = found["Norm product ρ"]
    assert rho.yscale == "log"
    assert list(rho.curves[0].y) == [r["norm_product"] for r in adversarial.metrics]
    # The standard run minimises another loss than the one measured: both are there.
    losses = {c.label: c for c in found["Loss"].curves}
    assert list(losses) == ["fgsm, perturbed", "standard, perturbed", "standard, as trained"]
    assert losses["standard, as trained"].y[0] is None
    assert losses["standard, as trained"].dashed


def test_a_curve_that_ends_near_zero_is_shown_larger(make_run: Callable[..., Run]) -> None:
    values = {0: -0.02, 1: -0.05, 100: -0.07, 300: -0.004, 600: 0.001, 800: -0.0005, 1000: 0.002}
    near = make_run("near", epochs=tuple(values), margins=values.__getitem__)
    far = make_run("far", epochs=tuple(values), margins=lambda epoch: -0.17)
    zoom = panels(near, far)["γ̂_m near zero"]
    assert [curve.label for curve in zoom.curves] == ["near"]
    assert list(zoom.curves[0].x) == [300, 600, 800, 1000]
    assert list(zoom.curves[0].y) == pytest.approx([-4, 1, -0.5, 2])
    assert (zoom.xscale, zoom.yscale, zoom.ylabel) == ("linear", "linear", "γ̂_m (×10⁻³)")
    assert "γ̂_m near zero" not in panels(far)
    assert "γ̂_m near zero" not in panels(make_run(margins=lambda epoch: 0.1 + epoch / 1000))


def test_many_runs_have_short_legends_and_no_bands(make_run: Callable[..., Run]) -> None:
    runs = [make_run(f"run {k}", seed=k) for k in range(5)]
    found = panels(*runs)
    assert not any(curve.low for curve in found["Normalised margin γ̂_m"].curves)
    accuracy = found["Clean accuracy"].curves
    assert [c.label for c in accuracy if not c.dashed] == [f"run {k}" for k in range(5)]
    assert {c.label for c in accuracy if c.dashed} == {""}


def test_without_a_test_split(make_run: Callable[..., Run]) -> None:
    found = panels(make_run(test=False))
    assert [c.label for c in found["Clean accuracy"].curves] == ["train"]
    assert not any("dashed" in note for note in comparison([make_run(test=False)]).notes)


def test_without_a_perturbation(make_run: Callable[..., Run]) -> None:
    found = panels(make_run(attack="none"))
    assert "Adversarial accuracy" not in found
    assert [c.label for c in found["Normalised margin γ̂_m"].curves] == ["fgsm"]
    note = comparison([make_run(attack="none")]).notes[0]
    assert "smallest margin of the unperturbed training examples" in note


def test_numbers_that_are_not_finite_are_gaps(make_run: Callable[..., Run]) -> None:
    run = make_run()
    run.metrics[2]["normalized_margin"] = None
    run.metrics[3]["normalized_margin"] = float("nan")
    run.metrics[4]["normalized_margin_quantiles"] = None
    run.metrics[5]["normalized_margin_quantiles"] = [0.0]
    run.metrics[6]["layer_norms"] = [None, "broken"]
    curve = panels(run)["Normalised margin γ̂_m"].curves[0]
    assert [k for k, y in enumerate(curve.y) if y is None] == [2, 3]
    assert [k for k, y in enumerate(curve.low) if y is None] == [4, 5]
    assert panels(run)["Layer norms ρ_k"].curves[1].y[6] is None
    for entry in run.metrics:
        entry["log_loss"] = None
    assert "Loss" not in panels(run)


def test_one_measurement_and_few_epochs(make_run: Callable[..., Run]) -> None:
    found = panels(make_run(epochs=(0,)))
    assert [len(c.x) for panel in found.values() for c in panel.curves] == [1] * 9
    assert found["Loss"].xscale == "linear"
    assert panels(make_run(epochs=(0, 20)))["Loss"].xscale == "linear"
    assert panels(make_run(epochs=(0, 21)))["Loss"].xscale == "symlog"


def test_steps_where_no_epochs_are_counted(make_run: Callable[..., Run]) -> None:
    run = make_run()
    for entry in run.metrics:
        del entry["epoch"]
    loss = panels(run)["Loss"]
    assert loss.xlabel == "step"
    assert list(loss.curves[0].x) == [entry["step"] for entry in run.metrics]


def test_notes_carry_n_seed_and_caveats(make_run: Callable[..., Run], standard: Run) -> None:
    notes = comparison([make_run()]).notes
    assert notes[-1] == "n = 286, seed 0."
    mixed = comparison([make_run("a", seed=1, examples=12000), standard]).notes
    assert "a: n = 12,000, seed 1; standard: n = 286, seed 0." in mixed
    assert comparison([make_run()], title="Mine").title == "Mine"
    assert comparison([make_run()]).title == "fgsm: training against FGSM, ε = 0.15"
    assert comparison([make_run(), standard]).title == "fgsm and standard compared"


@pytest.mark.parametrize("wrong", [[], "runs/fgsm", [1], None])
def test_what_are_no_runs(wrong: object) -> None:
    with pytest.raises(InputError, match="runs: expected"):
        comparison(wrong)  # type: ignore[arg-type]


def test_a_single_run_needs_its_list(adversarial: Run) -> None:
    with pytest.raises(InputError, match="expected a list of runs"):
        comparison(adversarial)  # type: ignore[arg-type]


def test_a_run_without_measurements(make_run: Callable[..., Run], adversarial: Run) -> None:
    with pytest.raises(RunError, match=r"'empty' has no measurements.*measure=True"):
        comparison([adversarial, make_run("empty", epochs=())])


def test_a_real_run() -> None:
    run = mf.train(
        "mlp:4", "separable:n=20,d=5,margin=0.1", attack="fgm:eps=0.02", epochs=30, lr=0.1
    )
    found = panels(run)
    curve = found["Normalised margin γ̂_m"].curves[0]
    factor = 1000 if "10⁻³" in found["Normalised margin γ̂_m"].ylabel else 1
    assert curve.y[-1] == pytest.approx(factor * run.final["normalized_margin"])
    assert all(a < b for a, b in pairwise(curve.x))
    names = [layer["name"] for layer in run.config["layers"]]
    assert [c.label for c in found["Layer norms ρ_k"].curves] == names
