"""``marginflow measure --certified``: the lower bounds in the table and in the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marginflow._checks import choice
from marginflow.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from marginflow import Dataset, Margins, Run
    from marginflow.attacks import Attack
    from marginflow.certified import Method

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

LABELS = {
    "certified_by": "bounds by",
    "certified_accuracy": "certified accuracy",
    "certified_normalized_margin": "certified min m/ρ",
    "width_median": "median width of m/ρ",
    "certified_margin": "certified min m",
    "certified_margin_width": "median width of m",
}
"""Rows of the table."""


def check_certified(method: str | None, attacks: Sequence[Attack | None]) -> Method | None:
    """The method, after refusing what cannot be bounded; nothing is computed yet.

    Raises:
        InputError: an unknown method, an attack without a ball.
        MissingDependencyError: auto-LiRPA is needed and missing.
    """
    from marginflow.certified import METHODS, check_attack

    if method is None:
        return None
    choice("--certified", method, METHODS)
    (known,) = (name for name in METHODS if name == method)
    for attack in attacks:
        if attack is None:
            raise InputError(
                "--certified: expected an attack, whose norm and ε give the ball, got none; "
                "give one: --attack fgsm:eps=8/255"
            )
        check_attack(attack, known)
    return known


def certified_entries(margins: Margins) -> dict[str, Any]:
    """What the bounds add to a measurement; nothing where none were asked for."""
    found = margins.certified
    if found is None:
        return {}
    return {
        "certified_by": found.method,
        "certified_reason": found.reason,
        "certified_accuracy": found.accuracy,
        "certified_margin": found.min,
        "certified_normalized_margin": None if found.rho is None else found.normalized_min,
        "certified_margin_width": float(margins.width.median()),
        "width_median": None
        if found.rho is None
        else _quantiles(margins)["width_quantiles"][LEVELS.index(0.5)],
    }


def save_certified(
    run: Run,
    model: nn.Module,
    data: Dataset,
    split: str,
    seed: int,
    found: Sequence[tuple[Attack | None, Margins]],
) -> Path | None:
    """Keep the sandwiches in the run directory as ``bounds.json``; None where there is no directory."""
    import marginflow as mf
    from marginflow.certified import fingerprint, save_bounds

    if run.path is None:
        return None
    clean = mf.adversarial_margins(model, data.x, data.y, normalize=False)
    content: Mapping[str, Any] = {
        "data": data.name,
        "split": split,
        "examples": data.n,
        "step": run.checkpoint().info.get("step"),
        "weights_sha256": fingerprint(model),
        "seed": seed,
        "clean_accuracy": clean.accuracy,
        "quantile_levels": list(LEVELS),
        "sandwiches": [
            {
                "attack": attack.spec,
                "p": "inf" if attack.p == float("inf") else attack.p,
                "eps": attack.eps,
                "adversarial_accuracy": margins.accuracy,
                "normalized_margin": None if margins.rho is None else margins.normalized_min,
                "margin": margins.min,
                **certified_entries(margins),
                **_quantiles(margins),
            }
            for attack, margins in found
            if attack is not None
        ],
    }
    return save_bounds(run.path, content)


def _quantiles(margins: Margins) -> dict[str, list[float]]:
    """At :data:`LEVELS`, of normalised margins, their bounds, and the widths between them."""
    if margins.certified is None or margins.rho is None:
        return {}
    import torch

    levels = torch.tensor(LEVELS, dtype=torch.float64)
    lists = {
        "margin_quantiles": margins.normalized,
        "certified_quantiles": margins.certified.normalized,
        "width_quantiles": margins.width / margins.rho,
    }
    return {name: torch.quantile(values, levels).tolist() for name, values in lists.items()}
