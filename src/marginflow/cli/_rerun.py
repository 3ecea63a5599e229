"""``marginflow rerun``: a run once more, and whether it comes out the same."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marginflow.cli._options import DATA_DIR, OWN_DATA, OWN_MODEL

if TYPE_CHECKING:
    from marginflow import Rerun


def rerun(
    run: Annotated[Path, typer.Argument(help="Run directory, or a folder of seeds.")],
    out: Annotated[
        Path | None, typer.Option(help="Keep the repetition in this directory (default: not kept).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Repeat the first epochs only.")] = None,
    within: Annotated[
        float,
        typer.Option(help="Relative differences up to this are none (default 0: to the bit)."),
    ] = 0.0,
    model: Annotated[str | None, typer.Option(help=OWN_MODEL)] = None,
    data: Annotated[str | None, typer.Option(help=OWN_DATA)] = None,
    begin: Annotated[
        Path | None, typer.Option("--from", help="The run that a maximisation began with.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help=DATA_DIR)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> int:
    """Repeat a run from its run.json, and compare every measurement and the weights.

    Settings, seed, threads and precision are the run's own. Exit code 0: the same, to
    the bit or --within; 1: different, and where first. Nothing that run.json names is
    executed: a model of your own has to be named here, with --model.
    """
    from marginflow._checks import real

    real("--within", within, least=0.0)
    folders = _folders(run)
    outs = [out] if out is None or len(folders) == 1 else [out / path.name for path in folders]
    results = []
    for path, place in zip(folders, outs * (len(folders) if out is None else 1), strict=True):
        results.append(
            (path, *_repeat(path, place, epochs, model, data, begin, data_dir, force, quiet))
        )
    same = all(result.largest <= within for _, result, _ in results)
    if as_json:
        print(json.dumps([_as_json(path, result) for path, result, _ in results], indent=2))
    else:
        from marginflow.cli._tables import print_prose

        for path, result, seconds in results:
            print_prose(f"{path}: repeated in {seconds:.1f} s")
            print(result)
            if result.measurements or result.weights:
                if result.largest <= within:
                    print(f"that is within {within:g}")
                elif out is None:
                    print("to look at the repetition, keep it: --out DIRECTORY")
    return 0 if same else 1


def _folders(run: Path) -> list[Path]:
    """The run, or those of the seeds in the folder, in their order."""
    if (run / "run.json").exists():
        return [run]
    seeds = [path for path in run.glob("seed-*") if (path / "run.json").exists()]
    return sorted(seeds, key=lambda path: (len(path.name), path.name)) or [run]


def _repeat(
    path: Path,
    out: Path | None,
    epochs: int | None,
    model: str | None,
    data: str | None,
    begin: Path | None,
    data_dir: Path | None,
    force: bool,
    quiet: bool,
) -> tuple[Rerun, float]:
    import marginflow as mf
    from marginflow.cli._subject import own_parts

    given, network = own_parts(path, model=model, data=data, data_dir=data_dir)
    started = time.monotonic()
    result = mf.rerun(
        path,
        out=out,
        epochs=epochs,
        model=network,
        data=given,
        start=begin,
        data_dir=data_dir,
        force=force,
        progress=not quiet,
    )
    return result, time.monotonic() - started


def _as_json(path: Path, result: Rerun) -> dict[str, Any]:
    return {
        "run": str(path),
        "identical": result.identical,
        "largest": None if result.largest == float("inf") else result.largest,
        "records": result.records,
        "step": result.step,
        "measurements": [_finite(dataclasses.asdict(d)) for d in result.measurements],
        "weights": [_finite(dataclasses.asdict(d)) for d in result.weights],
        "surroundings": result.surroundings,
        "notes": list(result.notes),
    }


def _finite(found: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: where only one of two values is a number, there is none."""
    return found | {"relative": None if found["relative"] == float("inf") else found["relative"]}
