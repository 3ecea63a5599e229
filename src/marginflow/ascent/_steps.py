"""One update of the weights, as functions: on the product of spheres, and relative to the norm.

Both need only the direction of the gradient, so that of L serves as well as that of ln L; that of
ln L does not underflow where L does. Length and direction are formed after scaling by powers of
two: gradients from 1e-40 to 1e30 give the same step, in float32 too.

Steps of a length that does not depend on the gradient's: Nacson et al. 2019 (normalised gradient
descent); the spheres: Lyu & Li 2020, whose normalised margin depends on the layers' directions alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from marginflow.errors import InputError, ModelError

# Floats a dot product takes at a time: two blocks stay in a core's cache, so that several
# products read the memory once, and sums of blocks, in float64, lose fewer digits.
_BLOCK = 2**17
# Squares and products of the numbers of a layer stay within these: no part of the sum is lost.
_RANGE = {torch.float32: (1e-20, 1e30), torch.float64: (1e-200, 1e250)}
# A layer further than this from the norm it is to keep was changed by somebody else.
_FOREIGN = 1e-3


@torch.no_grad()
def sphere_step(
    layers: Sequence[Sequence[Tensor]],
    gradients: Sequence[Sequence[Tensor]],
    velocities: Sequence[Sequence[Tensor]],
    *,
    angle: float | Sequence[float],
    momentum: float | Sequence[float],
    norms: list[float] | None = None,
    names: Sequence[str] | None = None,
) -> float:
    """One step of normalised descent with momentum on the product of the layers' spheres.

    With ``r_k = ‖W_k‖_F``, ``Ŵ_k = W_k/r_k`` and the gradient in sphere coordinates ``r_k G_k``::

        T_k = r_k (G_k − ⟨G_k, Ŵ_k⟩ Ŵ_k),   t = sqrt(Σ_k ‖T_k‖²)
        v_k ← μ v_k + T_k/t,                 v_k ← v_k − ⟨v_k, Ŵ_k⟩ Ŵ_k
        W_k ← r_k (Ŵ_k − angle·v_k)/‖Ŵ_k − angle·v_k‖

    The step depends neither on the size of the gradient nor on the layers' norms, which are kept.
    Where the gradient is radial to rounding (t ≤ 2ϵ·sqrt(Σ r_k²‖G_k‖²), ϵ of the dtype) there is no
    direction to take: T/t counts as 0, and the step goes on with ``μ v``.

    Args:
        layers: W_1 … W_L, each the tensors that scale together, of any shape; updated in place.
            float32 or float64.
        gradients: G_1 … G_L, of the same shapes; left as they are.
        velocities: v_1 … v_L, of the same shapes, zeros before the first step; updated in place.
        angle: length of the step without momentum, in radians of the product of spheres; one for all
            layers or one for each.
        momentum: μ in [0, 1), likewise.
        norms: the r_k = ‖W_k‖ to keep against the drift of rounding, updated in place: an entry off
            by more than 1e-3 (such as 0 before the first step) becomes the layer's norm. None keeps
            what each layer has now.
        names: the layers' names, for messages.

    Returns:
        t, the length of the tangential gradient.

    Raises:
        ModelError: a layer is 0: it has no direction.
        InputError: a weight, gradient or velocity is NaN or infinite, or the shapes do not fit.
            Nothing is changed then.
    """
    if not len(layers) == len(gradients) == len(velocities):
        raise InputError(
            "expected as many gradients and velocities as layers, "
            f"got {len(layers)}, {len(gradients)} and {len(velocities)}"
        )
    views = [
        _Layer.measure(_name(names, k), *parts)
        for k, parts in enumerate(zip(layers, gradients, velocities, strict=True))
    ]
    if not views:
        return 0.0
    # All lengths relative to the largest power of two in them.
    top = max(view.shift for view in views)
    squares = [math.ldexp(view.tangential, 2 * (view.shift - top)) for view in views]
    whole = [math.ldexp(view.ww * view.gg, 2 * (view.shift - top)) for view in views]
    epsilon = max(torch.finfo(view.weights[0].dtype).eps for view in views)
    total = math.sqrt(sum(squares))
    still = total <= 2 * epsilon * math.sqrt(sum(whole))
    angles, momenta = _each(angle, views), _each(momentum, views)
    for k, view in enumerate(views):
        scale = 0.0 if still else math.ldexp(view.norm / total, view.shift - top)
        true_norm = math.ldexp(view.norm, view.weight_shift)
        keep = true_norm if norms is None else norms[k]
        if abs(keep - true_norm) > _FOREIGN * true_norm:
            keep = true_norm
        if norms is not None:
            norms[k] = keep
        view.turn(scale, angles[k] * true_norm, momenta[k], keep)
    try:
        return 0.0 if still else math.ldexp(total, top)
    except OverflowError:
        return math.inf


@dataclass
class RunningSize:
    """A running estimate of ``‖∇L_B‖`` over the batches B, which says how much one batch counts.

    The gradient of the whole loss is ``Σ_B ∇L_B``, so a step along a batch's gradient alone has to be
    ``‖∇L_B‖/n̄`` times the usual length, n̄ the mean of ``‖∇L_B‖ = e^{ln L_B}·‖∇ln L_B‖``: a batch whose
    loss is e^2 times that of the others counts e^2 times as much. Batches with weight 1 each end in a
    direction that is not the max-margin one. All is kept in the log domain.

    As the weights grow, all losses fall at a rate that one batch tells: ``W ← (1 + δ)W`` adds
    ``δ⟨∇ln L_B, W⟩`` to ln L_B. The estimate is carried along by that; a mean of past sizes alone lags
    behind by more the larger the margins, and the steps become too short.

    Attributes:
        beta: memory of the mean in [0, 1); about the last 1/(1 − β) batches count.
        cap: the weight of a batch is at most this factor, so that one batch cannot throw the
            network out.
        log_mean: ln n̄; None before the first batch, whose weight is 1.
    """

    beta: float = 0.95
    cap: float = 4.0
    log_mean: float | None = None

    def weigh(self, log_size: float) -> float:
        """Take in a batch with ``ln‖∇L_B‖``; its weight ``min(cap, ‖∇L_B‖/n̄)``, itself in the mean.

        Args:
            log_size: ``ln‖∇L_B‖``.
        """
        if self.log_mean is None or self.beta == 0:
            self.log_mean = log_size
        else:
            old, new = self.log_mean + math.log(self.beta), log_size + math.log1p(-self.beta)
            self.log_mean = max(old, new) + math.log1p(math.exp(-abs(old - new)))
        return math.exp(min(log_size - self.log_mean, math.log(self.cap)))

    def carry(self, change: float) -> None:
        """Add to ln n̄ what the growth of the weights adds to every ln L_B.

        Args:
            change: by how much ln n̄ changes.
        """
        if self.log_mean is not None and math.isfinite(change):
            self.log_mean += change


@torch.no_grad()
def relative_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    step: float | Sequence[float],
    weight: float = 1.0,
    running: RunningSize | None = None,
    log_loss: float = 0.0,
    of_log: bool = True,
) -> float:
    """``W ← W − step·weight·‖W‖·G/‖G‖`` over all weights jointly, ``‖W‖ = sqrt(Σ‖W_k‖²)``.

    Args:
        weights: W_1 … W_L, of any shape, updated in place. float32 or float64.
        gradients: G_1 … G_L, of the same shapes, of L or of ln L; left as they are. Where all are
            0, W stays.
        step: η, the length of the step relative to the norm; one for all or one for each.
        weight: a factor.
        running: for mini-batches: gives a further factor, and is brought up to date.
        log_loss: ``ln L_B`` of the batch before the step; read with ``running`` only.
        of_log: whether G is ∇ln L_B, or else ∇L_B; read with ``running`` only.

    Returns:
        the length taken, relative to step: ``weight`` times the batch's weight; 0 where G is 0.

    Raises:
        ModelError: the weights are 0: a step relative to them stays there.
        InputError: a weight, a gradient or the loss is NaN or infinite, or the shapes do not
            fit. Nothing is changed then.
    """
    _same_shapes("the weights", weights, gradients)
    if not weights:
        return 0.0
    scaled, w_shift, ww = _sized(weights, "weight", "the weights")
    g, g_shift, gg = _sized(gradients, "gradient", "the weights")
    if ww == 0:
        raise ModelError("the weights are 0, and a step relative to their norm stays there")
    if not math.isfinite(log_loss):
        raise InputError(f"expected the finite ln of a loss above 0, got {log_loss}")
    if gg == 0:
        return 0.0
    steps = _each(step, weights)
    factor = weight
    if running is not None:
        log_size = 0.5 * math.log(gg) + g_shift * math.log(2.0)
        factor *= running.weigh(log_size + (log_loss if of_log else 0.0))
        # The step's part along W, relative to W, times ⟨∇ln L_B, W⟩.
        inner = [_inner(x, y) for x, y in zip(g, scaled, strict=True)]
        cosines = [h * x / math.sqrt(ww * gg) for h, x in zip(steps, inner, strict=True)]
        shift = (g_shift + w_shift) * math.log(2.0) - (0.0 if of_log else log_loss)
        slope = sum(inner) * math.exp(min(shift, 700.0))
        running.carry(-factor * sum(cosines) * slope)
    # W' = W − length·2^w_shift·G', with W' and G' in range.
    length = factor * math.sqrt(ww / gg)
    for h, target, gradient in zip(steps, weights, g, strict=True):
        if w_shift == 0:
            target.sub_(gradient, alpha=h * length)
        else:
            target.sub_(_scaled(gradient.double() * (h * length), w_shift).to(target.dtype))
    return factor


@torch.no_grad()
def unit(gradients: Sequence[Tensor]) -> list[Tensor]:
    """``G/‖G‖``, jointly over all tensors; zeros where G is 0.

    Raises:
        InputError: a gradient is NaN or infinite.
    """
    if not gradients:
        return []
    scaled, _, square = _sized(gradients, "gradient", "the free parameters")
    return [g / math.sqrt(square) if square else torch.zeros_like(g) for g in scaled]


@dataclass
class _Layer:
    """The tensors of one layer and their inner products, all of them scaled by powers of two.

    Gradient and weights as measured are ``2^−gradient_shift G`` and ``2^−weight_shift W``.
    """

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    velocities: Sequence[Tensor]
    weight_shift: int
    gradient_shift: int
    ww: float
    wg: float
    gg: float
    wv: float
    tangential: float
    """``‖T‖²`` of the scaled tensors."""

    @property
    def norm(self) -> float:
        return math.sqrt(self.ww)

    @property
    def shift(self) -> int:
        """T of the layer is ``2^shift`` times that of the scaled tensors."""
        return self.weight_shift + self.gradient_shift

    @classmethod
    def measure(
        cls,
        name: str,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        velocities: Sequence[Tensor],
    ) -> _Layer:
        _same_shapes(name, weights, gradients)
        _same_shapes(name, weights, velocities)
        if not weights:
            raise InputError(f"{name}: expected at least one tensor in a layer, got none")
        ww, wg, gg, wv = _products(weights, gradients, velocities)
        low, high = _RANGE[weights[0].dtype]
        scaled, g, w_shift, g_shift = weights, gradients, 0, 0
        if not (low < ww < high and low < gg < high and abs(wg) < high and abs(wv) < high):
            scaled, w_shift, ww = _sized(weights, "weight", name)
            if ww == 0:
                raise ModelError(
                    f"{name} is 0 and has no direction: initialise it anew, or keep it off the "
                    "spheres (free=True)"
                )
            g, g_shift, gg = _sized(gradients, "gradient", name)
            ww, wg, gg, wv = _products(scaled, g, velocities)
            if not math.isfinite(wv):
                raise InputError(f"the velocity of {name} is not finite; nothing was changed")
        tangential = max(gg - wg * wg / ww, 0.0)
        # A difference of nearly equal numbers: where the gradient is nearly radial, form T itself.
        if tangential < 32 * math.sqrt(torch.finfo(weights[0].dtype).eps) * gg:
            tangent = [x.double() - y.double() * (wg / ww) for x, y in zip(g, scaled, strict=True)]
            radial = sum(float((t * y).sum()) for t, y in zip(tangent, scaled, strict=True)) / ww
            tangential = sum(
                float((t - radial * y).square().sum()) for t, y in zip(tangent, scaled, strict=True)
            )
        return cls(weights, g, velocities, w_shift, g_shift, ww, wg, gg, wv, ww * tangential)

    def turn(self, scale: float, length: float, momentum: float, norm: float) -> None:
        """``v ← P(μv + scale·G), W ← W − length·v``, then to ``norm``; P projects along W."""
        gradients, wg = self.gradients, self.wg
        # The kernel below takes 1 − scale for scale. Without a loss that is exact for numbers of
        # 40 bits in this range; others go into the gradient, as a power of two.
        if scale and not 2.0**-12 <= scale <= 2.0**50:
            exponent = math.frexp(scale)[1]
            gradients = [_scaled(g, exponent) for g in gradients]
            wg = math.ldexp(wg, exponent)
            scale = math.ldexp(scale, -exponent)
        mantissa, exponent = math.frexp(scale)
        scale = math.ldexp(round(mantissa * 2**40), exponent - 40)
        radial = math.ldexp((momentum * self.wv + scale * wg) / self.ww, -self.weight_shift)
        for w, g, v in zip(self.weights, gradients, self.velocities, strict=True):
            if scale == 0:
                v.mul_(momentum).sub_(w, alpha=radial)
                w.sub_(v, alpha=length)
                continue
            # μv + scale·(G − (radial/scale)·W), then W − length·v: torch's fused SGD does both in
            # one pass over the memory, which is what limits the step.
            if momentum == 0:
                v.zero_()  # without momentum it would leave v, and scale, out
            kept = [t.contiguous() for t in (w, g, v)]
            sgd(
                [kept[0]],
                [kept[1]],
                [kept[2]],
                fused=True,
                lr=length,
                momentum=momentum or 1.0,
                dampening=1.0 - scale,
                weight_decay=-radial / scale,
                nesterov=False,
                maximize=False,
            )
            if kept[0] is not w:
                w.copy_(kept[0])
            if kept[2] is not v:
                v.copy_(kept[2])
        scaled = [_scaled(w, -self.weight_shift) if self.weight_shift else w for w in self.weights]
        now = math.ldexp(math.sqrt(_products(scaled)[0]), self.weight_shift)
        for w in self.weights:
            w.mul_(norm / now)


def _products(
    weights: Sequence[Tensor], *others: Sequence[Tensor]
) -> tuple[float, float, float, float]:
    """``⟨W,W⟩`` and, with gradient and velocity, ``⟨W,G⟩, ⟨G,G⟩, ⟨W,v⟩``; zeros without."""
    rows: list[Tensor] = []
    for tensors in zip(weights, *others, strict=True):
        for blocks in zip(*(t.detach().reshape(-1).split(_BLOCK) for t in tensors), strict=True):
            w = blocks[0]
            rows.append(torch.dot(w, w))
            if others:
                g, v = blocks[1:]
                rows += [torch.dot(w, g), torch.dot(g, g), torch.dot(w, v)]
    numbers: list[float] = torch.stack(rows).tolist()
    if not others:
        return math.fsum(numbers), 0.0, 0.0, 0.0
    ww, wg, gg, wv = (sum(numbers[i::4]) for i in range(4))
    return ww, wg, gg, wv


def _sized(tensors: Sequence[Tensor], kind: str, name: str) -> tuple[Sequence[Tensor], int, float]:
    """The tensors times ``2^−shift`` with squares in range, shift, and the sum of the squares.

    Raises:
        InputError: NaN or infinity.
    """
    low, high = _RANGE[tensors[0].dtype]
    square = _products(tensors)[0]
    if low < square < high:
        return tensors, 0, square
    largest = max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)
    if not all(math.isfinite(float(t.abs().max())) for t in tensors if t.numel()):
        raise InputError(f"a {kind} of {name} is not finite; nothing was changed: check the loss")
    if largest == 0:
        return tensors, 0, 0.0
    shift = math.frexp(largest)[1]
    scaled = [_scaled(t, -shift) for t in tensors]
    return scaled, shift, _products(scaled)[0]


def _scaled(tensor: Tensor, exponent: int) -> Tensor:
    """``2^exponent`` times the tensor, exact but for what underflows."""
    half = exponent // 2  # 2^exponent alone may lie outside the dtype's range
    return (tensor.double() * 2.0**half * 2.0 ** (exponent - half)).to(tensor.dtype)


def _same_shapes(name: str, weights: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    shapes = [tuple(t.shape) for t in weights]
    if shapes != [tuple(t.shape) for t in others]:
        raise InputError(
            f"{name}: expected tensors of shapes {shapes}, got {[tuple(t.shape) for t in others]}"
        )
    for tensor in weights:
        if tensor.dtype not in _RANGE:
            raise InputError(f"{name}: expected float32 or float64 weights, got {tensor.dtype}")


def _inner(one: Tensor, other: Tensor) -> float:
    """``⟨A, B⟩``, the blocks summed in float64."""
    flat = (one.detach().reshape(-1), other.detach().reshape(-1))
    pairs = zip(*(torch.split(t, _BLOCK) for t in flat), strict=True)
    numbers: list[float] = torch.stack([torch.dot(a, b) for a, b in pairs]).tolist()
    return math.fsum(numbers)


def _each(value: float | Sequence[float], items: Sequence[object]) -> Sequence[float]:
    """One number for each item."""
    return [value] * len(items) if isinstance(value, int | float) else value


def _name(names: Sequence[str] | None, index: int) -> str:
    return f"layer {index + 1}" if names is None else f"layer {names[index]!r}"
