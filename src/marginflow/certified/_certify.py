"""``certified_margins``: the method, the batches, the refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from marginflow._checks import choice, instance, whole
from marginflow._finite import finite_examples, spoilt
from marginflow._memory import memory_watched
from marginflow.attacks import Attack, FiniteSet
from marginflow.certified import _library
from marginflow.certified._lirpa import LirpaBounds, LirpaMethod
from marginflow.certified._norms import NormBounds
from marginflow.certified._result import METHODS, CertifiedMargins, Method
from marginflow.distributed import current
from marginflow.errors import InputError, MissingDependencyError, ModelError
from marginflow.homogeneity import Homogeneity
from marginflow.losses import check_examples, check_labels

_MEMORY = 2**28
_COPIES = 4  # of the largest matrix, in a pass
_MOST = 256

_AFFORDABLE = 2**26  # entries

_Bounds = tuple[Tensor, Tensor, Tensor]
_Bound = Callable[[Tensor, Tensor], _Bounds]


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

    Source: interval bounds of Gowal et al. (2018), CROWN of Zhang et al. (2018), by auto-LiRPA of
    Xu et al. (2020).

    Args:
        model: maps x to outputs (n,), (n, 1) or (n, C).
        x: examples, (n, …).
        y: labels, (n,): −1/+1 for one output, 0 … C − 1 for C outputs.
        attack: gives the norm p, the budget ε and the bounds.
        method: ``interval`` (bounds of every unit, one after the other) and ``crown`` (linear bounds, the
            tighter of the two for every example) by auto-LiRPA; ``norms`` (clean margin less ε times a
            product of layer norms) without it; ``auto``: crown where it is there, takes the model and is
            affordable, else the higher of the other two.
        batch_size: examples per pass; by default so many as need about 256 MiB, at least one:
            CROWN on a convolutional network can take gigabytes for one.
        homogeneity: the measured layers, for normalised bounds.

    Raises:
        MissingDependencyError: ``crown`` or ``interval`` without auto-LiRPA.
        ModelError: a network that the method cannot bound, with the module or operation.
        InputError: no attack, or a finite set, which has no ball.
        DataError: labels, shapes or bounds that do not fit, no examples, NaN or infinity in x.
        OutOfMemoryError: with the batch size to try.

    Examples:
        >>> import marginflow as mf
        >>> data = mf.load("separable:n=20,d=6,margin=0.3")
        >>> model = mf.models.mlp(6, 8, 1, seed=0)
        >>> attack = mf.attacks.PGD("l2", eps=0.1, steps=5)
        >>> bounds = mf.certified_margins(model, data.x, data.y, attack, method="norms")
        >>> found = mf.adversarial_margins(model.double(), data.x, data.y, attack)
        >>> bool((bounds.values <= found.values).all())
        True
    """
    choice("method", method, METHODS)
    check_attack(attack)
    instance("model", model, nn.Module, "a torch.nn.Module")
    check_examples(x, y)
    if batch_size is not None:
        whole("batch_size", batch_size, least=1)
    x, y = x.detach().to("cpu", torch.float64), y.detach().cpu()
    finite_examples("x", x)
    attack.check_bounds(x)
    network = _exact(model)
    with torch.no_grad():
        outputs = network(x[:2])
        check_labels(outputs.new_empty(len(x), *outputs.shape[1:]), y)
    rho = None if homogeneity is None else homogeneity.norm_product(model)
    if method == "auto":
        name, reason, found = _best(network, x, y, attack, batch_size)
    else:
        name, reason, found = method, "", _bounds(network, x, y, attack, method, batch_size)
    return CertifiedMargins(*found, name, reason, attack.p, attack.eps, rho)


def _best(
    network: nn.Module, x: Tensor, y: Tensor, attack: Attack, batch_size: int | None
) -> tuple[str, str, _Bounds]:
    """CROWN where it is there, takes the network and is affordable; else the higher of the others."""
    reasons = []
    found: dict[str, _Bounds] = {}
    methods: tuple[Method, ...] = ("crown", "interval", "norms")
    if not _library.is_installed():
        methods, reasons = ("norms",), [f"auto-LiRPA is not installed: {_library.INSTALL}"]
    for method in methods:
        try:
            found[method] = _bounds(network, x, y, attack, method, batch_size, _AFFORDABLE)
        except (ModelError, MissingDependencyError) as error:
            reasons.append(str(error))
        if "crown" in found:
            return "crown", "auto-LiRPA takes this model", found["crown"]
    if not found:
        raise ModelError("; ".join(dict.fromkeys(reasons)))
    name = max(found, key=lambda method: float(found[method][0].median()))
    if len(found) > 1:
        reasons.append("of intervals and norms these bounds are the higher ones")
    return name, "; ".join(dict.fromkeys(reasons)), found[name]


def check_attack(attack: Attack | None, method: Method = "auto") -> None:
    """Refuse what has no ball, and a method whose library is missing, before anything is computed.

    Source: marginflow.

    Args:
        attack: it must have a ball.
        method: whose library must be there.

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
    most: int | None = None,
) -> _Bounds:
    """c_i, its rounding and that of a plain evaluation, by one method.

    Raises:
        ModelError: also where CROWN needs a matrix of over ``most`` entries for an example.
    """
    if method == "norms":
        size = batch_size or 4 * _MOST
        bound: _Bound = NormBounds(network, attack.p, attack.eps)
    else:
        kind: LirpaMethod = "crown" if method == "crown" else "interval"
        size = min(len(x), batch_size or _MOST)

        def make(count: int) -> LirpaBounds:
            return LirpaBounds(network, x[:count], attack.p, attack.eps, attack.bounds, kind)

        bound = make(1)
        entries = _entries(bound.counts.sizes)
        if most is not None and kind == "crown" and entries > most:
            raise ModelError(
                f"CROWN would take about {entries * 8 * _COPIES / 2**30:.0f} GiB an example if nothing "
                "in it were sparse; ask for it by name: crown"
            )
        size = size if batch_size else max(1, min(size, _MEMORY // (8 * _COPIES * entries)))
        bound = make(size)

    def of(x: Tensor, y: Tensor) -> _Bounds:
        with (
            torch.no_grad(),
            memory_watched(
                f"bounding margins ({method})", min(size, len(x)), advice="use the method 'norms'"
            ),
        ):
            # One place for all results: small ones kept between the passes would keep the heap apart.
            found = x.new_empty(3, len(x))
            for start in range(0, len(x), size):
                part = slice(start, start + size)
                for row, column in zip(found, bound(x[part], y[part]), strict=True):
                    row[part] = column
        values, rounding, evaluation = found
        return values, rounding, evaluation

    team = current()
    if team is None:
        return of(x, y)
    rows = team.rows(len(x))
    own = team.together(lambda: of(x[rows], y[rows]))
    values, rounding, evaluation = (team.gather(column, len(x)) for column in own)
    return values, rounding, evaluation


def _entries(sizes: list[int]) -> int:
    """Of the largest matrix that CROWN keeps for an example.

    The bounds of a layer's units are carried back through all layers below it: a matrix of its units times
    their widest. The first layer's are bounded directly.
    """
    return max((sizes[k] * max(sizes[:k]) for k in range(2, len(sizes))), default=sizes[0])


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
    broken = spoilt(network)
    if broken is not None:
        raise ModelError(f"bounds: expected finite weights, got NaN or infinity in {broken!r}")
    return network
