"""Networks as other people's attack libraries want to see them: at least two logits, image shapes.

Source: marginflow, for the conventions of ART, foolbox and torchattacks.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

_SIDE = 5
"""The least side of an image: Square's first pattern in ℓ2 has five tiles a side."""


class TwoLogits(nn.Module):
    """The same classifier with at least two outputs: attack libraries know no single one.

    One output f becomes the logits ``[−f/2, f/2]`` of the classes −1 and +1, which these
    libraries number 0 and 1. The margin ``f[y] − f[1 − y]`` is then ``y f`` to the last bit, and the
    cross-entropy is the logistic loss. Several outputs are passed on. (With ``[0, f]`` a cross-entropy
    would lose its gradient for y = +1 where 1 − e^{−f} rounds to 1; here half of it always remains.)

    Args:
        model: maps (n, …) to (n,), (n, 1) or (n, C); kept as it is, not copied.
    """

    _kept: ClassVar[weakref.WeakValueDictionary[int, TwoLogits]] = weakref.WeakValueDictionary()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # The wrapper is in the mode of the network, so that nobody takes it for one in training.
        self.training = model.training

    @classmethod
    def of(cls, model: nn.Module) -> TwoLogits:
        """The wrapper of ``model``, the same one for as long as somebody holds it.

        Libraries compare models by identity, as torchattacks' MultiAttack does.

        Args:
            model: maps (n, …) to (n,), (n, 1) or (n, C).
        """
        if isinstance(model, TwoLogits):
            return model
        # A wrapper that lives keeps its model alive, so an id stands for one model only.
        found = cls._kept.get(id(model))
        if found is None:
            found = cls._kept[id(model)] = cls(model)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, C), C ≥ 2.

        Args:
            x: inputs, (n, …).
        """
        f: Tensor = self.model(x)
        if f.ndim == 2 and f.shape[1] > 1:
            return f
        f = f.reshape(-1, 1)
        return torch.cat([-f / 2, f / 2], dim=1)


class Layout(nn.Module):
    """A network whose inputs come in another dtype, shape and range than its own.

    ``x ↦ model(low + (high − low) x)`` for images x of shape (n, c, h, h), h ≥ 5, or in the
    given shape if ``as_images`` is False. Examples of another shape lie in the pixels of one square
    image, row by row; the pixels left over belong to nothing.

    Args:
        model: the network.
        shape: of one of its examples.
        like: a tensor of the dtype that the network takes.
        bounds: (low, high).
        as_images: whether inputs are images.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        like: Tensor,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        as_images: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.shape = tuple(shape)
        self.dtype = like.dtype
        self.low, self.high = bounds
        square = len(self.shape) == 3 and self.shape[1] == self.shape[2] >= _SIDE
        self.keeps_shape = square or not as_images

    def to_image(self, x: Tensor) -> Tensor:
        """Examples (n, …) as this network takes them, in [0, 1] and their own dtype."""
        if (self.low, self.high) != (0.0, 1.0):
            x = ((x - self.low) / (self.high - self.low)).clamp(0, 1)
        if self.keeps_shape:
            return x
        features = math.prod(self.shape)
        side = max(math.isqrt(features - 1) + 1, _SIDE)
        image = x.new_zeros(len(x), side * side)
        image[:, :features] = x.reshape(len(x), features)
        return image.reshape(-1, 1, side, side)

    def from_image(self, image: Tensor) -> Tensor:
        """The examples (n, …) of images, in the network's dtype: the inverse of :meth:`to_image`."""
        x = self.difference(image)
        return x if (self.low, self.high) == (0.0, 1.0) else self.low + x

    def difference(self, image: Tensor) -> Tensor:
        """What a difference of two images is between their examples."""
        x = image
        if not self.keeps_shape:
            x = image.flatten(1)[:, : math.prod(self.shape)].reshape(-1, *self.shape)
        return (self.high - self.low) * x.to(self.dtype)

    def forward(self, image: Tensor) -> Tensor:
        """Outputs of the network, in the dtype of the images."""
        outputs: Tensor = self.model(self.from_image(image))
        return outputs.to(image.dtype)
