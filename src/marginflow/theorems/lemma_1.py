"""Lemma 1: the adversarial loss is smooth on S(r), and the weights leave S(r)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from marginflow.theorems._evidence import Evidence, adversarial_loss
from marginflow.theorems._verdict import Claim, Verdict
from marginflow.training import printed_smoothness

_SAMPLES = 24
_DENSE = 400


def lemma_1(evidence: Evidence) -> Verdict:
    """``‖∇²L̃(W)‖₂ ≤ β(r, r̄, ε)`` on S(r), and ``max_k ‖W_k‖_F`` outgrows any r.

    S(r) is the smallest set of its kind that contains the measured path. Hessian norms are taken at
    points of the path and at seeded random points of S(r), generic ones and rank-one
    ones at the radius, where the constant is nearest. Compared with the corrected constant β*
    (and with the printed one, for which ‖x_i‖ ≤ 1 is assumed).
    """
    claim = Claim(
        "Lemma 1",
        "the loss is β(r, r̄, ε)-smooth on S(r), and the weights leave every S(r)",
        (
            evidence.is_linear(),
            evidence.is_exact_l2(),
            evidence.within_margin(),
            evidence.is_logistic(),
            evidence.takes_steps(),
            evidence.has_path(),
        ),
        "largest ‖∇²L̃‖₂ / β* at sampled points; growth of max_k ‖W_k‖_F over the run",
        "at most 1; the norm grows",
        "none: an upper bound (power iteration only underestimates)",
    )
    if claim.inapplicable:
        return claim.inapplicable
    found = [_hessian_norm(evidence, layers) for layers in _samples(evidence)]
    norms = [norm for norm in found if math.isfinite(norm)]
    if not norms:
        return claim.judge(None, "the Hessian overflows float64", "stop the training earlier")
    ratio = max(norms) / evidence.smoothness_of_path
    depth = len(evidence.points[0].layers)
    printed = printed_smoothness(depth, evidence.radius, evidence.floor, evidence.eps)
    largest = [float(p.alignment.frobenius.max()) for p in evidence.points]
    text = (
        f"{ratio:.3g} of β* = {evidence.smoothness_of_path:.4g} over {len(norms)} points "
        f"(printed: {printed:.3g}); max ‖W_k‖_F {largest[0]:.4g} → {largest[-1]:.4g}"
    )
    if ratio > 1:
        return claim.judge(False, text)
    if largest[-1] <= largest[0]:
        return claim.judge(None, text, "the norms have not grown yet: train longer")
    return claim.judge(True, text)


def _samples(evidence: Evidence) -> Iterator[tuple[Tensor, ...]]:
    """Points of the path and random points of S(r)."""
    points = evidence.points
    for index in sorted({round(i * (len(points) - 1) / 7) for i in range(8)}):
        yield points[index].layers
    generator = torch.Generator().manual_seed(0)
    shapes = [w.shape for w in points[0].layers]
    for number in range(_SAMPLES):
        layers = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        if number % 2:
            layers = [torch.outer(w[:, 0], w[0]) for w in layers]
        layers = [evidence.radius * w / torch.linalg.matrix_norm(w) for w in layers]
        product = layers[0]
        for w in layers[1:]:
            product = w @ product
        size = float(torch.linalg.vector_norm(product))
        if size >= evidence.floor:
            # Half of them at the floor of ‖W_Π‖, where the ε-term of the constant is largest.
            if number % 4 >= 2:
                layers[-1] = layers[-1] * (evidence.floor / size)
            yield tuple(layers)


def _hessian_norm(evidence: Evidence, layers: tuple[Tensor, ...]) -> float:
    """``‖∇²L̃(W)‖₂``, exact for small networks, else by 60 steps of power iteration.

    Not finite where the Hessian overflows.
    """
    x = torch.from_numpy(evidence.rows)
    y = torch.from_numpy(evidence.labels)
    shapes = [w.shape for w in layers]
    sizes = [w.numel() for w in layers]

    def loss(flat: Tensor) -> Tensor:
        parts = [v.reshape(s) for v, s in zip(torch.split(flat, sizes), shapes, strict=True)]
        product = parts[0]
        for w in parts[1:]:
            product = w @ product
        return adversarial_loss(product.reshape(-1), x, y, evidence.eps)

    flat = torch.cat([w.reshape(-1) for w in layers])
    if len(flat) <= _DENSE:
        matrix = _hessian_times(loss, flat, torch.eye(len(flat)).to(flat))
        if not bool(torch.isfinite(matrix).all()):
            return math.nan
        return float(torch.linalg.eigvalsh(matrix).abs().max())
    return _power_iteration(loss, flat)


def _hessian_times(loss: Callable[[Tensor], Tensor], flat: Tensor, vectors: Tensor) -> Tensor:
    """``∇²L̃ v`` for each row v, by differentiating the gradient."""
    at = flat.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at, create_graph=True)
    (result,) = torch.autograd.grad(gradient, at, vectors, is_grads_batched=True)
    return result


def _power_iteration(loss: Callable[[Tensor], Tensor], flat: Tensor) -> float:
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(flat.shape, generator=generator, dtype=torch.float64)
    size = math.nan
    for _ in range(60):
        v = v / torch.linalg.vector_norm(v)
        v = _hessian_times(loss, flat, v.unsqueeze(0))[0]
        size = float(torch.linalg.vector_norm(v))
    return size
