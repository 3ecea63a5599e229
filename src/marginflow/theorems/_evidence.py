"""What the statements may ask of a run; everything is computed once.

Source: marginflow; the quantities are those of the statements that ask for them.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from marginflow._checks import instance
from marginflow.alignment import Alignment, matrices_along, measure_alignment
from marginflow.attacks import Attack, ExactLinear
from marginflow.attacks import build as build_attack
from marginflow.datasets import Dataset
from marginflow.errors import InputError, ModelError, RunError, SpecificationError
from marginflow.homogeneity import Homogeneity, Layer, measure_homogeneity
from marginflow.losses import Loss, get_loss
from marginflow.models import linear_layers, load_weights
from marginflow.models._build import rebuild
from marginflow.runs import Run
from marginflow.runs._schema import Config
from marginflow.theorems._certificates import Certificates, certify
from marginflow.theorems._regularity import Jumps, Kinks, find_jumps, find_kinks
from marginflow.theorems._site import Site
from marginflow.theorems._verdict import NOT_SAID, Hypothesis
from marginflow.training import smoothness

if TYPE_CHECKING:
    from marginflow.references import Kappa, MaxMargin

_KINDS = ("train", "flow", "monitor")
_SITES = 10
_EXAMPLES = 1000
_FEWEST = 50
_WORK = 1e8  # examples × weights at one point: seconds, and not minutes, with double backward


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
        run: a training run, or a gradient flow.
        data: its data set; by default loaded as ``run.json`` names it.
        attack: its attack, where the name does not say it all (a finite set).
        model: a network of the same architecture, if it is not one of :mod:`marginflow.models`.
        data_dir: where MNIST lies, if that is what is loaded.

    Attributes:
        config: the configuration of the run, as far as it is said.

    Raises:
        RunError: another kind of run, or data or an attack that are not those of the run.
        InputError: data or an attack that must be given.
    """

    def __init__(
        self,
        run: Run,
        data: Dataset | None = None,
        *,
        attack: Attack | None = None,
        model: nn.Module | None = None,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.run = run
        self.config: Mapping[str, Any] = run.config
        if self.config.get("kind") == "maximize":
            raise RunError(
                f"verify: {run.name!r} maximises margins, and the steps of method "
                f"{str(self.config.get('method')).partition(':')[0]!r} follow no gradient flow of the "
                "loss, of which the statements speak; of such a network certify measures the distance "
                "from a KKT point (Theorem 5): marginflow certify, or mf.kkt_certificate"
            )
        if self.config.get("kind") not in _KINDS:
            raise RunError(f"verify: {run.name!r} is not a training run, nor a gradient flow")
        self.declared: frozenset[str] | None = None
        """What a monitored loop says of itself, or None for a run of our own, which says all."""
        if self.config["kind"] == "monitor":
            self.config, self.declared = _foreign(self.config)
        self.attack = _attack_of(self.config, attack)
        """The attack trained against, or None."""
        self._architecture = model
        self.data = run.load_data(data, data_dir=data_dir)

    @property
    def is_flow(self) -> bool:
        """Whether the run is a gradient flow, and not made of steps."""
        return bool(self.config["kind"] == "flow")

    @property
    def further(self) -> str:
        """What to do to get further along the path."""
        return "follow the flow further" if self.is_flow else "train longer, or lr='loss-based'"

    @property
    def rtol(self) -> float:
        """The relative tolerance of a flow's integrator; 0 for a training run."""
        if not self.is_flow:
            return 0.0
        used = [r["tolerance"] for r in self.run.metrics if r.get("tolerance") is not None]
        return float(max(used, default=self.config.get("rtol") or 0.0))

    @property
    def slack(self) -> float:
        """The relative fall of a growing quantity that rounding and the integrator account for.

        A step's error may show as a fall of its size. Explicit steps have larger ones, but are taken
        again where ℓ/ρ falls.
        """
        return max(1e-12, min(self.rtol, 1e-6))

    @property
    def eps(self) -> float:
        """ε of the attack, in the units of x; 0 without one."""
        return 0.0 if self.attack is None else self.attack.eps

    @property
    def p(self) -> float:
        """The exponent of the attack's norm, 2 without one."""
        return 2.0 if self.attack is None else self.attack.p

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The measured points whose weights were kept, if the network is deep linear."""
        if not self.linear or not self._kept:
            return ()
        matrices = matrices_along(self.run)
        steps = {record["step"]: record for record in self.run.metrics}
        return tuple(Point(steps[step], w) for step, w in matrices.items() if step in steps)

    @cached_property
    def _kept(self) -> frozenset[int]:
        """The measured steps whose weights were kept, of any network."""
        return frozenset(self.run.trajectory()) & {record["step"] for record in self.run.metrics}

    @cached_property
    def linear(self) -> bool:
        """Whether the network is deep linear with one output."""
        try:
            layers = linear_layers(self._load())
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
        from marginflow.references import max_margin

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
        from marginflow.references import kappa

        return kappa(self.rows, self.labels) if self.separable else None

    @cached_property
    def largest_norm(self) -> float:
        """R = max ‖x_i‖₂; 1 for examples that are all 0, which is a bound as well."""
        return float(np.linalg.norm(self.rows, axis=1).max()) or 1.0

    @property
    def log_inverse_loss(self) -> float:
        """ln(1/L) at the end of the run."""
        value = self.run.final.get("log_loss")
        return math.nan if value is None else -float(value)

    # The network itself, for the statements of Section 3.2.

    @cached_property
    def loss(self) -> Loss:
        """The loss ℓ that was trained with."""
        return get_loss(str(self.config["loss"]))

    @cached_property
    def network(self) -> nn.Module | None:
        """A copy of the network in float64 with the last weights, or None if it cannot be built."""
        try:
            model = copy.deepcopy(self._load()).double().cpu().eval()
        except (ModelError, RunError):
            return None
        return model if all(bool(p.isfinite().all()) for p in model.parameters()) else None

    def _load(self) -> nn.Module:
        """The network with its last weights: of a checkpoint, else the last that were kept."""
        try:
            return self.run.load_model(copy.deepcopy(self._architecture))
        except RunError:
            kept = self.run.trajectory()
            if not kept or not self.config.get("model"):
                raise
            return rebuild(self.config["model"], kept[max(kept)]).double()

    @cached_property
    def homogeneity(self) -> Homogeneity | None:
        """The layers as recorded, else as measured; None if it is not homogeneous."""
        table = self.config.get("layers")
        if table and all(entry["degree"] is not None for entry in table):
            return Homogeneity(
                tuple(Layer(e["name"], tuple(e["parameters"]), float(e["degree"])) for e in table)
            )
        if self.network is None:
            return None
        try:
            return measure_homogeneity(self.network, self.data.x)
        except ModelError:
            return None

    @cached_property
    def sample(self) -> tuple[Tensor, Tensor]:
        """The examples at which identities are examined, float64: all, or evenly spread ones.

        Returns:
            x, (n, …), and y, (n,).
        """
        weights = 1 if self.network is None else sum(p.numel() for p in self.network.parameters())
        most = min(_EXAMPLES, max(_FEWEST, int(_WORK / weights)))
        chosen = torch.linspace(0, self.data.n - 1, min(self.data.n, most)).round().long()
        return self.data.x[chosen].double().cpu(), self.data.y[chosen].cpu()

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """At most ten kept points of the path as networks in float64; else the last weights only.

        Raises:
            ModelError: kept weights that are of another network.
        """
        if self.network is None or self.homogeneity is None:
            return ()
        kept = self.run.trajectory()
        records = {record["step"]: record for record in self.run.metrics}
        steps = [step for step in kept if step in records]
        if len(steps) > _SITES:
            last = len(steps) - 1
            places = {round(i * last / (_SITES - 1)) for i in range(_SITES)}
            steps = [steps[place] for place in sorted(places)]
        if not steps:
            return self._usable([self._site(self.network)])
        found = []
        for step in steps:
            model = copy.deepcopy(self.network)
            load_weights(model, kept[step])
            found.append(self._site(model))
        return self._usable(found)

    def _site(self, model: nn.Module) -> Site:
        if self.homogeneity is None:
            raise ModelError("expected a homogeneous network")
        return Site(model, self.homogeneity, self.sample, self.loss, self.attack)

    def _usable(self, sites: list[Site]) -> tuple[Site, ...]:
        """Those with finite weights and no layer at 0, which has no direction."""
        norms = [site.norms for site in sites]
        return tuple(
            site
            for site, n in zip(sites, norms, strict=True)
            if bool(n.isfinite().all()) and bool((n > 0).all())
        )

    @property
    def where(self) -> str:
        """Which points and examples the identities were examined at, for the tables."""
        count, n = len(self.sites), len(self.sample[1])
        examples = "examples" if n == self.data.n else f"of {self.data.n} examples"
        if not self.run.trajectory():
            return f"final weights only, {n} {examples}"
        return f"{count} {'points' if count != 1 else 'point'}, {n} {examples}"

    @cached_property
    def kinks(self) -> Kinks | None:
        """Places where ∇_x f jumps at the last weights, or None where it is continuous."""
        return find_kinks(self.sites[-1].model, self.sample[0]) if self.sites else None

    @cached_property
    def jumps(self) -> Jumps | None:
        """How δ moves with the weights along the path, or None without an attack or network."""
        return find_jumps(self.sites) if self.sites and self.attack is not None else None

    @property
    def differentiable(self) -> bool:
        """Whether margins can be differentiated through δ(W); not so with other libraries' attacks."""
        return self.attack is None or self.attack.differentiable

    @cached_property
    def jumps_since_separation(self) -> Jumps | None:
        """The same from L < 1/n on, where no input is dead any more; None for fewer than two points."""
        settled = tuple(site for site in self.sites if site.smoothed > 0)
        return find_jumps(settled) if len(settled) > 1 else None

    @cached_property
    def certificates(self) -> Certificates:
        """Distances to a KKT point at kept points with L < 1/n; of discrete steps at the last only."""
        attack = self.attack
        usable = self.data.binary and (attack is None or attack.scale_invariant)
        sites = self.sites if self.is_flow else self.sites[-1:]
        return certify(sites if usable else (), self.config["derivative"])

    @cached_property
    def exact_maximum(self) -> bool:
        """Whether δ minimises the margin exactly, for its own ε or (PGD with few steps) a smaller.

        So do FGM, FGSM and PGD on any network with one output that is linear in its input.
        """
        attack = self.attack
        if attack is None or attack.exact:
            return True
        if attack.random or attack.bounds is not None or not attack.scale_invariant:
            return False
        if not self.sites or not self.data.binary:
            return False
        x, y = self.sample
        try:
            ExactLinear(2.0, 0.0)(self.sites[-1].model, x[:8], y[:8])
        except ModelError:
            return False
        return True

    def unsaid(self, *names: str) -> bool:
        """Whether a monitored loop leaves any of these settings unsaid, so that they are unknown.

        Args:
            names: of settings, as in ``run.json``.
        """
        return self.declared is not None and not self.declared.issuperset(names)

    # Hypotheses that several statements share.

    def is_linear(self) -> Hypothesis:
        """The network is deep linear with one output."""
        return Hypothesis("a deep linear network with one output", self.linear)

    def has_path(self) -> Hypothesis:
        """The weights of the measured points were kept."""
        return Hypothesis("weights kept along the path (keep_weights)", len(self._kept) > 1)

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
        if self.is_flow:
            return Hypothesis("full-batch gradient descent", True, "its limit, the gradient flow")
        if self.unsaid("batch_size", "momentum"):
            return Hypothesis("full-batch gradient descent", None, NOT_SAID)
        full = self.config["batch_size"] == self.config["examples"]
        momentum = self.config["momentum"]
        detail = "mini-batches" if not full else f"momentum {momentum}" if momentum else ""
        return Hypothesis("full-batch gradient descent", full and not momentum, detail)

    def takes_steps(self) -> Hypothesis:
        """Gradient descent with steps, for statements about their size."""
        detail = "a gradient flow" if self.is_flow else ""
        return Hypothesis("gradient descent with steps", not self.is_flow, detail)

    def without_momentum(self) -> Hypothesis:
        """No momentum, no undone epochs."""
        if self.unsaid("momentum", "lr"):
            return Hypothesis("gradient descent or SGD without momentum", None, NOT_SAID)
        momentum = self.config["momentum"]
        undone = str(self.config["lr"]).startswith("loss-based")
        detail = f"momentum {momentum}" if momentum else "epochs are undone" if undone else ""
        return Hypothesis("gradient descent or SGD without momentum", not detail, detail)

    def is_logistic(self) -> Hypothesis:
        """The logistic loss, α = 1, β = 1/4."""
        if self.unsaid("loss"):
            return Hypothesis("the logistic loss", None, NOT_SAID)
        name = self.config["loss"]
        return Hypothesis("the logistic loss", name == "logistic", name)

    def is_float64(self) -> Hypothesis:
        """float64 weights."""
        dtype = self.config["dtype"]
        return Hypothesis("float64", dtype == "float64", dtype)

    def keeps_step_bound(self) -> Hypothesis:
        """η ≤ min{1, 1/β*} all along: Lemma 2's rate, or a constant that turns out small enough."""
        lr = self.config["lr"]
        if self.unsaid("lr"):
            return Hypothesis("η ≤ min{1, 1/β(r, r̄, ε)} along the path", None, NOT_SAID)
        name = "η ≤ min{1, 1/β(r, r̄, ε)} along the path"
        if self.is_flow:
            return Hypothesis(name, True, "a gradient flow: η → 0")
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


def _attack_of(config: Mapping[str, Any], given: Attack | None) -> Attack | None:
    """The attack of a run: the given one if it is the run's, else what the name says."""
    spec = str(config["attack"])
    if given is not None:
        instance("attack", given, Attack, "an attack, as mf.attacks.build makes it")
        if given.spec != spec:
            raise RunError(f"verify: the run was made against {spec!r}, not {given.spec!r}")
        return given
    try:
        return build_attack(spec)
    except SpecificationError:
        raise InputError(
            f"verify: the run's attack {spec!r} cannot be built from its name; "
            "give it: verify(run, attack=…)"
        ) from None


def _foreign(config: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """The settings of a monitored loop with the usual ones in place of what it does not say.

    The measured perturbation stands for the one trained against, and the logistic loss (cross-entropy for
    several classes) for the loss. Whatever a statement asks of them is unknown, not met.
    """
    said = frozenset(config.get("declared") or ())
    binary = len(config.get("classes") or ()) == 2 and config.get("loss") != "cross-entropy"
    usual = {
        "attack": config["measure_with"],
        "loss": config.get("loss") or ("logistic" if binary else "cross-entropy"),
        "derivative": "detached",
    }
    return Config({**config, **{k: v for k, v in usual.items() if k not in said}}), said
