"""``Dataset``: examples, labels and what is known about them, checked once at the door.

Source: marginflow; examples and labels as in Section 3.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from marginflow._checks import real, whole
from marginflow.datasets import _validate
from marginflow.errors import DataError

_HASHED_ROWS = 4096  # examples hashed at a time: a float64 copy of MNIST takes 376 MB


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Examples ``(x_i, y_i)``, ``i = 1 … n``; immutable, and valid once it exists.

    ``x`` and ``y`` may be anything that ``torch.as_tensor`` takes, NumPy arrays included;
    memory is shared where it can be. ``x`` keeps float32 and float64, other floats become
    float32 and integers torch's default float type; ``y`` becomes int64, on the device of ``x``.

    The labels decide the kind of the problem: all in {−1, +1} is binary (one output),
    0 … C−1 is multi-class (C outputs), so {0, 1} means two classes with two outputs.

    Source: marginflow; the examples (x_i, y_i) of Section 3.

    Attributes:
        x: examples, shape (n, …) with at least one feature axis.
        y: labels, shape (n,).
        name: the specification string, for data that :func:`load` made.
        classes: the names of the classes in label order, for binary data the class −1 first;
            the labels themselves unless given.
        bounds: the range (low, high) of the features, such as (0, 1) for pixels.
        test: held-out examples of the same shape and kind; it takes over ``name``,
            ``classes``, ``bounds``, dtype and device.
        max_margin: the largest possible ℓ2 margin ``max_{‖w‖=1} min_i y_i ⟨w, x_i⟩``, where known.
        max_margin_direction: the unit vector ``w`` that attains it, in the shape of one example.

    Raises:
        DataError: empty data, no feature axis, different lengths, NaN or infinity in ``x``,
            labels of neither kind, features outside ``bounds``, a test set that does not fit.
        InputError: a ``max_margin`` that is not a positive number.
    """

    x: Tensor
    y: Tensor
    _: KW_ONLY
    name: str = "custom"
    classes: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    test: Dataset | None = None
    max_margin: float | None = None
    max_margin_direction: Tensor | None = None
    # A subset of a multi-class problem may hold the label 1 only, so copies pass the kind on.
    _binary: bool | None = None

    def __post_init__(self) -> None:
        test = self.test
        if not isinstance(test, Dataset | None):
            raise DataError(f"test: expected a Dataset, got {type(test).__name__}")
        x = _validate.features(self.x)
        y = _validate.labels(self.y, len(x)).to(x.device)
        every_label = y if test is None else torch.cat([y, test.y.to(y.device)])
        binary = _validate.is_binary(every_label) if self._binary is None else self._binary
        _validate.check_kind(
            every_label, binary, "y" if test is None else "y (with the test set's)"
        )
        checked: dict[str, Any] = {"x": x, "y": y, "_binary": binary}
        checked["classes"] = _validate.class_names(self.classes, binary, int(every_label.max()))
        if self.bounds is not None:
            checked["bounds"] = _validate.bounds(self.bounds, x)
        if self.max_margin is not None:
            checked["max_margin"] = real("max_margin", self.max_margin, above=0)
        if self.max_margin_direction is not None:
            direction = _validate.tensor(self.max_margin_direction, "max_margin_direction")
            if direction.shape != x.shape[1:]:
                raise DataError(
                    "max_margin_direction: expected the shape of one example, "
                    f"{tuple(x.shape[1:])}, got {tuple(direction.shape)}"
                )
            checked["max_margin_direction"] = direction.to(x)
        if test is not None:
            inherited = {k: checked.get(k) for k in ("classes", "bounds", "_binary")}
            checked["test"] = _adopted(test, x, {"name": self.name, **inherited})
        for field, value in checked.items():
            object.__setattr__(self, field, value)

    def __repr__(self) -> str:
        test = f", test={self.test.n}" if self.test else ""
        return (
            f"Dataset({self.name!r}, n={self.n}, shape={self.shape}, "
            f"classes=({', '.join(self.classes[:12])}{', …' * (self.num_classes > 12)}){test})"
        )

    @property
    def binary(self) -> bool:
        """Whether the labels are −1 and +1 (one output) rather than 0 … C−1 (C outputs)."""
        return bool(self._binary)

    @property
    def n(self) -> int:
        """The number of examples."""
        return self.x.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.x.shape[1:])

    @property
    def features(self) -> int:
        """The number of features of one example, the paper's d."""
        return math.prod(self.shape)

    @property
    def num_classes(self) -> int:
        """The number of classes: 2 for binary data."""
        return len(self.classes)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Dataset:
        """Copy the data, test set included, to another float type or device.

        Args:
            dtype: float32 or float64; None keeps it.
            device: where to; None keeps it.

        Raises:
            DataError: ``dtype`` is neither ``torch.float32`` nor ``torch.float64``.
        """
        if dtype not in (None, torch.float32, torch.float64):
            raise DataError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
        # The other tensors follow x in __post_init__.
        return replace(self, x=self.x.to(device=device, dtype=dtype))

    def subset(self, indices: Sequence[int] | Tensor) -> Dataset:
        """Pick training examples: indices (in the order given) or a boolean mask of shape (n,).

        Classes, bounds and the test set stay. The name becomes "custom" and the known
        maximum margin is dropped, for they are those of the whole.

        Args:
            indices: whole numbers, negative ones counting from the end, or a mask, (n,).

        Raises:
            DataError: an index out of range, not an integer, or none at all.
        """
        chosen = _validate.tensor(indices, "indices").to(self.x.device)
        if chosen.dtype == torch.bool and chosen.shape == (self.n,):
            chosen = chosen.nonzero().flatten()
        if chosen.numel() == 0:
            raise DataError("indices: expected at least one example, got none")
        if chosen.ndim != 1 or chosen.dtype == torch.bool or chosen.is_floating_point():
            raise DataError(
                f"indices: expected a list of integers or a boolean mask of shape ({self.n},), "
                f"got shape {tuple(chosen.shape)} and type {chosen.dtype}"
            )
        chosen = chosen.long()
        if int(chosen.min()) < -self.n or int(chosen.max()) >= self.n:
            raise DataError(
                f"indices: expected numbers below {self.n}, "
                f"got {int(chosen.min())} to {int(chosen.max())}"
            )
        return replace(
            self,
            x=self.x[chosen],
            y=self.y[chosen],
            name="custom",
            max_margin=None,
            max_margin_direction=None,
        )

    def sample(self, size: int, *, seed: int = 0) -> Dataset:
        """At most ``size`` random examples, and as many of the test set, in their own order.

        The same seed gives the same examples. What has no more than ``size`` stays whole.

        Args:
            size: how many examples at most, ≥ 1.
            seed: which.

        Raises:
            InputError: a size below 1.
        """
        size, seed = whole("size", size, least=1), whole("seed", seed, least=0)
        chosen = self if size >= self.n else self.subset(_drawn(self.n, size, seed))
        test = self.test
        if test is not None and size < test.n:
            chosen = replace(chosen, test=test.subset(_drawn(test.n, size, seed)))
        return chosen

    def fingerprint(self) -> str:
        """Hash shapes, examples (as float64) and labels, test set included, with SHA-256.

        The dtype and the device do not enter, only the values.
        """
        digest = hashlib.sha256()
        for part in (self, self.test):
            digest.update(f"{None if part is None else tuple(part.x.shape)}\n".encode())
            if part is None:
                continue
            for rows in torch.split(part.x, _HASHED_ROWS):
                values = rows.to("cpu", torch.float64).numpy()
                digest.update(values.astype("<f8", copy=False).tobytes())
            digest.update(part.y.cpu().numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()


def _drawn(n: int, size: int, seed: int) -> Tensor:
    """``size`` of the indices below ``n``, rising."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:size].sort().values


def _adopted(test: Dataset, x: Tensor, inherited: dict[str, Any]) -> Dataset:
    """``test`` as the test set of the data ``x``: same type, device, kind, classes and bounds."""
    if test.test is not None:
        raise DataError("test: expected a data set without a test set of its own")
    if test.x.shape[1:] != x.shape[1:]:
        raise DataError(
            f"test: expected examples of shape {tuple(x.shape[1:])} as in training, "
            f"got {tuple(test.x.shape[1:])}"
        )
    try:
        return replace(test, x=test.x.to(x), **inherited)
    except DataError as error:
        raise DataError(f"test: {error}") from None
