"""From a network to the KKT point beside it: a local solution of the max-margin problem (Eq. 19)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marginflow._checks import instance, whole
from marginflow.alignment import angle
from marginflow.attacks import Attack, build
from marginflow.errors import InputError
from marginflow.homogeneity import Homogeneity, power
from marginflow.kkt._certificate import Certificate, kkt_certificate, labelled, refuse_negative
from marginflow.kkt._problem import Problem
from marginflow.kkt._search import REACHED, Search
from marginflow.losses import get_loss

_MOST_WEIGHTS = 2000


@dataclass(frozen=True, eq=False)
class NearestKKTPoint:
    """A KKT point of ``min ½‖W‖² s.t. m_i(W) ≥ 1`` near the direction of a network.

    Source: Theorem 5 and Definition 3.

    Attributes:
        model: a float64 copy of the network at the point found, with smallest margin 1.
        residual: the relative residual r of the point, of multipliers on its tied smallest margins.
        margin: ``γ̂_m = min_i m_i/ρ`` there.
        margin_before: γ̂_m of the network it started from.
        angle: between the weights of the network and of the point, in radians.
        converged: whether ``residual ≤ 1e-8``.
        certificate: the certificate of the point.
        rounds: quadratic programs that were solved.
        advice: empty if converged, else what to do.
    """

    model: nn.Module
    residual: float
    margin: float
    margin_before: float
    angle: float
    converged: bool
    certificate: Certificate
    rounds: int
    advice: str = ""

    @property
    def gain(self) -> float:
        """``γ̂_m`` of the point over that of the network, less 1: what is left to gain."""
        return self.margin / self.margin_before - 1

    def as_dict(self) -> dict[str, Any]:
        """The numbers of the point, for JSON."""
        return {
            "residual": self.residual,
            "margin": self.margin,
            "margin_before": self.margin_before,
            "gain": self.gain,
            "angle": self.angle,
            "converged": self.converged,
            "rounds": self.rounds,
            "advice": self.advice,
            "support": self.certificate.support.tolist(),
        }

    def __str__(self) -> str:
        found = "found" if self.converged else "not reached"
        left = f"{self.gain:.2%}" if self.gain < 1 else f"a factor of {1 + self.gain:.3g}"
        left = left if self.converged else f"at least {left}"
        parts = {
            "residual": f"r = {self.residual:.1e}, support {len(self.certificate.support)} examples",
            "margin": f"γ̂_m = {self.margin:.6g}, {self.margin_before:.6g} before: {left} left to gain",
            "angle": f"{self.angle:.4g} rad ({math.degrees(self.angle):.3g}°) from the network",
        }
        if self.advice:
            parts["advice"] = self.advice
        lines = [f"KKT point near the network's direction: {found}"]
        return "\n".join(lines + [labelled(title, text) for title, text in parts.items()])


def nearest_kkt_point(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack | str | None = None,
    *,
    max_iterations: int = 300,
    homogeneity: Homogeneity | None = None,
) -> NearestKKTPoint:
    """Solve ``min ½‖W‖² s.t. m_i(W) ≥ 1`` locally, from the network's direction (Eq. 19).

    Sequential quadratic programming on ``W/m_min^{1/K}`` with the exact Hessian, each program solved by
    scipy's ``nnls`` (as SLSQP does), and each step accepted only if it raises ``m_min/‖W‖^K``; at last
    Newton's method on ``W = Σ λ_i ∂m_i, m_i = 1`` for the margins that came out active. Every rival
    class and every element of a finite set is a constraint of its own, and so is every pattern of signs
    that an ℓ∞ perturbation takes on the way. In the model of a step each unit of a dense ``nn.ReLU`` layer
    is held on its side of the kink, unless its multiplier says that crossing lowers ‖W‖.

    Where δ(W) jumps (a sign or a unit of a non-linear network under FGM, FGSM or PGD changes sides), the
    way may end at the jump, where there is no KKT point; a few attempts are made to go on beyond it.
    The model itself stays as it is.

    Args:
        model: a multi-homogeneous network of at most 2000 trainable weights.
        x: examples, (n, …).
        y: labels, (n,).
        attack: the perturbation, or its specification, without a random start. Its derivative
            is the total one.
        max_iterations: the most steps.
        homogeneity: the measured layers, if at hand.

    Raises:
        InputError: margins that are not all positive, too many weights, a random start.
        NotHomogeneousError, ModelError, DataError: as for :func:`kkt_certificate`.
    """
    whole("max_iterations", max_iterations, least=1)
    instance("model", model, nn.Module, "a torch.nn.Module")
    attack = build(attack)
    check_nearest(model, attack)
    with torch.enable_grad():
        # A small problem with scipy in its middle: on the CPU.
        problem = Problem(
            copy.deepcopy(model).cpu(),
            x.cpu(),
            y.cpu(),
            attack,
            derivative="total",
            homogeneity=homogeneity,
            seed=0,
            batch_size=max(1, len(y)),
            curvature=True,
        )
        start = problem.weights
        survey = problem.survey(len(y), get_loss("exponential"))
        refuse_negative(survey.margins)
        m_min = float(survey.margins.min())
        before = m_min / problem.homogeneity.norm_product(problem.model)
        ceiling = torch.full_like(survey.nearest.values, torch.inf)
        everything = problem.pieces(survey.nearest, ceiling, kinks=False)
        search = Search(problem, everything, max_iterations)
        found = search.run((start / power(m_min, 1 / problem.order)).cpu().numpy())
    point = copy.deepcopy(model).double()
    trainable = [p for p in point.parameters() if p.requires_grad]
    problem.put(torch.from_numpy(found).to(start))
    with torch.no_grad():
        for p, q in zip(trainable, problem.parameters, strict=True):
            p.copy_(q)
    certificate = kkt_certificate(
        point, x, y, attack, tau=0.0, taus=[0.0], homogeneity=problem.homogeneity
    )
    converged = certificate.residual <= REACHED
    rho = problem.homogeneity.norm_product(point)
    return NearestKKTPoint(
        model=point,
        residual=certificate.residual,
        margin=float(certificate.margins.min()) / rho,
        margin_before=before,
        angle=angle(start, problem.weights),
        converged=converged,
        certificate=certificate,
        rounds=search.rounds,
        advice="" if converged else search.advice(certificate.residual),
    )


def check_nearest(model: nn.Module, attack: Attack | None) -> None:
    """Refuse what :func:`nearest_kkt_point` cannot do, before anything is computed.

    Raises:
        InputError: too many weights, a random start.
    """
    if attack is not None and attack.random:
        raise InputError(
            "expected an attack without a random start: the margins must be functions of W"
        )
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if weights > _MOST_WEIGHTS:
        raise InputError(
            f"nearest_kkt_point: expected at most {_MOST_WEIGHTS} trainable weights, got {weights}; "
            "freeze layers, take a narrower network, or train on and certify"
        )
