"""Whether a budget exceeds what any classifier can withstand: the caption of Figures 4 and 5."""

from __future__ import annotations

from marginflow.datasets import Dataset, class_distance


def budget_note(data: Dataset, eps: float) -> str:
    """What ε means for a true ℓ2 adversary on ``data``, with the numbers."""
    d = class_distance(data)
    half = d.largest_budget
    names = " and ".join(data.classes) if len(data.classes) == 2 else "of different classes"
    if eps <= half:
        return (
            f"Two training examples ({names}) lie {d.distance:.2f} apart in ℓ2; ε = {eps:g} is at most "
            f"half of that ({half:.2f}), so a classifier robust on the training set may exist."
        )
    return (
        f"No classifier withstands ε = {eps:g} here: two training examples ({names}) lie {d.distance:.2f} "
        f"apart in ℓ2, so beyond {half:.2f} one input is a perturbation of both. The FGM is weaker than a "
        "true ℓ2 adversary: accuracy under it says nothing of robustness."
    )
