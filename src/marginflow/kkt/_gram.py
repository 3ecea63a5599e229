"""Gram matrices ``⟨∂m_i/∂W, ∂m_j/∂W⟩`` of margin gradients, in bounded memory.

A dense layer ``h = W a (+ bias)`` has ``∂m_i/∂W = b_i a_iᵀ`` with b the back-propagated signal
``∂m_i/∂h``, so its share of the Gram matrix is ``(a_i·a_j)(b_i·b_j)`` (and ``b_i·b_j`` for the bias):
no gradient of a single example is ever formed. A convolution's gradient is ``Σ_p b_p u_pᵀ`` over the
positions p with the patches u; it is formed for some output channels at a time. Any other network
(and δ that is differentiated) takes per-example gradients, a block of examples at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from marginflow.distributed import Team, current
from marginflow.kkt._problem import Problem, Rows

_SLAB = 512
_CHUNK = 64
_EULER = 1e-8


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        args: the positional arguments.
        output: what it returned.
    """

    args: tuple[object, ...]
    output: Tensor


class Engine(ABC):
    """Turns rows into features whose inner products are those of the margin gradients.

    Attributes:
        name: for people.
        bytes_per_row: of the features.
    """

    name: str
    bytes_per_row: int

    @abstractmethod
    def features(self, rows: Rows) -> Any:
        """Whatever :meth:`inner` takes."""

    @abstractmethod
    def inner(self, left: Any, right: Any) -> Tensor:
        """``⟨∂m_i, ∂m_j⟩`` for rows i of ``left`` and j of ``right``."""

    @abstractmethod
    def gathered(self, own: Any, team: Team, r: int) -> Any:
        """The features of ``r`` rows from those that each process has of its own."""

    def gram(self, rows: Rows, memory: int) -> Tensor:
        """The Gram matrix of the rows, (r, r), float64, on the CPU.

        Args:
            rows: the margins.
            memory: bytes that features may take.
        """
        r = len(rows)
        gram = torch.empty((r, r), dtype=torch.float64)
        # Most of the memory for the block that stays: the others are formed anew for each such block.
        held, passing = (max(1, memory * share // (8 * self.bytes_per_row)) for share in (7, 1))
        for here, some in rows.parts(held):
            own, left = self._features(some)
            gram[here, here] = _whole(self.inner(own, left), len(some))
            for there, others in rows.take(slice(0, here.start)).parts(passing):
                part = slice(there.start, min(there.stop, here.start))
                block = _whole(self.inner(own, self._features(others)[1]), len(some))
                gram[here, part] = block
                gram[part, here] = block.T
        return gram

    def across(self, rows: Rows, others: Rows, memory: int) -> Tensor:
        """``⟨∂m_i, ∂m_j⟩`` of a few rows with all others, (r, others), float64, on the CPU."""
        found = torch.empty((len(rows), len(others)), dtype=torch.float64)
        size = max(1, memory // (2 * 8 * self.bytes_per_row))
        for here, some in rows.parts(size):
            own, _ = self._features(some)
            for there, part in others.parts(size):
                found[here, there] = _whole(self.inner(own, self._features(part)[1]), len(some))
        return found

    def _features(self, rows: Rows) -> tuple[Any, Any]:
        """Those of this process's rows, and those of all; the same where it works alone."""
        team = current()
        if team is None:
            features = self.features(rows)
            return features, features
        own = self.features(rows.take(team.rows(len(rows))))
        return own, self.gathered(own, team, len(rows))


class GradientEngine(Engine):
    """Per-example gradients, for any network."""

    name = "per-example gradients"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.bytes_per_row = 8 * len(problem.weights)

    def features(self, rows: Rows) -> Tensor:
        """``∂m_i/∂W``, (r, number of weights)."""
        return self.problem.gradients(rows)

    def gathered(self, own: Tensor, team: Team, r: int) -> Tensor:
        """The gradients of all rows."""
        return team.gather(own, r)

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """The product of the gradient matrices."""
        return left @ right.T


class LayerEngine(Engine):
    """Layer inputs and back-propagated signals, for networks of linear and convolutional layers.

    Every trainable parameter must belong to one ``nn.Linear`` or ``nn.Conv2d`` that is called
    once with a batch; :meth:`fit` finds out.
    """

    name = "layer inputs and signals"

    def __init__(self, problem: Problem, layers: list[nn.Module], memory: int) -> None:
        self.problem = problem
        self.layers = layers
        self.memory = memory
        self.bytes_per_row = 1

    @classmethod
    def fit(cls, problem: Problem, rows: Rows, memory: int) -> LayerEngine | None:
        """The engine, or None where the network is of another kind.

        That the layers are all there is to the weights is measured by Euler's identity: the layers'
        ``⟨b_i, h_i⟩`` add up to ``K m_i`` unless a weight is used elsewhere too.
        """
        layers = _owners(problem)
        if problem.through or layers is None:
            return None
        engine = cls(problem, layers, memory)
        probe = rows.take(slice(0, 2))
        captured = engine._capture(probe)
        if captured is None:
            return None
        engine.bytes_per_row = sum(
            8 * (layer.inputs[0].numel() + layer.signals[0].numel()) for layer in captured
        )
        shares = torch.stack([layer.euler() for layer in captured])
        size = shares.abs().sum(dim=0)
        if bool(((shares.sum(dim=0) - problem.order * probe.values).abs() > _EULER * size).any()):
            return None
        return engine

    def features(self, rows: Rows) -> list[_Layer]:
        """Inputs and signals of every layer, with the rows along the first axis."""
        parts = []
        for _, some in rows.parts(self.problem.batch_size):
            captured = self._capture(some)
            if captured is None:
                raise RuntimeError("the network's layers were called otherwise than at first")
            parts.append(captured)
        return [
            _Layer(
                layers[0].module,
                torch.cat([layer.inputs for layer in layers]),
                torch.cat([layer.signals for layer in layers]),
                None,
            )
            for layers in map(list, zip(*parts, strict=True))
        ]

    def gathered(self, own: list[_Layer], team: Team, r: int) -> list[_Layer]:
        """Inputs and signals of all rows."""
        return [
            _Layer(layer.module, team.gather(layer.inputs, r), team.gather(layer.signals, r), None)
            for layer in own
        ]

    def inner(self, left: list[_Layer], right: list[_Layer]) -> Tensor:
        """The layers' shares, added up."""
        total = left[0].inputs.new_zeros((len(left[0].inputs), len(right[0].inputs)))
        for here, there in zip(left, right, strict=True):
            if isinstance(here.module, nn.Conv2d):
                _add_convolution(total, here, there, self.memory)
            else:
                _add_dense(total, here, there)
        return total

    @contextmanager
    def recorded(self) -> Iterator[dict[nn.Module, list[Call]]]:
        """Record what the layers are called with, and what they return, inside the block."""
        calls: dict[nn.Module, list[Call]] = {module: [] for module in self.layers}

        def hook(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
            calls[module].append(Call(args, output))
            # A copy goes on: an activation in place must not overwrite what was kept.
            return output.clone()

        handles = [module.register_forward_hook(hook) for module in self.layers]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _capture(self, rows: Rows) -> list[_Layer] | None:
        """What the layers meet, or None where one is not called once with a batch."""
        with self.recorded() as calls:
            margins = self.problem.margins(rows)
        inputs, outputs = [], []
        for module, met in calls.items():
            ndim = 4 if isinstance(module, nn.Conv2d) else 2
            if len(met) != 1 or len(met[0].args) != 1:
                return None
            given = met[0].args[0]
            if not isinstance(given, Tensor) or given.ndim != ndim or len(given) != len(rows):
                return None
            inputs.append(given.detach())
            outputs.append(met[0].output)
        signals = torch.autograd.grad(margins.sum(), outputs, materialize_grads=True)
        return [
            _Layer(module, a, signal, h.detach())
            for module, a, signal, h in zip(calls, inputs, signals, outputs, strict=True)
        ]


def _whole(block: Tensor, r: int) -> Tensor:
    """The block of ``r`` rows, on the CPU, from the part that this process has of it."""
    team = current()
    return (block if team is None else team.gather(block, r)).cpu()


@dataclass(frozen=True, eq=False)
class _Layer:
    """What one layer meets on r rows.

    Attributes:
        module: the layer.
        inputs: a, (r, …).
        signals: ``b = ∂m_i/∂h_i``, (r, …).
        outputs: h, (r, …), where it is needed.
    """

    module: nn.Module
    inputs: Tensor
    signals: Tensor
    outputs: Tensor | None

    @property
    def weight(self) -> bool:
        """Whether the weight is trainable."""
        return _trainable(self.module, "weight")

    @property
    def bias(self) -> bool:
        """Whether there is a trainable bias."""
        return _trainable(self.module, "bias")

    def euler(self) -> Tensor:
        """``⟨W_k, ∂m_i/∂W_k⟩``, (r,)."""
        if self.outputs is None:
            raise RuntimeError("the outputs were not kept")
        product = (self.signals * self.outputs).flatten(1).sum(dim=1)
        bias = self.module._parameters.get("bias")
        from_bias = torch.zeros_like(product)
        if bias is not None:
            channels = self.signals.flatten(2).sum(dim=2) if self.signals.ndim > 2 else self.signals
            from_bias = channels @ bias.detach()
        return (product - from_bias) * self.weight + from_bias * self.bias


def _trainable(module: nn.Module, name: str) -> bool:
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.requires_grad


def _owners(problem: Problem) -> list[nn.Module] | None:
    """The layers to which the trainable parameters belong, or None where one is of another kind."""
    layers, seen = [], set()
    for module in problem.model.modules():
        own = [p for p in module._parameters.values() if p is not None and p.requires_grad]
        if not own:
            continue
        forward = type(module).forward
        dense = forward is nn.Linear.forward
        convolution = (
            isinstance(module, nn.Conv2d)
            and forward is nn.Conv2d.forward
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )
        if not (dense or convolution) or any(id(p) in seen for p in own):
            return None
        seen |= {id(p) for p in own}
        layers.append(module)
    return layers


def _add_dense(total: Tensor, left: _Layer, right: _Layer) -> None:
    """Add ``(a_i·a_j)(b_i·b_j)``, some rows at a time; half of it where it is symmetric."""
    same = left is right
    for start in range(0, len(left.inputs), _SLAB):
        rows = slice(start, start + _SLAB)
        columns = slice(0, start + _SLAB) if same else slice(None)
        signals = left.signals[rows] @ right.signals[columns].T
        share = torch.zeros_like(signals)
        if left.weight:
            share += signals * (left.inputs[rows] @ right.inputs[columns].T)
        if left.bias:
            share += signals
        total[rows, columns] += share
        if same and start:
            total[:start, rows] += share[:, :start].T


def _add_convolution(total: Tensor, left: _Layer, right: _Layer, memory: int) -> None:
    """Add ``⟨Σ_p b_ip u_ipᵀ, Σ_p b_jp u_jpᵀ⟩``, some output channels at a time."""
    if left.weight:
        weight = left.module._parameters["weight"]
        channels, patch = (0, 0) if weight is None else (len(weight), weight[0].numel())
        width = memory // (2 * 8 * patch * (len(left.inputs) + len(right.inputs)))
        width = max(1, width)
        for start in range(0, channels, width):
            group = slice(start, start + width)
            here = _channel_gradients(left, group)
            there = here if left is right else _channel_gradients(right, group)
            total += here @ there.T
    if left.bias:
        total += left.signals.flatten(2).sum(dim=2) @ right.signals.flatten(2).sum(dim=2).T


def _channel_gradients(layer: _Layer, group: slice) -> Tensor:
    """Per-example gradients by the weights of some output channels, (r, …)."""
    module = layer.module
    if not isinstance(module, nn.Conv2d):
        raise TypeError(f"expected a convolution, got {type(module).__name__}")
    found = []
    for start in range(0, len(layer.inputs), _CHUNK):
        rows = slice(start, start + _CHUNK)
        patches = unfold(
            layer.inputs[rows],
            module.kernel_size,
            dilation=module.dilation,
            padding=module.padding,  # type: ignore[arg-type]
            stride=module.stride,
        )
        signals = layer.signals[rows, group].flatten(2)
        found.append((signals @ patches.transpose(1, 2)).flatten(1))
    return torch.cat(found)
