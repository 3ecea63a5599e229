"""Alignment and balance of deep linear networks (Section 3.1, Definition 2, Eq. 36).

Everything that tends to 1 is also given as its distance from 1, computed without
cancellation, because the theory speaks of rates: ``1 − ⟨u_k, v_{k+1}⟩²`` falls like σ⁻⁴ and is
lost in float64 if formed by subtraction once σ exceeds 10⁴.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor, nn

from marginflow.errors import InputError, ModelError, RunError
from marginflow.models import linear_layers
from marginflow.runs import Run


@dataclass(frozen=True, eq=False)
class Alignment:
    """How close the layers W_1, …, W_L are to rank one and to each other's directions.

    All tensors are float64. σ_k, u_k, v_k is the leading singular triple of W_k: u_k lies on
    its output side, v_k on its input side, so u_k and v_{k+1} live in the same space.

    Attributes:
        product: W_Π = W_L ⋯ W_1, shape (outputs, d).
        frobenius: ``‖W_k‖_F``, (L,).
        spectral: ``σ_k = ‖W_k‖₂``, (L,).
        left, right: the u_k, (outputs,), and v_k, (inputs,), of W_k, one tensor a layer. Their
            signs are arbitrary.
        rank_one_gaps: ``1 − (‖W_k‖₂/‖W_k‖_F)² = Σ_{i≥2} σ_{k,i}² / ‖W_k‖_F²``, (L,), which is
            Θ(1/σ²) under Theorem 2.
        neighbour_gaps: ``1 − ⟨u_k, v_{k+1}⟩²``, (L−1,), which is O(1/σ⁴) under Theorem 2.
        product_gap: ``1 − ‖W_Π‖₂ / Π ‖W_k‖_F``, one scalar for it all.
        balances: ``W_{k+1}ᵀW_{k+1} − W_kW_kᵀ``, L − 1 symmetric matrices, the k-th of shape (units,
            units) of layer k.
    """

    product: Tensor
    frobenius: Tensor
    spectral: Tensor
    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    rank_one_gaps: Tensor
    neighbour_gaps: Tensor
    product_gap: float
    balances: tuple[Tensor, ...]

    @property
    def neighbours(self) -> Tensor:
        """``|⟨u_k, v_{k+1}⟩|``, (L−1,), Eq. (14)."""
        return (
            torch.stack(
                [torch.dot(u, v).abs() for u, v in zip(self.left, self.right[1:], strict=False)]
            )
            if len(self.left) > 1
            else self.spectral.new_empty(0)
        )

    @property
    def ratios(self) -> Tensor:
        """``‖W_k‖₂ / ‖W_k‖_F``, (L,), the quantity of Figure 7."""
        return self.spectral / self.frobenius

    @property
    def product_ratio(self) -> float:
        """``‖W_Π‖₂ / Π ‖W_k‖_F``: 1 if and only if all layers are rank one and aligned."""
        return 1.0 - self.product_gap

    def angle_to(self, reference: Tensor) -> float:
        """Angle of W_Π (one output) to ``reference``, in radians, accurate below 1e-8.

        Args:
            reference: the other vector, of as many numbers as examples have features, of any shape.

        Raises:
            ModelError: several outputs.
            InputError: another number of features, a zero vector.
        """
        if self.product.shape[0] != 1:
            raise ModelError(f"the angle of W_Π needs one output, got {self.product.shape[0]}")
        return angle(self.product[0], reference)

    def first_layer_gap(self, reference: Tensor) -> float:
        """``1 − ⟨v_1, ū⟩²`` for a unit vector ū, Eq. (71).

        Args:
            reference: ū, (d,); only its direction counts.

        Raises:
            InputError: another number of features, a zero vector.
        """
        return sine_squared(self.right[0], reference)


def measure_alignment(layers: nn.Module | tuple[Tensor, ...]) -> Alignment:
    """Measure the alignment of a deep linear network, given as a module or by its matrices.

    Source: Definition 2 and Eq. (14).

    Args:
        layers: the network, or W_1, …, W_L in float64, W_k of shape (outputs, inputs).

    Raises:
        ModelError: not a deep linear network, or a zero layer.
    """
    matrices = linear_layers(layers) if isinstance(layers, nn.Module) else layers
    if not matrices or not all(isinstance(w, Tensor) and w.ndim == 2 for w in matrices):
        raise ModelError(
            "alignment: expected a network, or its matrices as tensors with two axes, got "
            f"{type(layers).__name__}"
        )
    frobenius, spectral, left, right, tails = [], [], [], [], []
    for k, w in enumerate(matrices, start=1):
        if not bool(w.isfinite().all()):
            raise ModelError(f"alignment: the weights of layer {k} are not finite")
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        if not bool(s[0] > 0):
            raise ModelError(f"alignment: layer {k} is 0 and has no direction")
        size = torch.linalg.vector_norm(s)
        frobenius.append(size)
        spectral.append(s[0])
        left.append(u[:, 0])
        right.append(vh[0])
        # The small singular values themselves: their sum is exact where 1 − ratio² is not.
        tails.append((s[1:] / size).square().sum())
    product = reduce(lambda below, above: above @ below, matrices)
    return Alignment(
        product=product,
        frobenius=torch.stack(frobenius),
        spectral=torch.stack(spectral),
        left=tuple(left),
        right=tuple(right),
        rank_one_gaps=torch.stack(tails),
        neighbour_gaps=torch.tensor(
            [sine_squared(u, v) for u, v in zip(left, right[1:], strict=False)],
            dtype=torch.float64,
        ),
        product_gap=_product_gap(matrices),
        balances=balances(matrices),
    )


def matrices_along(run: Run) -> dict[int, tuple[Tensor, ...]]:
    """The matrices W_1, …, W_L at the measured steps of a run that kept its weights, in float64.

    Args:
        run: a run of a deep linear network that kept its weights.

    Returns:
        by step, W_1, …, W_L with W_k of shape (outputs, inputs).

    Raises:
        RunError: the run kept no weights along its path, or a file is damaged.
    """
    kept = run.trajectory()
    if not kept:
        raise RunError(
            f"the run {run.name!r} kept no weights along its path; train with keep_weights=True"
        )
    return {step: tuple(w.double() for w in weights.values()) for step, weights in kept.items()}


def balances(matrices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``W_{k+1}ᵀW_{k+1} − W_kW_kᵀ`` for k = 1 … L−1, conserved along the gradient flow (Eq. 36).

    Args:
        matrices: W_1, …, W_L, each (outputs, inputs).

    Returns:
        L − 1 symmetric matrices, the k-th of shape (units, units) of layer k.
    """
    return tuple(above.T @ above - below @ below.T for below, above in pairwise(matrices))


def angle(a: Tensor, b: Tensor) -> float:
    """The angle between two vectors, in [0, π] radians.

    ``2 atan2(‖â − b̂‖, ‖â + b̂‖)`` (Kahan): relative accuracy near 0 and near π, where
    arccos of the cosine has none below 1e-8.

    Args:
        a: a vector of any shape; it is flattened.
        b: another of as many numbers, of any shape.

    Raises:
        InputError: different sizes, or a zero vector.
    """
    x, y = _unit(a), _unit(b)
    if x.shape != y.shape:
        raise InputError(f"angle: expected vectors of one size, got {len(x)} and {len(y)} numbers")
    return 2 * float(torch.atan2(torch.linalg.vector_norm(x - y), torch.linalg.vector_norm(x + y)))


def sine_squared(a: Tensor, b: Tensor) -> float:
    """``1 − ⟨â, b̂⟩²`` as ``‖â − ⟨â, b̂⟩ b̂‖²``: relative accuracy down to 1e-31.

    Args:
        a: a vector of any shape; it is flattened.
        b: another of as many numbers, of any shape.

    Raises:
        InputError: different sizes, or a zero vector.
    """
    x, y = _unit(a), _unit(b)
    if x.shape != y.shape:
        raise InputError(f"expected vectors of one size, got {len(x)} and {len(y)} numbers")
    return float((x - torch.dot(x, y) * y).square().sum())


def _unit(v: Tensor) -> Tensor:
    flat = v.detach().reshape(-1).to("cpu", torch.float64)
    peak = flat.abs().max() if len(flat) else flat.new_zeros(())
    if not bool(peak > 0) or not bool(torch.isfinite(peak)):
        raise InputError("a zero vector has no direction, nor has one that is not finite")
    flat = flat / peak  # the squares of its norm then neither under- nor overflow
    unit: Tensor = flat / torch.linalg.vector_norm(flat)
    return unit


def _product_gap(matrices: tuple[Tensor, ...]) -> float:
    """``1 − ‖W_Π‖₂ / Π‖W_k‖_F``, each factor's loss kept separately.

    With W_Π's leading right vector v pushed through the layers, ``‖W_Π v‖ = Π ‖W_k x_k‖`` for
    unit x_k, and ``‖W_k x_k‖/‖W_k‖_F = sqrt(1 − g_k)`` with g_k = (‖W_k‖_F² − ‖W_kx_k‖²)/‖W_k‖_F²
    from ``‖W_k − (W_k x_k) x_kᵀ‖_F²``, a sum of squares. The gap is −expm1(½ Σ log1p(−g_k)).
    A gap above one half needs no such care, and W_Π = 0 has no path to push a vector along.
    """
    product = reduce(lambda below, above: above @ below, matrices)
    _, s, vh = torch.linalg.svd(product, full_matrices=False)
    ratio = s[0]
    for w in matrices:
        ratio = ratio / torch.linalg.matrix_norm(w)
    if bool(ratio < 0.5):
        return float(1 - ratio)
    x, logs = vh[0], torch.zeros((), dtype=torch.float64)
    for w in matrices:
        image = w @ x
        rest = torch.linalg.matrix_norm(w - torch.outer(image, x)) / torch.linalg.matrix_norm(w)
        logs = logs + torch.log1p(-rest.square()) / 2
        x = image / torch.linalg.vector_norm(image)
    return float(-torch.expm1(logs))
