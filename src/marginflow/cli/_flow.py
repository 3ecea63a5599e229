"""``marginflow flow``."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marginflow.cli._options import take_log, use_threads
from marginflow.cli._train import free_name, stored_options
from marginflow.errors import InputError

_STORED = (
    "data", "attack", "loss", "derivative", "log_time", "log_norm", "loss_below", "method", "rtol",
    "schedule", "patience", "max_evaluations", "keep_weights", "seed",
)  # fmt: skip
_GOALS = ("log_time", "log_norm", "loss_below")


def run_flow(given: Mapping[str, Any], *, resume: bool, force: bool, progress: bool) -> int:
    """Follow a flow as ``given`` says; 0 if it reached its goal, 1 if it ended before."""
    options = dict(given)
    log = take_log(options, Path(options["out"]) if resume and "out" in options else None)
    if resume:
        if "out" not in options:
            raise InputError("--resume needs --out RUN, the run directory to continue")
        stored = stored_options(Path(options["out"]), "flow", _STORED)
        if any(name in options for name in _GOALS):
            stored |= dict.fromkeys(_GOALS)
        options = {**stored, **options}
    for name, example in [("data", "separable:n=20,d=10,margin=0.22"), ("model", "deep-linear:16")]:
        if name not in options:
            raise InputError(f"--{name} is missing; for example --{name} {example}")

    import marginflow as mf

    logging.getLogger("marginflow").setLevel(logging.WARNING)
    use_threads(options.pop("threads", None))
    data = mf.load(options.pop("data"), data_dir=options.pop("data_dir", None))
    if "out" not in options:
        options["out"] = free_name(data.name, "flow")
    started = time.monotonic()
    try:
        flow = mf.gradient_flow(
            options.pop("model"),
            data,
            **options,
            resume=resume,
            force=force,
            progress=progress,
            log=log,
        )
    except KeyboardInterrupt:
        if (Path(options["out"]) / "checkpoints").is_dir():
            print(
                "\nthe last measurement is kept; continue with: marginflow flow --resume "
                f"--out {options['out']}",
                file=sys.stderr,
            )
        raise
    print(flow)
    print(f"{time.monotonic() - started:.1f} s; the run is in {flow.run.path}")
    from marginflow.cli._tables import print_runs

    print_runs([flow.run])
    print(f"next: marginflow verify {flow.run.path}")
    return 0 if flow.reached else 1
