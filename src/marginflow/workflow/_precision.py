"""What perturbations found in low precision do to the margins: measured once, at the end."""

from __future__ import annotations

import torch

from marginflow.datasets import Dataset
from marginflow.engine import Engine, FusedEngine
from marginflow.homogeneity import Homogeneity
from marginflow.losses import margins_of

_BATCH = 1024


def perturbation_effect(
    engine: Engine, data: Dataset, homogeneity: Homogeneity | None
) -> dict[str, float] | None:
    """The adversarial margins of ``data`` under δ in the training's precision and in the model's own.

    Returns:
        ``changed``: the share of coordinates of x + δ that differ by more than 1e-6;
        ``margin_…``: min_i m_i, over ρ where there is one; ``accuracy_…``: the share of m_i > 0;
        both with the ending ``bf16`` and ``float32``. None if there is but one precision. With
        a random start both begin at the same points.
    """
    if (
        not isinstance(engine, FusedEngine)
        or engine.attack is None
        or engine.perturbation_precision == "float32"
    ):
        return None
    exact = FusedEngine(
        engine.model, engine.loss, engine.attack, shape=data.shape, products=engine.products
    )
    rho = 1.0 if homogeneity is None else homogeneity.norm_product(engine.model)
    found: dict[str, list[torch.Tensor]] = {"bf16": [], "float32": []}
    changed = 0
    for start in range(0, data.n, _BATCH):
        x, y = data.x[start : start + _BATCH], data.y[start : start + _BATCH]
        inputs = []
        for name, each in (("bf16", engine), ("float32", exact)):
            generator = torch.Generator().manual_seed(start) if engine.attack.random else None
            inputs.append(each.perturbed(x, y, generator))
            with torch.no_grad():
                found[name].append(margins_of(engine.model(inputs[-1]), y, checked=True))
        changed += int(((inputs[0] - inputs[1]).abs() > 1e-6).sum())
    effect = {"changed": changed / data.x.numel()}
    for name, parts in found.items():
        margins = torch.cat(parts).double()
        effect[f"margin_{name}"] = float(margins.min()) / rho
        effect[f"accuracy_{name}"] = float((margins > 0).double().mean())
    return effect
