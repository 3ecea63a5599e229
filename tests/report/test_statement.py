from __future__ import annotations

from collections.abc import Callable

import pytest

from marginflow.errors import InputError, RunError
from marginflow.report import statement
from marginflow.report._statement import caveats, question
from marginflow.runs import Run

Make = Callable[..., Run]


def constant(value: float) -> Callable[[int], float]:
    return lambda epoch: value


def test_one_adversarial_run(make_run: Make) -> None:
    assert statement([make_run(margins=constant(0.00205))]) == (
        "Training against FGSM, ε = 0.15 for 1,000 epochs on digits:3,8 (n = 286, seed 0) ends with "
        "γ̂_m = 2.05 × 10⁻³ (the smallest normalised margin under that attack) and 100% of the perturbed "
        "training examples (90.0% of the test examples) classified correctly."
    )


def test_one_run_measured_under_another_attack(make_run: Make) -> None:
    run = make_run(
        measure_with="pgd-linf:steps=5,step=0.023529411764705882,eps=0.06274509803921569",
        margins=constant(-0.166),
        test=False,
        epochs=(0, 1),
    )
    assert statement([run]) == (
        "Training against FGSM, ε = 0.15 for 1 epoch on digits:3,8 (n = 286, seed 0) ends with "
        "γ̂_m = −0.166 (the smallest normalised margin under ℓ∞-PGD, ε = 16/255, 5 steps of 6/255) and "
        "50.1% of the perturbed training examples classified correctly."
    )


def test_one_standard_run(make_run: Make) -> None:
    measured = make_run(attack="none", measure_with="fgsm:eps=0.15", margins=constant(-0.166))
    assert statement([measured]).startswith("Standard training for 1,000 epochs on digits:3,8")
    assert "(the smallest normalised margin under FGSM, ε = 0.15)" in statement([measured])
    clean = make_run(attack="none", margins=constant(0.05))
    assert statement([clean]) == (
        "Standard training for 1,000 epochs on digits:3,8 (n = 286, seed 0) ends with γ̂_m = 0.0500 (the "
        "smallest normalised margin of the unperturbed training examples) and 100% of the training "
        "examples (95.0% of the test examples) classified correctly."
    )


def test_adversarial_against_standard(make_run: Make) -> None:
    a = make_run("adv", margins=constant(0.00205))
    s = make_run("std", attack="none", measure_with="fgsm:eps=0.15", margins=constant(-0.166))
    s.final["adversarial_accuracy"], s.final["test_adversarial_accuracy"] = 0.238, 0.268
    expected = (
        "Measured under FGSM, ε = 0.15, adversarial training (adv) ends with a larger normalised margin "
        "than standard training (std): γ̂_m = 2.05 × 10⁻³ against γ̂_m = −166 × 10⁻³, with 100% against 23.8% "
        "of the perturbed training examples (90.0% against 26.8% of the test examples) classified "
        "correctly, after 1,000 epochs on digits:3,8 (n = 286, seed 0)."
    )
    assert statement([a, s]) == expected
    assert statement([s, a]) == expected
    assert question([a, s]).startswith("Does adversarial training end with a larger")


@pytest.mark.parametrize(
    ("adversarial", "standard", "verdict"),
    [
        (0.01, 0.02, "adversarial training (adv) ends with a smaller normalised margin than"),
        (0.02, 0.02, "ends with the same normalised margin as"),
        (None, 0.02, "cannot be compared in its normalised margin with"),
        (0.01, None, "cannot be compared in its normalised margin with"),
    ],
)
def test_the_verdict_follows_the_numbers(
    make_run: Make, adversarial: float | None, standard: float | None, verdict: str
) -> None:
    a = make_run("adv")
    s = make_run("std", attack="none", measure_with="fgsm:eps=0.15", epochs=(0, 1, 500))
    a.final["normalized_margin"], s.final["normalized_margin"] = adversarial, standard
    text = statement([a, s])
    assert verdict in text
    assert ("no finite γ̂_m" in text) == (None in (adversarial, standard))
    assert "after 1,000 epochs and 500 epochs" in text


def test_several_runs_under_one_attack(make_run: Make) -> None:
    runs = [
        make_run(f"r{k}", seed=k, margins=constant(margin))
        for k, margin in enumerate((0.002, 0.005, -0.001))
    ]
    text = statement(runs)
    assert text.startswith(
        "Measured under FGSM, ε = 0.15 on digits:3,8 (n = 286, seeds 0, 1, 2), "
        "r1 ends with the largest normalised margin of 3 runs, γ̂_m = 5.00 × 10⁻³"
    )
    assert "and r2 with the smallest, γ̂_m = −1.00 × 10⁻³" in text
    assert question(runs).startswith("Which of these runs")
    for run in runs:
        run.final["normalized_margin"] = 0.5
    assert "all 3 runs end with the same normalised margin, γ̂_m = 0.500." in statement(runs)
    runs[0].final["normalized_margin"] = runs[1].final["normalized_margin"] = None
    assert "fewer than two of these 3 runs have a finite γ̂_m" in statement(runs)


def test_two_adversarial_runs_are_no_comparison_with_standard_training(make_run: Make) -> None:
    runs = [make_run("a"), make_run("b", attack="fgsm:eps=0.1", measure_with="fgsm:eps=0.15")]
    assert "standard" not in statement(runs)
    assert "of 2 runs" in statement(runs) or "all 2 runs" in statement(runs)


def test_different_perturbations_do_not_compare(make_run: Make, standard: Run) -> None:
    other = make_run("weak", attack="fgsm:eps=0.1")
    text = statement([other, standard])
    assert text.startswith(
        "These runs are measured under different perturbations, so their margins do not compare: "
        "weak ends with γ̂_m = "
    )
    assert "under FGSM, ε = 0.1 on digits:3,8 (n = 286, seed 0) after 1,000 epochs" in text
    assert "larger" not in text
    assert caveats([other, standard])[0] == (
        "The runs are measured under different perturbations (weak: FGSM, ε = 0.1; standard: FGSM, "
        "ε = 0.15): their margins, adversarial accuracies and losses do not compare."
    )


def test_different_data_do_not_compare(make_run: Make, standard: Run) -> None:
    other = make_run("mnist", data="mnist:3,8", data_sha256="0")
    assert "measured on different data, so" in statement([other, standard])
    same_name = make_run("changed", data_sha256="0")
    assert "measured on different data, so" in statement([same_name, standard])
    unhashed = [make_run("a", data_sha256=None), make_run("b", data_sha256=None)]
    assert "different data" not in statement(unhashed)
    both = make_run("far", attack="fgm:eps=1.5", data="mnist:3,8", data_sha256="0")
    assert "under different perturbations and on different data, so" in statement([both, standard])


def test_caveats(make_run: Make, adversarial: Run, standard: Run) -> None:
    assert caveats([adversarial]) == ()
    assert caveats([adversarial, standard]) == ()
    wide = make_run("wide", model_spec="mlp:64", model={"kind": "mlp", "widths": [64, 64, 1]})
    assert caveats([adversarial, wide]) == (
        "The networks differ (fgsm: mlp:32; wide: mlp:64): normalised margins compare within one "
        "architecture.",
    )
    odd = make_run("odd", loss="exponential", attack="fgsm:eps=0.15,objective=loss")
    odd.config["epochs"] = 5000
    odd.final["dead_inputs"] = 3
    text = " ".join(caveats([odd]))
    assert "odd is not finished: 1,000 of 5,000 epochs." in text
    assert "odd: the gradient vanishes at 3 training examples" in text
    assert "odd is measured by an attack on the loss" in text
    odd.config["measure_with"] = adversarial.config["measure_with"]
    assert caveats([adversarial, odd])[0].startswith("The losses differ (fgsm: logistic; odd: exp")


def test_an_almost_empty_configuration(make_run: Make) -> None:
    run = Run({}, [{"step": 5, "normalized_margin": 0.25}])
    assert statement([run]) == (
        "Standard training for 5 steps on unknown (n = –, seed unknown) ends with γ̂_m = 0.250 (the "
        "smallest normalised margin of the unperturbed training examples) and – of the training "
        "examples classified correctly."
    )
    assert "of 2 runs" in statement([run, Run({}, [{"step": 5, "normalized_margin": 0.5}])])


def test_refusals(make_run: Make) -> None:
    with pytest.raises(InputError, match="at least one run"):
        statement([])
    with pytest.raises(RunError, match="no measurements"):
        statement([make_run(epochs=())])
