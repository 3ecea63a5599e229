"""Outputs at perturbed inputs without gradients: what margins need.

Source: marginflow; the perturbed inputs of Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from marginflow._checks import choice
from marginflow.attacks import Attack
from marginflow.distributed import RowsGenerator, current
from marginflow.engine._build import EngineName, auto_engine
from marginflow.engine._dense import DenseNetwork
from marginflow.engine._fused import unserved
from marginflow.engine._parallel import check_divisible
from marginflow.engine._perturber import Perturber
from marginflow.engine._products import Products, choose_products, multiplying
from marginflow.errors import ModelError
from marginflow.homogeneity import evaluation_mode
from marginflow.losses import check_labels


class AttackedOutputs:
    """``(x, y) ↦ f(x + δ(W))`` of a model in evaluation mode, batch by batch.

    Where several processes work together each takes its rows of a batch, and all get the whole.

    Args:
        model: the network.
        attack: δ, or None for the outputs at x.
        shape: the shape of an example.
        engine: ``fused`` (explicit products), ``autograd``, or ``auto``: fused where it applies.

    Raises:
        SpecificationError: an unknown engine.
        ModelError: ``fused`` where it does not apply.
        InputError: in a job of several processes, an attack whose draws cannot be divided among
            them.
    """

    def __init__(
        self,
        model: nn.Module,
        attack: Attack | None,
        shape: Sequence[int],
        *,
        engine: EngineName = "auto",
    ) -> None:
        self.model = model
        self.attack = attack
        choice("engine", engine, ("auto", "autograd", "fused"))
        reason = unserved(model, attack, shape)
        if engine == "fused" and reason is not None:
            raise ModelError(f"the fused engine: {reason}; use engine='autograd'")
        if engine == "auto":
            engine = auto_engine() if reason is None else "autograd"
        self._network = DenseNetwork.of(model, shape) if engine == "fused" else None
        self._perturber: Perturber | None = None
        self._clean: Tensor | None = None
        self._team = current()
        if self._team is not None:
            check_divisible(attack)
        if self._network is not None and attack is not None:
            self._perturber = Perturber(self._network, attack)

    def __call__(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The outputs, which the next call may overwrite, and the dead inputs, (n,) bool.

        Args:
            x: examples, of the model's dtype and device.
            y: labels, (n,).
            generator: serves a random start.

        Raises:
            DataError: labels that do not fit, examples outside the attack's bounds.
            ProcessLostError: another process is gone.
        """
        outputs, dead = self._divided(self._attacked, x, y, generator)
        return outputs, dead

    def _attacked(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        dead = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._clean = None
        if self._network is None:
            if self.attack is not None:
                found = self.attack(self.model, x, y, generator=generator)
                x, dead, self._clean = x + found.delta, found.dead_inputs, found.clean
            return self._plain(x), dead
        check_labels(self._network.weights[-1].new_empty(len(x), self._network.classes), y)
        if self.attack is None or self._perturber is None:
            return self._plain(x), dead
        self.attack.check_bounds(x)
        with multiplying(self._products(x)):
            z, still = self._perturber(x, y, generator, dead=True)
            return self._network.forward(z).mT, dead if still is None else still

    def with_clean(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs at x, those at x + δ, and the dead inputs, in no more passes than needed.

        Arguments and errors as for a call.

        Args:
            x: examples, (n, …).
            y: labels, (n,).
            generator: serves a random start.

        Returns:
            outputs (n,), (n, 1) or (n, C), twice, and (n,) bool.
        """
        clean, outputs, dead = self._divided(self._both, x, y, generator)
        return clean, outputs, dead

    def _both(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs, dead = self._attacked(x, y, generator)
        if self.attack is None:
            return outputs, outputs, dead
        if self._perturber is not None and self._perturber.clean is not None:
            return self._perturber.clean.mT, outputs, dead
        if self._clean is not None:
            return self._clean, outputs, dead
        outputs = outputs.clone()
        return self._plain(x), outputs, dead

    def _divided(
        self,
        function: Callable[[Tensor, Tensor, torch.Generator | None], tuple[Tensor, ...]],
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None,
    ) -> list[Tensor]:
        """What ``function`` gives for the batch, each process taking its rows."""
        team, n = self._team, len(x)
        if team is None:
            return list(function(x, y, generator))
        if self.attack is not None:
            self.attack.check_bounds(x)  # so that all refuse what lies in the rows of one
        rows, source = team.rows(n), None
        if generator is not None:
            source = RowsGenerator.of(generator, rows, n)
        found = [team.gather(part, n) for part in function(x[rows], y[rows], source)]
        if generator is not None and source is not None:
            generator.set_state(source.get_state())
        return found

    def _plain(self, x: Tensor) -> Tensor:
        """The outputs at x, which the next call may overwrite."""
        if self._network is not None:
            with multiplying(self._products(x)):
                return self._network.forward(self._network.columns(x)).mT
        with torch.no_grad(), evaluation_mode(self.model):
            outputs: Tensor = self.model(x)
            return outputs

    def _products(self, x: Tensor) -> Products:
        """Which library multiplies batches of this size."""
        if self._network is None:
            return "default"
        largest = max(self._network.weights, key=lambda w: w.numel())
        return choose_products(largest, len(x))
