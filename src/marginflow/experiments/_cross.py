"""The cross-perturbation matrix: trained against A, measured under B (after Eq. 20)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from marginflow.attacks import build
from marginflow.datasets import Dataset
from marginflow.experiments._beside import setting_note
from marginflow.experiments._claims import Finding, judge, milli, two_standard_errors
from marginflow.experiments._experiment import Experiment, Results, ScaleName, Trained, Training
from marginflow.experiments._figure import FigureData, Matrix
from marginflow.margins import adversarial_margins
from marginflow.theorems._verdict import Claim


@dataclass(frozen=True)
class Cross(Experiment):
    """The same net against each of several perturbations, measured under all of them.

    Attributes:
        data, model, batch_size, epochs, lr: of all nets.
        attacks: name in the matrix and specification of each perturbation; standard training is added.
    """

    name: ClassVar[str] = "cross"
    title: ClassVar[str] = "Trained against one perturbation, measured under another"

    data: str
    model: str
    batch_size: int
    epochs: int
    attacks: tuple[tuple[str, str], ...]
    lr: float = 0.1

    @property
    def _rows(self) -> tuple[tuple[str, str | None], ...]:
        return (("none", None), *self.attacks)

    def trainings(self) -> tuple[Training, ...]:
        """One net for each perturbation, and the standard one."""
        return tuple(
            Training(
                name.lower().replace("ℓ", "l").replace("∞", "inf"),
                name,
                self.data,
                self.model,
                attack,
                self.epochs,
                lr=self.lr,
                batch_size=self.batch_size,
                measure_with=None if attack else "none",
                per_decade=3,
            )
            for name, attack in self._rows
        )

    def figure(self, results: Results) -> FigureData:
        """Two matrices, of γ̂_m and of the test accuracy; the diagonal should be best in its column."""
        data = results.load(self.data)
        test = data if data.test is None else data.test
        nets = [results[t.name] for t in self.trainings()]
        names = [name for name, _ in self._rows]
        measured = [[_measured(seeds, data, test, b) for _, b in self._rows] for seeds in nets]
        margins = [[m for m, _ in row] for row in measured]
        shares = [[a for _, a in row] for row in measured]
        by_margin = _columns(names, margins, milli)
        by_share = _columns(
            names, shares, _text_of_share, lambda a, b: two_standard_errors(a, b, test.n)
        )
        return FigureData(
            self.name,
            self.title,
            f"Largest margin for the net trained with the perturbation itself: {by_margin.text}.",
            (
                Matrix(
                    "γ̂_m of the training examples (×10⁻³)",
                    "measured under",
                    "trained against",
                    names,
                    names,
                    [[1e3 * value for value in row] for row in margins],
                    decimals=2,
                ),
                Matrix(
                    "Test accuracy (%)",
                    "measured under",
                    "trained against",
                    names,
                    names,
                    [[100 * value for value in row] for row in shares],
                ),
            ),
            (
                setting_note(self.trainings()[0], results),
                f"{self.epochs:,} epochs; "
                + "; ".join(f"{name}: {attack}" for name, attack in self.attacks)
                + f". {test.n:,} test examples.",
            ),
            (
                judge(_claim("margin", "γ̂_m of the training examples", "none"), {"": by_margin}),
                judge(
                    _claim(
                        "accuracy",
                        "test accuracy",
                        "two standard errors of the difference of two shares",
                    ),
                    {"": by_share},
                ),
            ),
        )


def _measured(
    seeds: Sequence[Trained], data: Dataset, test: Dataset, attack: str | None
) -> tuple[float, float]:
    """γ̂_m of the training examples and the test accuracy under ``attack``, means of the seeds."""
    found = []
    for t in seeds:
        model = t.run.load_model()
        how = build(attack)
        margin = adversarial_margins(model, data.x, data.y, how).normalized_min
        share = adversarial_margins(model, test.x, test.y, how, normalize=False).accuracy
        found.append((margin, share))
    first, second = (sum(values) / len(values) for values in zip(*found, strict=True))
    return first, second


def _claim(part: str, quantity: str, tolerance: str) -> Claim:
    return Claim(
        f"After Eq. 20, {part}",
        "a net does worse under a perturbation than one trained with that very perturbation",
        (),
        f"{quantity}: columns of the matrix whose diagonal is largest",
        "all of them",
        f"{tolerance}; ties count for the diagonal",
    )


def _columns(
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    text: Callable[[float], str],
    slack: Callable[[float, float], float] = lambda a, b: 0.0,
) -> Finding:
    """Whether each column is largest on the diagonal, up to ``slack``, and where it is not, by how much."""
    count, lost = len(names), []
    for j, name in enumerate(names):
        best = max(range(count), key=lambda k: values[k][j])
        if values[best][j] - values[j][j] > slack(values[best][j], values[j][j]):
            lost.append(
                f"under {name} the net trained with {names[best]} has {text(values[best][j])}, its own "
                f"{text(values[j][j])}"
            )
    kept = f"{count - len(lost)} of {count} columns"
    return Finding(not lost, "; ".join([kept, *lost]))


def _text_of_share(value: float) -> str:
    return f"{value:.1%}"


CROSS: dict[ScaleName, Cross] = {
    "demo": Cross(
        data="digits:3,8",
        model="mlp:128,32",
        batch_size=32,
        epochs=400,
        attacks=(
            ("FGSM", "fgsm:eps=0.1"),
            ("ℓ∞-PGD", "pgd-linf:eps=0.1,steps=5"),
            ("ℓ2-FGM", "fgm:eps=0.6"),
            ("ℓ2-PGD", "pgd-l2:eps=0.6,steps=5"),
        ),
    ),
    "mnist": Cross(
        data="mnist:3,8,n=3000",
        model="mlp:1024,64",
        batch_size=80,
        epochs=200,
        attacks=(
            ("FGSM", "fgsm:eps=32/255"),
            ("ℓ∞-PGD", "pgd-linf:eps=32/255,steps=5"),
            ("ℓ2-FGM", "fgm:eps=2"),
            ("ℓ2-PGD", "pgd-l2:eps=2,steps=5"),
        ),
    ),
    "paper": Cross(
        data="mnist:3,8",
        model="mlp:1024,64",
        batch_size=80,
        epochs=500,
        attacks=(
            ("FGSM", "fgsm:eps=32/255"),
            ("ℓ∞-PGD", "pgd-linf:eps=32/255,steps=5"),
            ("ℓ2-FGM", "fgm:eps=2"),
            ("ℓ2-PGD", "pgd-l2:eps=2,steps=5"),
        ),
    ),
}
