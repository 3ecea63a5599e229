"""A net trained against a perturbation beside a standard one: what Figures 1 and 4 have in common."""

from __future__ import annotations

from collections.abc import Sequence

from marginflow.experiments._claims import (
    above,
    above_claim,
    each_seed,
    fitted,
    fitted_claim,
    growth,
    growth_claim,
    judge,
    milli,
    separation,
)
from marginflow.experiments._curves import (
    ACCURACY,
    MARGIN,
    Records,
    accuracy_panel,
    along_epochs,
    margin_panel,
    path_of,
    until,
)
from marginflow.experiments._experiment import Results, Trained, Training
from marginflow.experiments._figure import Panel
from marginflow.theorems import Verdict

LONGER = "train longer: a larger --scale has more epochs"


def panels_beside(
    letters: tuple[str, str],
    words: str,
    nets: tuple[Sequence[Trained], Sequence[Trained]],
    attack: str,
    last: float,
) -> list[Panel]:
    """γ̂_m and adversarial accuracy of the two nets, both measured under ``attack``, to the epoch ``last``."""
    labels = ("adversarial training", "standard training")
    margins, shares = (
        [
            along_epochs(
                label,
                trained,
                key,
                attack=attack,
                color=color,
                factor=factor,
                between=(0, last),
            )
            for color, (label, trained) in enumerate(zip(labels, nets, strict=True))
        ]
        for key, factor in ((MARGIN, 1.0), (ACCURACY, 100.0))
    )
    return [
        margin_panel(f"({letters[0]}) γ̂_m under {words}", margins),
        accuracy_panel(f"({letters[1]}) accuracy under {words}", shares),
    ]


def after_separation(title: str, trained: Sequence[Trained]) -> list[Panel]:
    """γ̂_m from where every seed has fitted everything, where growth can be seen; or no panel."""
    starts = [separation(t.records()) for t in trained]
    known = [start for start in starts if start is not None]
    if len(known) < len(starts):
        return []
    since = (max(1.0, *known), float("inf"))
    curve = along_epochs("adversarial training", trained, MARGIN, between=since)
    return [margin_panel(title, [curve], late=True)]


def verdicts_beside(
    figure: str,
    adversarial: Sequence[Trained],
    standard: Sequence[Trained],
    attack: str,
    last: float,
) -> list[Verdict]:
    """Everything is fitted; γ̂_m grows from there on; it lies above the standard net's."""
    others = {t.seed: t for t in standard}

    def paths(t: Trained) -> tuple[Records, Records]:
        both = (t.records(attack), others[t.seed].records(attack))
        return until(both[0], last), until(both[1], last)

    nets = {adversarial[0].training.label: adversarial}
    return [
        judge(fitted_claim(figure), each_seed(nets, lambda t: fitted(paths(t)[0])), LONGER),
        judge(growth_claim(figure), each_seed(nets, lambda t: growth(paths(t)[0])), LONGER),
        judge(above_claim(figure), each_seed(nets, lambda t: above(*paths(t))), LONGER),
    ]


def final_sentence(
    adversarial: Sequence[Trained], standard: Sequence[Trained], attack: str, last: float
) -> str:
    """``After 200 epochs γ̂_m is 1.2 × 10⁻³ with adversarial training, −3.4 × 10⁻³ without``."""
    ends = []
    for trained in (adversarial, standard):
        paths = [path_of(until(t.records(attack), last), MARGIN) for t in trained]
        finals = [path[max(path)] for path in paths]
        ends.append(sum(finals) / len(finals))
    return (
        f"after {last:,.0f} epochs γ̂_m is {milli(ends[0])} with adversarial and {milli(ends[1])} with "
        "standard training"
    )


def setting_note(training: Training, results: Results) -> str:
    """Data, network, rate, batch and seeds of a figure whose trainings agree in them."""
    config = results[training.name][0].run.config
    batch = "full batch" if training.batch_size is None else f"batch {training.batch_size}"
    return (
        f"{training.data}, n = {config['examples']:,}; {training.model} without biases; "
        f"{training.loss} loss; SGD at the constant rate {training.lr:g}, {batch}; "
        f"{training.dtype}; {results.seed_words}."
    )
