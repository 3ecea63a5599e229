"""The smallest distance between examples of different classes: what any classifier can withstand."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from marginflow.datasets._dataset import Dataset
from marginflow.errors import DataError

_ROWS = 1024


@dataclass(frozen=True)
class ClassDistance:
    """Two training examples of different classes, nearest to each other in ℓ2.

    Attributes:
        distance: ``d_min = min {‖x_i − x_j‖₂ : y_i ≠ y_j}``.
        first, second: i and j, as places in the data.
    """

    distance: float
    first: int
    second: int

    @property
    def largest_budget(self) -> float:
        """``d_min/2``: beyond it one input is a perturbation of both examples, so no classifier is right."""
        return self.distance / 2


def class_distance(data: Dataset) -> ClassDistance:
    """The smallest ℓ2 distance between training examples of different classes, exact in float64.

    Costs n²·d multiplications; MNIST's 3 against 8 takes seconds.

    Raises:
        DataError: all examples are of one class.
    """
    x = data.x.detach().to("cpu", torch.float64).flatten(1)
    y = data.y.cpu()
    if bool((y == y[0]).all()):
        raise DataError("class_distance: expected examples of two classes or more, got one")
    squares = x.square().sum(dim=1)
    best, pair = float("inf"), (0, 0)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        # ‖a − b‖² = ‖a‖² + ‖b‖² − 2⟨a, b⟩ finds the pair; its distance is then formed without cancellation.
        found = squares[rows, None] + squares - 2 * x[rows] @ x.T
        found[y[rows, None] == y] = float("inf")
        place = int(found.argmin())
        value = float(found.flatten()[place])
        if value < best:
            i, j = divmod(place, len(x))
            best, pair = value, (start + i, j)
    i, j = pair
    return ClassDistance(float(torch.linalg.vector_norm(x[i] - x[j])), min(i, j), max(i, j))
