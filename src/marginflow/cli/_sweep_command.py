"""The options of ``marginflow sweep``; what it does is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sweep(
    file: Annotated[Path, typer.Argument(help="TOML file that names the options and the grid.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep (default: as the file says).")
    ] = None,
    executor: Annotated[
        str,
        typer.Option(help="ray, processes (this machine), or auto: ray where it is installed."),
    ] = "auto",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; auto for the one of this machine.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Trials at a time (default: as the cores allow).")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the sweep in --out; try again what failed."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the sweep in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list the trials; write nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for each trial.")] = False,
) -> None:
    """Carry out a run for every choice of options in a file; compare them.

    The file, for 2 x 2 trainings:

    \b
      \\[options]
      data = "digits:3,8"
      attack = "fgsm:eps={eps}"
      epochs = 100
      \\[grid]
      model = ["mlp:64", "mlp:256"]
      eps = [0.05, 0.1]

    Every trial is a run in OUT/trials; OUT/report.html and results.csv compare
    them. Exit code 1 if a trial failed in the end; the others are kept.
    """  # noqa: D301
    from marginflow.cli._sweep import run_sweep

    raise typer.Exit(
        run_sweep(
            file,
            out=out,
            executor=executor,
            address=address,
            jobs=jobs,
            resume=resume,
            force=force,
            dry_run=dry_run,
            progress=not quiet,
        )
    )
