"""What the statements of Section 3.1 may ask of a run; everything is computed once."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marginflow.alignment import Alignment, matrices_along, measure_alignment
from marginflow.attacks import Attack
from marginflow.attacks import build as build_attack
from marginflow.datasets import Dataset, load
from marginflow.errors import InputError, ModelError, RunError, SpecificationError
from marginflow.models import linear_layers
from marginflow.references import Kappa, MaxMargin, kappa, max_margin
from marginflow.runs import Run
from marginflow.theorems._verdict import Hypothesis
from marginflow.training import smoothness


@dataclass(frozen=True, eq=False)
class Point:
    """One measured point of the trajectory of a deep linear network."""

    record: dict[str, Any]
    layers: tuple[Tensor, ...]

    @cached_property
    def alignment(self) -> Alignment:
        """Singular triples and gaps at this point."""
        return measure_alignment(self.layers)

    @property
    def direction(self) -> Tensor:
        """W_Π as a vector, (d,)."""
        return self.alignment.product[0]


class Evidence:
    """A run with its data, oracles and kept weights.

    Args:
        run: a training run.
        data: its data set; by default loaded as ``run.json`` names it.
        data_dir: where MNIST lies, if that is what is loaded.

    Raises:
        RunError: not a training run, or the data are not those of the run.
    """

    def __init__(
        self,
        run: Run,
        data: Dataset | None = None,
        *,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.run = run
        self.config: Mapping[str, Any] = run.config
        if self.config.get("kind") != "train":
            raise RunError(f"verify: {run.name!r} is not a training run")
        if data is None:
            try:
                data = load(str(self.config.get("data")), data_dir=data_dir)
            except SpecificationError:
                raise InputError(
                    f"verify: the run was trained on data {self.config.get('data')!r} that cannot be "
                    "loaded by name; give them: verify(run, data=…)"
                ) from None
        if data.fingerprint() != self.config.get("data_sha256"):
            raise RunError(
                f"verify: the data {data.name!r} are not those that the run was trained on"
            )
        self.data = data

    @cached_property
    def attack(self) -> Attack | None:
        """The attack trained against, or None."""
        return build_attack(self.config["attack"])

    @property
    def eps(self) -> float:
        """ε of the attack, 0 without one."""
        return 0.0 if self.attack is None else self.attack.eps

    @property
    def p(self) -> float:
        """The exponent of the attack's norm, 2 without one."""
        return 2.0 if self.attack is None else self.attack.p

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The measured points whose weights were kept, if the network is deep linear."""
        if not self.linear or not self.run.trajectory():
            return ()
        matrices = matrices_along(self.run)
        steps = {record["step"]: record for record in self.run.metrics}
        return tuple(Point(steps[step], w) for step, w in matrices.items() if step in steps)

    @cached_property
    def linear(self) -> bool:
        """Whether the network is deep linear with one output."""
        try:
            layers = linear_layers(self.run.load_model())
        except (ModelError, RunError):
            return False
        return layers[-1].shape[0] == 1

    @cached_property
    def rows(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The examples as rows, (n, d), float64."""
        return self.data.x.reshape(self.data.n, -1).double().cpu().numpy()

    @cached_property
    def labels(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The labels −1/+1, (n,)."""
        return self.data.y.double().cpu().numpy()

    @cached_property
    def svm(self) -> MaxMargin:
        """ū and γ_m of the original data (Eq. 7)."""
        return max_margin(self.rows, self.labels)

    @property
    def separable(self) -> bool:
        """Whether there are two classes that a hyperplane through the origin separates."""
        return self.data.binary and self.svm.separable

    @cached_property
    def svm_direction(self) -> Tensor:
        """ū, (d,), float64."""
        return torch.from_numpy(np.array(self.svm.direction))

    @cached_property
    def kappa(self) -> Kappa | None:
        """κ of Lemma 7, or None for data that are not separable."""
        return kappa(self.rows, self.labels) if self.separable else None

    @cached_property
    def largest_norm(self) -> float:
        """R = max ‖x_i‖₂."""
        return float(np.linalg.norm(self.rows, axis=1).max())

    @property
    def log_inverse_loss(self) -> float:
        """ln(1/L) at the end of the run."""
        value = self.run.final.get("log_loss")
        return math.nan if value is None else -float(value)

    # Hypotheses that several statements share.

    def is_linear(self) -> Hypothesis:
        """The network is deep linear with one output."""
        return Hypothesis("a deep linear network with one output", self.linear)

    def has_path(self) -> Hypothesis:
        """The weights of the measured points were kept."""
        return Hypothesis("weights kept along the path (keep_weights)", len(self.points) > 1)

    def is_exact_l2(self) -> Hypothesis:
        """The perturbation is Eq. (10), as on a linear network FGM is too, or none."""
        a = self.attack
        met = a is None or (a.name in ("exact-linear", "fgm") and a.p == 2 and a.bounds is None)
        return Hypothesis(
            "the exact ℓ2 perturbation, Eq. (10), or none", met, self.config["attack"]
        )

    def within_margin(self) -> Hypothesis:
        """Eq. (8), strictly: ε < γ_m."""
        if not self.separable:
            why = "the data are not linearly separable" if self.data.binary else "several classes"
            return Hypothesis("Eq. (8): ε < γ_m", False, why)
        detail = f"ε = {self.eps:.6g}, γ_m = {self.svm.margin:.6g}"
        return Hypothesis("Eq. (8): ε < γ_m", self.eps < self.svm.margin, detail)

    def is_gradient_descent(self) -> Hypothesis:
        """Full batch, no momentum."""
        full = self.config["batch_size"] == self.config["examples"]
        momentum = self.config["momentum"]
        detail = "mini-batches" if not full else f"momentum {momentum}" if momentum else ""
        return Hypothesis("full-batch gradient descent", full and not momentum, detail)

    def without_momentum(self) -> Hypothesis:
        """No momentum, no undone epochs."""
        momentum = self.config["momentum"]
        undone = str(self.config["lr"]).startswith("loss-based")
        detail = f"momentum {momentum}" if momentum else "epochs are undone" if undone else ""
        return Hypothesis("gradient descent or SGD without momentum", not detail, detail)

    def is_logistic(self) -> Hypothesis:
        """The logistic loss, α = 1, β = 1/4."""
        name = self.config["loss"]
        return Hypothesis("the logistic loss", name == "logistic", name)

    def is_float64(self) -> Hypothesis:
        """float64 weights."""
        dtype = self.config["dtype"]
        return Hypothesis("float64", dtype == "float64", dtype)

    def keeps_step_bound(self) -> Hypothesis:
        """η ≤ min{1, 1/β*} all along: Lemma 2's rate, or a constant that turns out small enough."""
        lr = self.config["lr"]
        name = "η ≤ min{1, 1/β(r, r̄, ε)} along the path"
        if isinstance(lr, str):
            return Hypothesis(name, lr.startswith("lemma2"), lr)
        if not self.points:
            return Hypothesis(name, None, f"η = {lr:g}")
        bound = min(1.0, 1 / self.smoothness_of_path)
        return Hypothesis(name, lr <= bound, f"η = {lr:g}, bound {bound:.3g}")

    @cached_property
    def radius(self) -> float:
        """r, the largest ‖W_k‖_F on the path, at least 1."""
        return max(1.0, *(float(p.alignment.frobenius.max()) for p in self.points))

    @cached_property
    def floor(self) -> float:
        """r̄, the smallest ‖W_Π‖₂ on the path."""
        return min(float(torch.linalg.vector_norm(p.direction)) for p in self.points)

    @cached_property
    def smoothness_of_path(self) -> float:
        """β* on the smallest S(r) that contains the measured path."""
        depth = len(self.points[0].layers)
        return smoothness(depth, self.radius, self.floor, self.eps, data_norm=self.largest_norm)


def adversarial_loss(product: Tensor, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """``g(p) = (1/n) Σ ln(1 + e^{−(y_i⟨p, x_i⟩ − ε‖p‖₂)})``, the logistic loss at Eq. (10)."""
    margins = y * (x @ product) - eps * torch.linalg.vector_norm(product)
    return -torch.nn.functional.logsigmoid(margins).mean()
