"""Figure 1: adversarial training enlarges the normalised adversarial margin, standard training does not."""

from __future__ import annotations

import os
from pathlib import Path

from marginflow.runs import Run
from marginflow.workflow import train


def adversarial_and_standard(
    out: str | os.PathLike[str],
    *,
    data: str = "digits:3,8",
    model: str = "mlp:256,32",
    attack: str = "fgsm:eps=0.1",
    lr: float = 0.1,
    batch_size: int = 32,
    epochs: int = 1000,
    seed: int = 0,
    force: bool = False,
    progress: bool = False,
) -> tuple[Run, Run]:
    """Train the same network twice, from the same weights: against ``attack``, and without any.

    The defaults are Figure 1(a) at the size of the bundled digits (8×8 pixels in [0, 1]).
    Both are measured under ``attack``, so their margins compare (Figure 1). The runs
    lie in ``out/adversarial`` and ``out/standard``.

    Returns:
        the adversarial and the standard run.

    Raises:
        MarginflowError: whatever :func:`marginflow.train` raises.
    """
    runs = []
    for name, perturbation in (("adversarial", attack), ("standard", None)):
        runs.append(
            train(
                model,
                data,
                attack=perturbation,
                measure_with=attack,
                lr=lr,
                batch_size=batch_size,
                epochs=epochs,
                seed=seed,
                out=Path(out) / name,
                force=force,
                progress=progress,
            )
        )
    return runs[0], runs[1]
