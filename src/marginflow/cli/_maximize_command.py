"""The options of ``marginflow maximize``; what it does is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from marginflow.cli._options import DATA, DATA_DIR, DEVICE, LOG, MODEL, THREADS


def maximize(
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    attack: Annotated[
        str | None, typer.Option(help="Perturbation whose margins are made large: fgsm:eps=16/255.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="spheres (default), polish, relative, loss-based, steepest:norm=sign; for one "
            "linear layer dual, normalized."
        ),
    ] = None,
    begin: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Begin with the weights of this run, and its settings where none are given.",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data (default 100); steps for dual.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per step (default: 80, or fewer of few data).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of weights and batches (default 0).")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="exponential, logistic or cross-entropy.")
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse data not separated at the start (no warm-up)."),
    ] = False,
    measure_with: Annotated[
        str | None, typer.Option(help="Attack that is measured; by default --attack.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default) or float64.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    engine: Annotated[str | None, typer.Option(help="auto (default), autograd or fused.")] = None,
    threads: Annotated[int | None, typer.Option(help=THREADS)] = None,
    data_dir: Annotated[Path | None, typer.Option(help=DATA_DIR)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory (default: a new one under runs/).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in --out.")] = False,
    log: Annotated[list[str] | None, typer.Option(help=LOG, metavar="<str>")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Seek the largest normalised adversarial margin itself, and keep the best network.

    To take a trained network further:
    marginflow maximize --from runs/fgsm --method polish --epochs 20
    """
    from marginflow.cli._maximize import run_maximization

    given = {
        "data": data,
        "model": model,
        "attack": attack,
        "method": method,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "loss": loss,
        "strict": strict or None,
        "measure_with": measure_with,
        "dtype": dtype,
        "device": device,
        "engine": engine,
        "threads": threads,
        "data_dir": data_dir,
        "out": out,
        "log": log or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    run_maximization(given, begin=begin, resume=resume, force=force, progress=not quiet)
