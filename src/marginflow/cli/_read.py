"""``marginflow measure``, ``report`` and ``compare``: commands that read runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from marginflow._checks import choice
from marginflow.errors import InputError, NotHomogeneousError

if TYPE_CHECKING:
    from marginflow import Margins

_FORMATS = ("pdf", "png", "svg")
_FILES = (".html", *(f".{form}" for form in _FORMATS))


def run_measurement(
    path: Path,
    *,
    attacks: Sequence[str],
    model_spec: str | None,
    data_spec: str | None,
    data_dir: Path | None,
    split: str,
    batch_size: int,
    dtype: str | None,
    seed: int,
    threads: int | None,
    as_json: bool,
    certified: str | None = None,
) -> None:
    """Print the margins of the network in ``path`` under each attack."""
    import torch

    import marginflow as mf
    from marginflow.attacks import check_budget
    from marginflow.cli._certified import (
        LABELS,
        certified_entries,
        check_certified,
        save_certified,
    )
    from marginflow.cli._options import use_threads
    from marginflow.cli._subject import subject_of
    from marginflow.homogeneity import evaluation_mode

    choice("split", split, ("train", "test"))
    if dtype is not None:
        choice("dtype", dtype, ("float32", "float64"))
    use_threads(threads)
    given = [mf.attacks.build(spec) for spec in attacks]
    check_certified(certified, given)
    subject = subject_of(path, model=model_spec, data=data_spec, data_dir=data_dir)
    built = given or [mf.attacks.build(subject.attack)]
    method = check_certified(certified, built)
    data, model = subject.data, subject.model
    if split == "test":
        if data.test is None:
            raise InputError(
                f"the data set {data.name!r} has no test split; measure the split 'train'"
            )
        data = data.test
    for attack in built:
        check_budget(attack, data.shape, data.bounds)
    model.to(dtype=getattr(torch, dtype or subject.dtype))
    homogeneity, left_out = None, None
    try:
        with evaluation_mode(model):
            homogeneity = mf.measure_homogeneity(model, data.x)
    except NotHomogeneousError as error:
        left_out = str(error)
    results = []
    measured = []
    for attack in built:
        margins = mf.adversarial_margins(
            model,
            data.x,
            data.y,
            attack,
            batch_size=batch_size,
            loss=subject.loss,
            homogeneity=homogeneity,
            normalize=homogeneity is not None,
            seed=seed,
            certified=method,
        )
        measured.append((attack, margins))
        results.append(
            {
                "attack": "none" if attack is None else attack.spec,
                "examples": len(margins.values),
                "split": split,
                "accuracy": margins.accuracy,
                **_normalized(margins),
                "margin": margins.min,
                "margin_median": float(margins.values.median()),
                "norm_product": margins.rho,
                "dead_inputs": int(margins.dead_inputs.sum()),
                "log_loss": margins.log_loss,
                **certified_entries(margins),
                **({"left_out": left_out} if left_out else {}),
            }
        )
    written = method and save_certified(subject.run, model, data, split, seed, measured)
    if as_json:
        print(json.dumps(results, indent=2))
        return
    from marginflow.cli._tables import print_prose, print_table

    labels = {
        "attack": "attack",
        "accuracy": "accuracy",
        "normalized_margin": "γ̂_m = min m/ρ",
        "normalized_margin_median": "median m/ρ",
        "normalized_margin_by_total": "min m/‖W‖^K",
        "smoothed_margin": "ℓ/ρ",
        "margin": "min m",
        "margin_median": "median m",
        "norm_product": "ρ",
        "dead_inputs": "dead inputs",
        "log_loss": "ln L",
    } | (LABELS if method else {})
    rows = [
        [label, *(v if isinstance(v := r[key], str) else f"{v:.6g}" for r in results)]
        for key, label in labels.items()
        if all(r.get(key) is not None for r in results)
    ]
    print_table([f"{split}, n = {data.n}", *(f"({i})" for i in range(1, len(results) + 1))], rows)
    if left_out:
        print_prose(f"Left out, for there is no normalised margin: {left_out}.")
    for reason in dict.fromkeys(r.get("certified_reason") for r in results):
        if reason:
            print(f"bounds: {reason}")
    if written:
        print(f"written to {written}")


def _normalized(margins: Margins) -> dict[str, float]:
    """What only a homogeneous network has."""
    if margins.rho is None:
        return {}
    return {
        "normalized_margin": margins.normalized_min,
        "normalized_margin_median": float(margins.quantiles([0.5])),
        "normalized_margin_by_total": float(margins.normalized_by_total.min()),
        "smoothed_margin": margins.smoothed_normalized,
    }


def run_report(
    paths: Sequence[Path], *, out: Path | None, title: str | None, form: str | None
) -> None:
    """Write the page, and the figures beside it if ``form`` is given; say where they lie."""
    from marginflow.cli._tables import print_prose
    from marginflow.report import statement, write_panels, write_report
    from marginflow.runs import load_run, own_folder

    if form is not None:
        choice("--format", form, _FORMATS)
    runs = [load_run(path) for path in paths]
    target = out if out is not None else Path(paths[0]) / "report.html"
    page = write_report(runs, target, title=title)
    figures = []
    if form is not None:
        figures = write_panels(runs, own_folder(page.parent / "figures"), form)
    print_prose(statement(runs))
    print(f"The report lies in {page}.")
    if figures:
        print(f"{len(figures)} figures lie in {figures[0].parent}.")


def run_comparison(paths: Sequence[Path], *, out: Path | None, form: str | None) -> None:
    """Print the table; draw the figure, each panel, or the page if ``out`` is given."""
    from marginflow.cli._tables import print_prose, print_runs
    from marginflow.report import comparison, save_figure, statement, write_panels, write_report
    from marginflow.runs import load_run

    if len(paths) < 2:
        raise InputError("compare: expected at least two run directories, got one")
    if form is not None:
        choice("--format", form, _FORMATS)
        if out is None or out.suffix in _FILES:
            raise InputError(
                f"--out: expected a folder for the {form} files of --format, "
                f"got {'nothing' if out is None else repr(str(out))}"
            )
    runs = [load_run(path) for path in paths]
    if out is not None:
        if form is not None:
            write_panels(runs, out, form)
        elif out.suffix == ".html":
            write_report(runs, out)
        else:
            save_figure(comparison(runs), out)
    print_prose(statement(runs))
    print_runs(runs)
    if out is not None:
        print(f"drawn in {out}")
