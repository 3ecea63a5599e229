"""``certified_margins``: the method, the batches, the refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from marginflow._checks import choice, whole
from marginflow.attacks import Attack, FiniteSet
from marginflow.certified import _library
from marginflow.certified._lirpa import LirpaBounds, LirpaMethod
from marginflow.certified._norms import NormBounds
from marginflow.certified._result import METHODS, CertifiedMargins, Method
from marginflow.errors import DataError, InputError, ModelError
from marginflow.homogeneity import Homogeneity
from marginflow.losses import check_labels

_MEMORY = 2**28
_COPIES = 4  # of the largest matrix, in a pass
_MOST = 256

_Bound = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def certified_margins(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    method: Method = "auto",
    batch_size: int | None = None,
    homogeneity: Homogeneity | None = None,
) -> CertifiedMargins:
    """Lower bounds ``c_i ≤ min m_i(x_i + δ)`` over the attack's ball, for every example.

    The minimum is over all ``‖δ‖_p ≤ ε`` with x_i + δ in the attack's bounds (which only ``interval`` and
    ``crown`` in ℓ∞ make use of), whatever the attack itself would find. Computed in float64 on the
    CPU, for the network in evaluation mode; the bounds of rounding are taken off, so that c_i holds in
    exact arithmetic. The model and the random state stay as they are.

    Args:
        model: maps x to outputs (n,), (n, 1) or (n, C).
        x: examples, (n, …).
        y: labels, (n,): −1/+1 for one output, 0 … C − 1 for C outputs.
        attack: gives the norm p, the budget ε and the bounds.
        method: ``interval`` (bounds of every unit, one after the other) and ``crown`` (linear bounds, the
            tighter of the two for every example) by auto-LiRPA; ``norms`` (clean margin less ε times a
            product of layer norms) without it; ``auto``: the first of crown, interval, norms that is there
            and takes the model.
        batch_size: examples per pass; by default so many as need about 256 MiB.
        homogeneity: the measured layers, for normalised bounds.

    Raises:
        MissingDependencyError: ``crown`` or ``interval`` without auto-LiRPA.
        ModelError: a network that the method cannot bound, with the module or operation.
        InputError: no attack, or a finite set, which has no ball.
        DataError: labels, shapes or bounds that do not fit, no examples.
    """
    choice("method", method, METHODS)
    check_attack(attack)
    if x.ndim == 0 or x.shape[0] == 0:
        raise DataError("expected at least one example, got none")
    if y.shape != x.shape[:1]:
        raise DataError(
            f"expected as many labels as examples, got {tuple(y.shape)} for {tuple(x.shape)}"
        )
    if batch_size is not None:
        whole("batch_size", batch_size, least=1)
    x, y = x.detach().to("cpu", torch.float64), y.detach().cpu()
    attack.check_bounds(x)
    network = _exact(model)
    with torch.no_grad():
        outputs = network(x[:2])
        check_labels(outputs.new_empty(len(x), *outputs.shape[1:]), y)
    rho = None if homogeneity is None else homogeneity.norm_product(model)
    if method != "auto":
        found = _bounds(network, x, y, attack, method, batch_size)
        return CertifiedMargins(*found, method, "", attack.p, attack.eps, rho)
    missing = f"auto-LiRPA is not installed: {_library.INSTALL}"
    methods: tuple[Method, ...] = ("crown", "interval", "norms")
    reasons = []
    if not _library.is_installed():
        methods, reasons = ("norms",), [missing]
    for tried in methods:
        try:
            found = _bounds(network, x, y, attack, tried, batch_size)
        except ModelError as error:
            reasons.append(str(error))
            continue
        reason = "; ".join(dict.fromkeys(reasons)) or "auto-LiRPA takes this model"
        return CertifiedMargins(*found, tried, reason, attack.p, attack.eps, rho)
    raise ModelError("; ".join(dict.fromkeys(reasons)))


def check_attack(attack: Attack | None, method: Method = "auto") -> None:
    """Refuse what has no ball, and a method whose library is missing, before anything is computed.

    Raises:
        InputError: no attack, or a finite set.
        MissingDependencyError: ``crown`` or ``interval`` without auto-LiRPA.
    """
    if attack is None:
        raise InputError("bounds: expected an attack, whose norm and ε give the ball, got none")
    if not isinstance(attack, Attack):
        raise InputError(f"bounds: expected an attack, got {type(attack).__name__}")
    if isinstance(attack, FiniteSet):
        raise InputError(
            "bounds: a finite set of perturbations has no ball; its attacked margins are exact already"
        )
    if method in ("crown", "interval"):
        _library.load()


def _bounds(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    method: Method,
    batch_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """c_i, its rounding and that of a plain evaluation, by one method."""
    if method == "norms":
        size = batch_size or 4 * _MOST
        bound: _Bound = NormBounds(network, attack.p, attack.eps)
    else:
        kind: LirpaMethod = "crown" if method == "crown" else "interval"
        size = min(len(x), batch_size or _MOST)

        def make(count: int) -> LirpaBounds:
            return LirpaBounds(network, x[:count], attack.p, attack.eps, attack.bounds, kind)

        bound = make(1)
        size = size if batch_size else min(size, _fitting(bound.counts.sizes))
        bound = make(size)
    with torch.no_grad():
        starts = range(0, len(x), size)
        parts = [bound(x[k : k + size], y[k : k + size]) for k in starts]
    values, rounding, evaluation = (torch.cat(column) for column in zip(*parts, strict=True))
    return values, rounding, evaluation


def _fitting(sizes: list[int]) -> int:
    """How many examples fit in memory.

    The bounds of a layer's units are carried back through all layers below it: a matrix of its units times
    their widest, for each example. The first layer's are bounded directly.
    """
    entries = max((sizes[k] * max(sizes[:k]) for k in range(2, len(sizes))), default=sizes[0])
    return max(1, min(_MOST, _MEMORY // (8 * _COPIES * entries)))


def _exact(model: nn.Module) -> nn.Module:
    """A copy in float64 and evaluation mode, on the CPU, with biases, without dropout."""
    network = copy.deepcopy(model).to("cpu", torch.float64).eval().requires_grad_(False)
    for module in list(network.modules()):
        if type(module).forward is nn.Linear.forward and module.bias is None:
            # The library reads a layer without bias as another operation, which it bounds less well.
            module.bias = nn.Parameter(
                torch.zeros(len(module.weight)).double(), requires_grad=False
            )
        for name, child in module.named_children():
            if type(child).forward is nn.Dropout.forward:
                setattr(module, name, nn.Identity())
    if any(math.isinf(float(p.abs().max())) for p in network.parameters() if p.numel()):
        raise ModelError("bounds: expected finite weights, got infinity")
    return network
