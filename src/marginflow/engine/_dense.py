"""Dense homogeneous networks by explicit products: forward, backward, update, in kept buffers.

Source: marginflow; the gradient of Algorithm 1 for the networks of Eq. (2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from marginflow.models import SquaredReLU

_ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky-relu", SquaredReLU: "squared-relu"}
_ROWS = 8192
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True, eq=False)
class Activation:
    """An activation of a hidden layer: its name and, for ``leaky-relu``, the slope below 0."""

    name: str
    slope: float = 0.0


_IDENTITY = Activation("identity")


@dataclass(frozen=True, eq=False)
class _Buffers:
    """What one batch size needs: activations h_k, ∂/∂(pre-activation) d_k, ∂/∂x."""

    hidden: list[Tensor]
    rectified: dict[int, Tensor]
    slopes: list[Tensor]
    input_slope: Tensor
    spare: dict[str, Tensor] = field(default_factory=dict)


class DenseNetwork:
    """``f(x) = W_L σ(W_{L−1} … σ(W_1 x))`` with the products written out.

    Examples are **columns**: (D, n), see :meth:`columns`. With a small batch on the right
    the library multiplies up to a fifth faster than with it on the left (``x W^T``).

    Every product goes into a buffer that is used again for the next batch of the same size, so
    what a method returns is valid until the next call. Nothing here is differentiable.

    Networks of one shape may be stacked (:meth:`stacked`): then every tensor has an axis for the
    network in front, columns are (S, D, n), and one batched product does the work of S.

    Args:
        weights: W_k, each (fan-out, fan-in), or (S, fan-out, fan-in).
        activations: σ after each layer but the last.
    """

    def __init__(self, weights: Sequence[Tensor], activations: Sequence[Activation]) -> None:
        self.weights = tuple(weights)
        self.activations = tuple(activations)
        self._product = torch.mm if self.weights[0].ndim == 2 else torch.bmm
        self._buffers: dict[int, _Buffers] = {}

    @classmethod
    def of(cls, model: nn.Module, shape: Sequence[int]) -> DenseNetwork | None:
        """The dense network that ``model`` is, sharing its weights; None if it is not one.

        One is: linear layers without biases and with weights of their own, and ReLU, leaky or
        squared ReLU between them, in ``nn.Sequential`` without hooks, on examples that are
        flat or flattened first.

        Args:
            model: any module.
            shape: the shape of an example.
        """
        leaves = _sequence(model)
        if leaves is None:
            return None
        flat = len(shape) == 1
        weights: list[Tensor] = []
        activations: list[Activation] = []
        pending = _IDENTITY
        for module in leaves:
            if type(module) is nn.Flatten:
                if (module.start_dim, module.end_dim) != (1, -1):
                    return None
                flat = True
            elif type(module) is nn.Linear:
                if module.bias is not None or not flat:
                    return None
                if weights:
                    activations.append(pending)
                weights.append(module.weight)
                pending = _IDENTITY
            elif type(module) in _ACTIVATIONS and weights and pending is _IDENTITY:
                slope = module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.0
                pending = Activation(_ACTIVATIONS[type(module)], slope)
            elif type(module) is not nn.Identity:
                return None
        own = {id(w) for w in weights}
        if (
            not weights
            or pending is not _IDENTITY
            or len(own) < len(weights)
            or own != {id(p) for p in model.parameters()}
            or not all(w.is_floating_point() for w in weights)
            or any(a.slope < 0 for a in activations)
            or any(w.shape[0] != v.shape[1] for w, v in pairwise(weights))
        ):
            return None
        return cls(weights, activations)

    @property
    def classes(self) -> int:
        """C, the number of outputs."""
        return self.weights[-1].shape[-2]

    @classmethod
    def stacked(cls, networks: Sequence[DenseNetwork]) -> DenseNetwork:
        """Networks of one shape as one: their weights become views of its own.

        Args:
            networks: made by :meth:`of`, of equal shapes and activations.
        """
        stacks = []
        for same in zip(*(network.weights for network in networks), strict=True):
            stack = torch.stack([w.detach() for w in same])
            for w, own in zip(same, stack.unbind(), strict=True):
                w.data = own
            stacks.append(stack)
        return cls(stacks, networks[0].activations)

    def release(self) -> None:
        """Give weights that are views of a stack memory of their own again."""
        for w in self.weights:
            w.data = w.detach().clone()

    def in_precision(self, dtype: torch.dtype) -> DenseNetwork:
        """A copy of the weights in another precision, kept up to date by :meth:`follow`.

        Args:
            dtype: of the copy.
        """
        return DenseNetwork(
            [w.detach().to(dtype, copy=True) for w in self.weights], self.activations
        )

    def follow(self, other: DenseNetwork) -> None:
        """Take over the weights of ``other``, rounded to this network's precision.

        Args:
            other: of the same shapes.
        """
        with torch.no_grad():
            for mine, its in zip(self.weights, other.weights, strict=True):
                mine.copy_(its)

    @torch.no_grad()
    def columns(self, x: Tensor) -> Tensor:
        """Examples (n, …) as columns (D, n), in a buffer; (S, n, …) or (S · n, …) of a stack.

        Args:
            x: examples, (n, …), or (S, n, …).
        """
        rows = self.rows(x)
        kept = self._of_size(rows.shape[-2]).spare
        if "columns" not in kept or kept["columns"].dtype != x.dtype:
            kept["columns"] = x.new_empty(rows.mT.shape)
        return kept["columns"].copy_(rows.mT)

    def rows(self, x: Tensor) -> Tensor:
        """Examples (n, …) as (n, D); (S, n, …) or (S · n, …) of a stack as (S, n, D).

        Args:
            x: examples, (n, …), or (S, n, …).
        """
        first = self.weights[0].shape
        return x.reshape(*first[:-2], -1, first[-1])

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The outputs at x: (D, n) ↦ (C, n). What :meth:`backward` needs of the way is kept.

        Args:
            x: columns, (D, n).
        """
        buffers = self._of_size(x.shape[-1])
        h = x
        for k, weight in enumerate(self.weights):
            out = buffers.hidden[k]
            self._product(weight, h, out=out)
            if k < len(self.activations):
                _activate(self.activations[k], out, buffers.rectified.get(k))
            h = out
        return h

    def kept(self, x: Tensor) -> list[Tensor]:
        """What the last :meth:`forward` of x keeps of the hidden layers: h_k or its root, (fan-out, n).

        One tensor a hidden layer, (units, n).

        Args:
            x: the columns of that pass, (D, n).
        """
        buffers = self._of_size(x.shape[-1])
        return [buffers.rectified.get(k, h) for k, h in enumerate(buffers.hidden[:-1])]

    @torch.no_grad()
    def resumed(self, x: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """The outputs at x as by :meth:`forward`, from what this keeps; the last product alone is taken.

        Args:
            x: (D, n).
            kept: of all of x, put together from the :meth:`kept` of its parts, (units, n) each.

        Returns:
            the outputs, (C, n).
        """
        buffers = self._of_size(x.shape[-1])
        for k, values in enumerate(kept):
            if k in buffers.rectified:
                buffers.rectified[k].copy_(values)
                torch.mul(values, values, out=buffers.hidden[k])
            else:
                buffers.hidden[k].copy_(values)
        below = buffers.hidden[-2] if kept else x
        self._product(self.weights[-1], below, out=buffers.hidden[-1])
        return buffers.hidden[-1]

    @torch.no_grad()
    def backward(self, x: Tensor, seeds: Tensor) -> None:
        """``∂/∂(pre-activations)`` of Σ_i ⟨seeds_i, f(x_i)⟩, after :meth:`forward` of x; kept.

        Args:
            x: the batch of the last forward pass, (D, n).
            seeds: (C, n).
        """
        buffers = self._of_size(x.shape[-1])
        buffers.slopes[-1].copy_(seeds)
        for k in range(len(self.weights) - 1, 0, -1):
            below = buffers.slopes[k - 1]
            self._product(self.weights[k].mT, buffers.slopes[k], out=below)
            _differentiate(
                self.activations[k - 1], below, buffers.hidden[k - 1], buffers.rectified.get(k - 1)
            )

    @torch.no_grad()
    def input_gradient(self, x: Tensor) -> Tensor:
        """``∂/∂x`` of the last :meth:`backward`, (D, n).

        Args:
            x: the columns of that pass, (D, n).
        """
        buffers = self._of_size(x.shape[-1])
        return self._product(self.weights[0].mT, buffers.slopes[0], out=buffers.input_slope)

    @torch.no_grad()
    def gradients(self, x: Tensor) -> tuple[Tensor, ...]:
        """``∂/∂W_k`` of the last :meth:`backward`, each a new tensor of the shape of W_k.

        Args:
            x: the columns of that pass, (D, n).
        """
        return tuple(d @ h.mT for d, h in self._factors(x))

    @torch.no_grad()
    def gradient_norms(self, x: Tensor) -> Tensor:
        """``‖∂/∂W_k‖_F`` of each example alone, of the last :meth:`backward`, (n, L): ‖d_k‖‖h_{k−1}‖.

        Args:
            x: the columns of that pass, (D, n).
        """
        factors = self._factors(x)
        return torch.stack([d.norm(dim=0) * h.norm(dim=0) for d, h in factors], dim=1)

    @torch.no_grad()
    def descend(self, x: Tensor, rate: float) -> None:
        """``W_k ← W_k − rate ∂/∂W_k`` of the last :meth:`backward`, without forming the gradient.

        Args:
            x: the columns of that pass, (D, n).
            rate: η > 0.
        """
        for weight, (d, h) in zip(self.weights, self._factors(x), strict=True):
            if weight.ndim == 2:
                weight.addmm_(d, h.mT, alpha=-rate)
            else:
                weight.baddbmm_(d, h.mT, alpha=-rate)

    def spare(self, x: Tensor, name: str) -> Tensor:
        """A buffer of the shape (D, n) and type of x under a name of the caller's.

        Args:
            x: columns, (D, n).
            name: of the buffer.
        """
        kept = self._of_size(x.shape[-1]).spare
        if name not in kept or kept[name].dtype != x.dtype:
            kept[name] = torch.empty_like(x)
        return kept[name]

    def _factors(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        buffers = self._of_size(x.shape[-1])
        return list(zip(buffers.slopes, [x, *buffers.hidden[:-1]], strict=True))

    def _of_size(self, n: int) -> _Buffers:
        found = self._buffers.get(n)
        like = self.weights[0]
        if found is not None and (found.input_slope.dtype, found.input_slope.device) == (
            like.dtype,
            like.device,
        ):
            return found
        # A batch, the last of an epoch, a chunk; or the batches of a training that leaves examples out,
        # which are small and of many sizes. More are passing by.
        if len(self._buffers) > 3 and sum(self._buffers) + n > _ROWS:
            self._buffers.clear()
        hidden = [like.new_empty(*w.shape[:-1], n) for w in self.weights]
        found = _Buffers(
            hidden,
            {
                k: torch.empty_like(hidden[k])
                for k, a in enumerate(self.activations)
                if a.name == "squared-relu"
            },
            [torch.empty_like(h) for h in hidden],
            like.new_empty(*like.shape[:-2], like.shape[-1], n),
        )
        self._buffers[n] = found
        return found


def _activate(activation: Activation, u: Tensor, rectified: Tensor | None) -> None:
    """σ(u) in place; max(u, 0) is kept where σ′ needs it."""
    if activation.name == "relu":
        u.relu_()
    elif activation.name == "leaky-relu":
        nn.functional.leaky_relu_(u, activation.slope)
    elif rectified is not None:
        torch.clamp(u, min=0, out=rectified)
        torch.mul(rectified, rectified, out=u)


def _differentiate(activation: Activation, d: Tensor, h: Tensor, rectified: Tensor | None) -> None:
    """``d ← d σ′``, with σ′(0) as autograd has it."""
    if activation.name == "relu":
        torch.ops.aten.threshold_backward.grad_input(d, h, 0, grad_input=d)
    elif activation.name == "leaky-relu":
        torch.ops.aten.leaky_relu_backward.grad_input(d, h, activation.slope, True, grad_input=d)
    elif rectified is not None:
        d.mul_(rectified).mul_(2)


def _sequence(model: nn.Module) -> list[nn.Module] | None:
    """The modules in the order of their use; None if it is not given by ``nn.Sequential`` alone."""
    if "forward" in vars(model) or any(getattr(model, hooks, None) for hooks in _HOOKS):
        return None
    # By its forward and not by its class: a subclass may do other things.
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        return [model]
    leaves: list[nn.Module] = []
    for child in model:  # not children(): a module may be used twice
        inner = _sequence(child)
        if inner is None:
            return None
        leaves += inner
    return leaves or None
