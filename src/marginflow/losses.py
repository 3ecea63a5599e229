"""Losses of a margin-like score, with everything in the log domain.

A loss is ``L = (1/n) Σ ℓ(z_i)`` with a falling ℓ and a score z_i per example:
the margin ``y_i f(x_i)`` of a network with one output, or for cross-entropy the
soft margin ``f[y] − logsumexp_{j≠y} f[j]``, which turns it into the logistic loss.
The adversary is the caller's: outputs are taken at ``x_i + δ_i``.

Source: the exponential and the logistic loss of the paper (Section 3); cross-entropy as in C.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from marginflow._checks import instance, unknown
from marginflow._logmath import greatest, log_mean_exp, log_softplus_neg
from marginflow.errors import DataError, InputError


def check_examples(x: Tensor, y: Tensor) -> None:
    """Refuse examples and labels that no network takes, before one is asked.

    Args:
        x: examples, (n, …), n ≥ 1: dense real numbers.
        y: labels, (n,).

    Raises:
        InputError: no tensors.
        DataError: none or complex or sparse ones, or another number of labels.
    """
    for name, value in (("x", x), ("y", y)):
        instance(name, value, Tensor, "a tensor (torch.as_tensor makes one)")
        if value.layout != torch.strided or value.is_complex():
            raise DataError(
                f"{name}: expected dense real numbers, got {value.dtype} stored as {value.layout}"
            )
    if x.ndim == 0 or x.shape[0] == 0:
        raise DataError(
            f"expected at least one example, in the shape (n, …) with n ≥ 1, got {tuple(x.shape)}"
        )
    if y.shape != x.shape[:1]:
        raise DataError(
            f"expected as many labels as examples, got {tuple(y.shape)} for {tuple(x.shape)}"
        )


def check_labels(outputs: Tensor, y: Tensor) -> bool:
    """Whether ``outputs`` are those of a one-output (binary) network, after checking y against them.

    Args:
        outputs: (n,) or (n, 1) for labels −1/+1; (n, C), C ≥ 2, for labels 0 … C − 1.
        y: integer labels, (n,).

    Returns:
        True for one output, False for several.

    Raises:
        DataError: labels or shapes that do not match.
    """
    if y.ndim != 1:
        raise DataError(f"labels: expected shape (n,), got {tuple(y.shape)}")
    if outputs.ndim not in (1, 2) or outputs.shape[0] != y.shape[0]:
        raise DataError(
            f"outputs: expected shape (n,), (n, 1) or (n, C) for n = {y.shape[0]} labels, "
            f"got {tuple(outputs.shape)}"
        )
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        if not bool(((y == 1) | (y == -1)).all()):
            found = sorted(set(y.tolist()))
            advice = "write 2*y - 1" if found in ([0, 1], [0], [1]) else "choose two classes"
            raise DataError(
                "labels: expected −1 and +1 for a network with one output, got "
                f"{found[:10]}; {advice}, or give the network one output per class and use cross-entropy"
            )
        return True
    if y.dtype != torch.int64:
        raise DataError(
            f"labels: expected class numbers of torch.int64, got {y.dtype}; use y.long()"
        )
    if not bool(((y >= 0) & (y < outputs.shape[1])).all()):
        raise DataError(
            f"labels: expected 0 … {outputs.shape[1] - 1} for a network with "
            f"{outputs.shape[1]} outputs, got {sorted(set(y.tolist()))[:10]}"
        )
    return False


def margins_of(outputs: Tensor, y: Tensor, *, checked: bool = False) -> Tensor:
    """Margins m_i: ``y_i f(x_i)``, or ``f[y_i] − max_{j≠y_i} f[j]`` for several classes.

    Args:
        outputs: (n,), (n, 1) or (n, C).
        y: labels, (n,): −1/+1 for one output, 0 … C − 1 otherwise.
        checked: the labels are known to fit (skips a pass over them).

    Returns:
        (n,), in the dtype of the outputs.

    Raises:
        DataError: labels or shapes that do not match.
    """
    if not checked:
        check_labels(outputs, y)
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        return outputs.reshape(-1) * y.to(outputs.dtype)
    true = outputs.gather(1, y.unsqueeze(1)).squeeze(1)
    others = outputs.scatter(1, y.unsqueeze(1), -torch.inf)
    return true - others.amax(dim=1)


class Loss(ABC):
    """A loss ℓ of a score; every quantity also as its logarithm.

    Attributes:
        name: what :func:`get_loss` and ``loss=`` call it.
        multiclass: whether it takes outputs (n, C) rather than (n,) or (n, 1).
    """

    name: ClassVar[str]
    multiclass: ClassVar[bool] = False

    def scores(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The scores z_i of the outputs, (n,): the margins ``y_i f(x_i)``.

        Args:
            outputs: (n,) or (n, 1); (n, C) where the loss is ``multiclass``.
            y: labels, (n,): −1/+1, or 0 … C − 1.

        Raises:
            DataError: several outputs, or labels other than −1 and +1.
        """
        if not check_labels(outputs, y):
            raise DataError(
                f"the {self.name} loss is binary: expected a network with one output and labels "
                f"−1/+1, got {outputs.shape[1]} outputs; use loss='cross-entropy'"
            )
        return margins_of(outputs, y, checked=True)

    @abstractmethod
    def values(self, z: Tensor) -> Tensor:
        """``ℓ(z_i)``. Overflows to inf where ℓ itself does.

        Shape (n,).

        Args:
            z: scores, (n,).
        """

    @abstractmethod
    def log_values(self, z: Tensor) -> Tensor:
        """``ln ℓ(z_i)``, accurate for |z| ≤ 1e4 in float32 and float64, gradient included.

        Shape (n,).

        Args:
            z: scores, (n,).
        """

    @abstractmethod
    def log_slopes(self, z: Tensor) -> Tensor:
        """``ln |ℓ′(z_i)|``, same range.

        Shape (n,).

        Args:
            z: scores, (n,).
        """

    def mean(self, z: Tensor) -> Tensor:
        """``L = (1/n) Σ ℓ(z_i)``, a scalar.

        Args:
            z: scores, (n,).
        """
        return self.values(z).mean()

    def log_mean(self, z: Tensor) -> Tensor:
        """``ln L``, a scalar; its gradient is that of :meth:`log_weights`.

        Args:
            z: scores, (n,).
        """
        return log_mean_exp(self.log_values(z))

    def log_weights(self, z: Tensor) -> Tensor:
        """``ln w_i`` with ``w_i = |ℓ′(z_i)| / Σ_j ℓ(z_j)``, so that ``∇ ln L = −Σ w_i ∇z_i``.

        For the exponential loss the w_i are softmax(−z). Shape (n,).

        Args:
            z: scores, (n,).
        """
        values = self.log_values(z)
        top = greatest(values, dim=0)
        return (self.log_slopes(z) - top) - torch.logsumexp(values - top, dim=0)


class Exponential(Loss):
    """``ℓ(z) = e^{−z}``."""

    name = "exponential"

    def values(self, z: Tensor) -> Tensor:
        """``e^{−z_i}``, shape (n,)."""
        return torch.exp(-z)

    def log_values(self, z: Tensor) -> Tensor:
        """``−z_i``, exact, shape (n,)."""
        return -z

    def log_slopes(self, z: Tensor) -> Tensor:
        """``−z_i``, exact, shape (n,)."""
        return -z


class Logistic(Loss):
    """``ℓ(z) = ln(1 + e^{−z})``."""

    name = "logistic"

    def values(self, z: Tensor) -> Tensor:
        """``ln(1 + e^{−z_i})``, without overflow, shape (n,)."""
        return -logsigmoid(z)

    def log_values(self, z: Tensor) -> Tensor:
        """``ln ln(1 + e^{−z_i})``, shape (n,)."""
        return log_softplus_neg(z)

    def log_slopes(self, z: Tensor) -> Tensor:
        """``ln σ(−z_i)``, shape (n,)."""
        return logsigmoid(-z)


class CrossEntropy(Logistic):
    """``−ln softmax(f)[y]``: the logistic loss of ``z = f[y] − logsumexp_{j≠y} f[j]``."""

    name = "cross-entropy"
    multiclass = True

    def scores(self, outputs: Tensor, y: Tensor) -> Tensor:
        """``f[y] − logsumexp_{j≠y} f[j]``, (n,).

        Args:
            outputs: (n, C), C ≥ 2.
            y: labels 0 … C − 1, (n,).

        Raises:
            DataError: one output only, or labels outside 0 … C − 1.
        """
        if check_labels(outputs, y):
            raise DataError(
                "cross-entropy: expected a network with one output per class, got one output; "
                "use loss='logistic', which is the same loss for two classes"
            )
        true = outputs.gather(1, y.unsqueeze(1)).squeeze(1)
        others = outputs.scatter(1, y.unsqueeze(1), -torch.inf)
        top = greatest(others, dim=1, keepdim=True)
        return (true - top.squeeze(1)) - torch.logsumexp(others - top, dim=1)


_LOSSES: dict[str, type[Loss]] = {c.name: c for c in (Exponential, Logistic, CrossEntropy)}


def get_loss(loss: str | Loss) -> Loss:
    """The loss of a name (``exponential``, ``logistic``, ``cross-entropy``), or the loss itself.

    Args:
        loss: a name or a :class:`Loss`.

    Raises:
        SpecificationError: an unknown name; the message gives the nearest one.
        InputError: neither a name nor a loss.
    """
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str):
        raise InputError(f"loss: expected a name or a Loss, got {loss!r}")
    name = loss.lower().replace("_", "-").replace("crossentropy", "cross-entropy")
    if name not in _LOSSES:
        raise unknown("loss", loss, _LOSSES)
    return _LOSSES[name]()
