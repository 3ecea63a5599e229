"""``marginflow certify``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marginflow._checks import whole

if TYPE_CHECKING:
    from marginflow.kkt import Certificate

_ROWS = 8
_COST = (
    "solving for the KKT point beside the network; it takes seconds for a smooth\n"
    "network of 1000 weights, minutes for a ReLU network of 400 …"
)


def run_certification(
    path: Path,
    options: Mapping[str, Any],
    *,
    memory: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Certify the run's network, print what was found, and keep it in the run directory."""
    from marginflow.cli._options import use_threads
    from marginflow.cli._subject import own_parts
    from marginflow.kkt import certify_run

    use_threads(threads)
    if options["nearest"]:
        print(_COST, file=sys.stderr)
    rest = dict(options)
    data, network = own_parts(
        path, model=rest.pop("model"), data=rest.pop("data"), data_dir=rest["data_dir"]
    )
    found = certify_run(
        path, data, model=network, memory=whole("--memory", memory, least=1) * 2**20, **rest
    )
    written = found.save(path)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False, allow_nan=False))
        return

    from marginflow.cli._tables import print_table

    print(found.certificate, end="\n\n")
    rows = [
        [f"{tau:.4g}", f"{support}", f"{residual:.6f}" if residual > 1e-3 else f"{residual:.2e}"]
        for tau, support, residual in _thinned(found.certificate)
    ]
    print_table(["τ", "examples", "r(τ)"], rows)
    if found.nearest is not None:
        print(f"\n{found.nearest}")
    shown = len(found.shown)
    kept = f"the {shown} largest multipliers" if shown > 1 else "the one positive multiplier"
    print(f"\nwritten to {written},\nwith the inputs of {kept}")


def _thinned(found: Certificate) -> list[tuple[float, int, float]]:
    """At most nine points of the curve: where the support grows, the ends, and τ itself."""
    curve = found.curve
    points = list(
        zip(curve.taus.tolist(), curve.supports.tolist(), curve.residuals.tolist(), strict=True)
    )
    # The last point of each support: between them nothing changes.
    ends = [p for p, after in pairwise(points) if p[1] != after[1]] + points[-1:]
    few = len(ends) <= _ROWS
    even = {round(k * (len(ends) - 1) / (_ROWS - 1)) for k in range(_ROWS)}
    return [
        p for p in points if p[0] == found.tau or (p in ends and (few or ends.index(p) in even))
    ]
