"""Adversarial training in the ways people write it: one epoch of Algorithm 1, the same in each.

Every loop has a network of its own with the same first weights, trains in batches drawn without
replacement, against FGSM or ℓ∞-PGD that starts at x and keeps x + δ in [0, 1], with
``L = mean ln(1 + e^{−yf})`` and plain SGD.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from _timing import now
from torch import Tensor, nn
from torch.nn import functional as F

import marginflow as mf
from marginflow.attacks import TwoLogits
from marginflow.engine import Engine, EngineName, FusedEngine, PerturbationPrecision
from marginflow.engine import build as build_engine
from marginflow.losses import get_loss
from marginflow.training import Callback, Trainer


@dataclass(frozen=True)
class Case:
    """A training to time.

    Attributes:
        name: of the case.
        data: examples with features in [0, 1], labels −1/+1.
        widths: of the network.
        steps: of the attack; 1 is FGSM.
        batch_size: examples in a batch.
        eps, step_size: budget and step of the attack.
        lr: learning rate.
        epochs: in one timing.
    """

    name: str
    data: mf.Dataset
    widths: tuple[int, ...]
    steps: int
    batch_size: int
    eps: float = 16 / 255
    step_size: float = 6 / 255
    lr: float = 0.1
    epochs: int = 1

    @property
    def attack(self) -> mf.attacks.Attack:
        """The perturbation, ours."""
        if self.steps == 1:
            return mf.attacks.FGSM(self.eps, bounds=(0, 1))
        return mf.attacks.PGD(
            "linf", eps=self.eps, steps=self.steps, step_size=self.step_size, bounds=(0, 1)
        )

    @property
    def weights(self) -> int:
        """P, the number of weights."""
        return sum(a * b for a, b in zip(self.widths[1:], self.widths, strict=False))

    @property
    def flops(self) -> float:
        """Useful work of one timing: ``n [4P·steps + 4P + 2(P − P_1)]`` an epoch.

        Forward and backward by the input in each step of the attack (2P each); in training forward,
        the gradient by the weights, and backward through all layers but the first, P_1.
        """
        p, first = self.weights, self.widths[0] * self.widths[1]
        return self.epochs * self.data.n * (4 * p * self.steps + 4 * p + 2 * (p - first))

    @property
    def updates(self) -> int:
        """SGD steps in one timing."""
        return self.epochs * math.ceil(self.data.n / self.batch_size)


class Loop(ABC):
    """One way to train.

    Args:
        case: what to train.
    """

    name: ClassVar[str]
    module: ClassVar[str | None] = None
    """The library that it needs."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model: nn.Module = mf.models.mlp(*case.widths, seed=0)
        self.parameters = list(self.model.parameters())
        self.initial = [p.detach().clone() for p in self.parameters]
        self.x = case.data.x.flatten(1)
        self.y = case.data.y.to(self.x.dtype)
        self.order = torch.Generator().manual_seed(0)

    def __call__(self) -> float:
        """Train from the first weights; the seconds that it took."""
        with torch.no_grad():
            for p, value in zip(self.parameters, self.initial, strict=True):
                p.copy_(value)
        return self.timed()

    def timed(self) -> float:
        """Train; the seconds."""
        began = now()
        self.train()
        return now() - began

    def train(self) -> None:
        """All epochs of the case."""
        for _ in range(self.case.epochs):
            for x, y in self.batches():
                self.step(x, y)

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> None:
        """One update."""

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches."""
        n, size = self.case.data.n, self.case.batch_size
        if size >= n:
            yield self.x, self.y
            return
        for part in torch.randperm(n, generator=self.order).split(size):
            yield self.x[part], self.y[part]


class Tight(Loop):
    """By hand: the attack takes the gradient by its input only."""

    name = "tight"

    def f(self, x: Tensor) -> Tensor:
        """Outputs, (n,)."""
        outputs: Tensor = self.model(x)
        return outputs.squeeze(1)

    def step(self, x: Tensor, y: Tensor) -> None:
        """One update."""
        z = self.perturbed(x, y)
        loss = F.softplus(-y * self.f(z)).mean()
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            for p, g in zip(self.parameters, gradients, strict=True):
                p.add_(g, alpha=-self.case.lr)

    def perturbed(self, x: Tensor, y: Tensor) -> Tensor:
        """The perturbed batch, x + δ."""
        case, z = self.case, x
        length = case.eps if case.steps == 1 else case.step_size
        low, high = (x - case.eps).clamp_(min=0), (x + case.eps).clamp_(max=1)
        for _ in range(case.steps):
            z = z.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((y * self.f(z)).sum(), z)
            with torch.no_grad():
                z = torch.clamp(torch.add(z, gradient.sign_(), alpha=-length), low, high)
        return z.detach()


class Compiled(Tight):
    """The tight loop with its model compiled."""

    name = "torch.compile"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        # One graph for each batch size, number of threads and kind of gradient; beyond the limit
        # dynamo would go on without compiling, and say nothing.
        torch._dynamo.config.recompile_limit = 64
        self.compiled = torch.compile(self.model, dynamic=False)

    def f(self, x: Tensor) -> Tensor:
        """Outputs, (n,)."""
        outputs: Tensor = self.compiled(x)
        return outputs.squeeze(1)


class WithOptimizer(Tight):
    """The usual training step around an attack: backward, ``torch.optim.SGD``."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.optimizer = torch.optim.SGD(self.parameters, lr=case.lr)

    def step(self, x: Tensor, y: Tensor) -> None:
        """One update."""
        z = self.perturbed(x, y)
        self.optimizer.zero_grad()
        F.softplus(-y * self.f(z)).mean().backward()
        self.optimizer.step()


class Naive(WithOptimizer):
    """``loss.backward()`` in the attack, too: it computes the weights' gradients and drops them."""

    name = "naive"

    def perturbed(self, x: Tensor, y: Tensor) -> Tensor:
        """The perturbed batch, x + δ."""
        case, z = self.case, x
        length = case.eps if case.steps == 1 else case.step_size
        for _ in range(case.steps):
            z = z.detach().requires_grad_()
            F.softplus(-y * self.f(z)).mean().backward()
            if z.grad is None:
                raise RuntimeError("expected a gradient of the input, got none")
            z = z.detach() + length * z.grad.sign()
            z = torch.max(torch.min(z, x + case.eps), x - case.eps).clamp(0, 1)
        return z.detach()


class Torchattacks(WithOptimizer):
    """torchattacks' FGSM and PGD."""

    name = "torchattacks"
    module = "torchattacks"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        library: Any = importlib.import_module("torchattacks")
        victim = TwoLogits(self.model)
        if case.steps == 1:
            self.attack = library.FGSM(victim, eps=case.eps)
        else:
            self.attack = library.PGD(
                victim, eps=case.eps, alpha=case.step_size, steps=case.steps, random_start=False
            )

    def perturbed(self, x: Tensor, y: Tensor) -> Tensor:
        """The perturbed batch, x + δ."""
        found: Tensor = self.attack(x, (y > 0).long())
        return found


class Foolbox(WithOptimizer):
    """foolbox's FGSM and PGD, called as its documentation does."""

    name = "foolbox"
    module = "foolbox"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        library: Any = importlib.import_module("foolbox")
        self.victim = library.PyTorchModel(
            TwoLogits(self.model).eval(), bounds=(0, 1), device=self.x.device
        )
        if case.steps == 1:
            self.attack = library.attacks.LinfFastGradientAttack(random_start=False)
        else:
            self.attack = library.attacks.LinfPGD(
                abs_stepsize=case.step_size, steps=case.steps, random_start=False
            )

    def perturbed(self, x: Tensor, y: Tensor) -> Tensor:
        """The perturbed batch, x + δ."""
        found: Tensor = self.attack(self.victim, x, (y > 0).long(), epsilons=self.case.eps)[1]
        return found


class Art(Loop):
    """ART's ``AdversarialTrainer`` with its FGSM and PGD."""

    name = "ART"
    module = "art"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        evasion: Any = importlib.import_module("art.attacks.evasion")
        estimators: Any = importlib.import_module("art.estimators.classification")
        trainers: Any = importlib.import_module("art.defences.trainer")
        classifier = estimators.PyTorchClassifier(
            TwoLogits(self.model),
            nn.CrossEntropyLoss(),
            (case.widths[0],),
            2,
            optimizer=torch.optim.SGD(self.parameters, lr=case.lr),
            clip_values=(0, 1),
            device_type="cpu",
        )
        common = {"norm": np.inf, "eps": case.eps, "batch_size": case.batch_size}
        if case.steps == 1:
            attack = evasion.FastGradientMethod(classifier, **common)
        else:
            attack = evasion.ProjectedGradientDescent(
                classifier, eps_step=case.step_size, max_iter=case.steps, verbose=False, **common
            )
        self.trainer = trainers.AdversarialTrainer(classifier, attack, ratio=1.0)
        self.arrays = self.x.numpy(), np.eye(2, dtype=np.float32)[(self.y > 0).long().numpy()]

    def train(self) -> None:
        """All epochs of the case."""
        size = min(self.case.batch_size, self.case.data.n)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            self.trainer.fit(*self.arrays, batch_size=size, nb_epochs=self.case.epochs)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Not used: ART's trainer makes its own batches."""
        raise NotImplementedError


class Stopwatch(Callback):
    """The seconds of a training without what is done once before the first step."""

    reads_gradients = False

    def on_start(self, trainer: Trainer) -> None:
        """The data are checked."""
        self.began = now()

    def on_end(self, trainer: Trainer) -> None:
        """All epochs are done."""
        self.seconds = now() - self.began


class Ours(Loop):
    """marginflow's trainer, without measurements."""

    engine: ClassVar[EngineName]
    precision: ClassVar[PerturbationPrecision] = "float32"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.watch = Stopwatch()
        self.trainer = Trainer(
            self.built(),
            case.data,
            lr=case.lr,
            batch_size=case.batch_size,
            epochs=0,
            callbacks=[self.watch],
        )

    def built(self) -> Engine:
        """The engine, as ``mf.train`` makes it."""
        return build_engine(
            self.model,
            get_loss("logistic"),
            self.case.attack,
            shape=self.case.data.x.shape[1:],
            batch_size=self.case.batch_size,
            engine=self.engine,
            perturbation_precision=self.precision,
        )

    @property
    def products(self) -> str:
        """Which library multiplies."""
        engine = self.trainer.engine
        return engine.products if isinstance(engine, FusedEngine) else "default"

    def timed(self) -> float:
        """Train on; the seconds of the epochs themselves."""
        self.trainer.epochs += self.case.epochs
        self.trainer.run()
        return self.watch.seconds

    def step(self, x: Tensor, y: Tensor) -> None:
        """Not used: the trainer takes the steps."""
        raise NotImplementedError


class OursAutograd(Ours):
    """``engine="autograd"``."""

    name = "ours, autograd"
    engine = "autograd"


class OursFused(Ours):
    """``engine="fused"``, what ``auto`` chooses for a dense network."""

    name = "ours, fused"
    engine = "fused"


class OursFusedBf16(Ours):
    """The same with ``perturbation_precision="bf16"``."""

    name = "ours, fused, bf16 δ"
    engine = "fused"
    precision = "bf16"


LOOPS: dict[str, type[Loop]] = {
    loop.name: loop
    for loop in (
        Tight,
        Naive,
        Torchattacks,
        Foolbox,
        Art,
        Compiled,
        OursAutograd,
        OursFused,
        OursFusedBf16,
    )
}
"""By the name that a table shows."""

PEERS = ("naive", "torchattacks", "foolbox", "ART", "torch.compile")
"""What others use instead."""


def difference(name: str, case: Case) -> float:
    """How far one step's ``ΔW`` is from the tight loop's, ``‖ΔW − ΔW_tight‖/‖ΔW_tight‖``.

    Both start at the same weights, on the first batch of the case.
    """
    size = min(case.batch_size, case.data.n)
    first = Case(
        case.name,
        mf.Dataset(case.data.x[:size], case.data.y[:size], bounds=(0, 1)),
        case.widths,
        case.steps,
        size,
        case.eps,
        case.step_size,
        case.lr,
    )
    moved = []
    for loop in (LOOPS[name](first), Tight(first)):
        loop()
        moved.append(
            torch.cat(
                [
                    (p.detach() - q).flatten().double()
                    for p, q in zip(loop.parameters, loop.initial, strict=True)
                ]
            )
        )
    return float((moved[0] - moved[1]).norm() / moved[1].norm())
