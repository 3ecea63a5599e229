"""The smallest distance between examples of different classes: what any classifier can withstand.

Source: marginflow; no classifier withstands more than half of this distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from marginflow._checks import instance
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

    Args:
        data: of two classes or more.

    Raises:
        InputError: no :class:`Dataset`.
        DataError: all examples are of one class.
    """
    instance("data", data, Dataset, "a Dataset")
    x = data.x.detach().to("cpu", torch.float64).flatten(1)
    y = data.y.cpu()
    if bool((y == y[0]).all()):
        raise DataError("class_distance: expected examples of two classes or more, got one")
    best, pair = float("inf"), (0, 0)
    for label in torch.unique(y)[:-1].tolist():  # sorted: every pair of classes is met once
        these, others = (y == label).nonzero().flatten(), (y > label).nonzero().flatten()
        columns = x[others]
        squares = columns.square().sum(dim=1)
        for rows in torch.split(these, _ROWS):
            block = x[rows]
            # ‖a − b‖² = ‖a‖² + ‖b‖² − 2⟨a, b⟩ finds the pair; its distance is formed without cancellation.
            found = block.square().sum(dim=1, keepdim=True) + squares - 2 * block @ columns.T
            place = int(found.argmin())
            value = float(found.flatten()[place])
            if value < best:
                i, j = divmod(place, len(others))
                best, pair = value, (int(rows[i]), int(others[j]))
    i, j = pair
    return ClassDistance(float(torch.linalg.vector_norm(x[i] - x[j])), min(i, j), max(i, j))
