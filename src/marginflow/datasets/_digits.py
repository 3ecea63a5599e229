"""The handwritten digits that come with scikit-learn: 1797 real images of 8 × 8 pixels."""

from __future__ import annotations

import numpy as np
import torch

from marginflow._checks import optional
from marginflow._specs import Spec
from marginflow.datasets import _classes
from marginflow.datasets._dataset import Dataset

_TEST_EVERY = 5


def load(spec: Spec) -> Dataset:
    """Load ``digits``, ``digits:3,8`` (binary: 3 is −1, 8 is +1) or ``digits:0,1,2,n=100``.

    ``x``: float32 of shape (n, 1, 8, 8), pixels/16 in [0, 1] (exact). Examples keep the order of
    scikit-learn. Of the chosen classes every fifth example (the 5th, 10th, …) is the test split,
    the others are the training split; ``n`` keeps the first n of the latter.

    Raises:
        DataError: ``n`` exceeds what there is.
        InputError: bad digits or options.
    """
    digits, limit = _classes.digits_of(spec), _classes.limit_of(spec)
    source = optional("sklearn.datasets", "scikit-learn", "the data set 'digits'")
    bundle = source.load_digits()
    images, labels = _classes.select(bundle.images, bundle.target, digits)
    x = torch.from_numpy(images / 16).to(torch.float32).unsqueeze(1)
    y = torch.from_numpy(labels)
    held_out = torch.from_numpy(np.arange(len(y)) % _TEST_EVERY == _TEST_EVERY - 1)
    _classes.check_limit(limit, int((~held_out).sum()), spec)
    return Dataset(
        x[~held_out][:limit],
        y[~held_out][:limit],
        classes=tuple(map(str, digits)),
        bounds=(0.0, 1.0),
        test=Dataset(x[held_out], y[held_out]),
    )
