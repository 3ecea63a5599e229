"""``marginflow demo``: the main job on the bundled digits."""

from __future__ import annotations

import sys
import time
from pathlib import Path


def run_demo(out: Path, *, seed: int, force: bool, progress: bool) -> None:
    """Train both networks, write the report, print the answer."""
    import torch

    from marginflow.cli._tables import print_prose
    from marginflow.experiments import adversarial_and_standard
    from marginflow.report import comparison, save_figure, statement, write_report

    # The networks are tiny: a second thread costs more than it brings.
    torch.set_num_threads(1)
    started = time.monotonic()
    if progress:
        print("training against FGSM, then without an attack, 1000 epochs each", file=sys.stderr)
    runs = adversarial_and_standard(out, seed=seed, force=force, progress=progress)
    page = write_report(runs, out / "report.html")
    save_figure(comparison(runs), out / "margins.png")
    print_prose(statement(runs))
    print(f"The report lies in {page} ({time.monotonic() - started:.0f} s).")
