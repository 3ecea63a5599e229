"""``marginflow verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def run_verification(
    path: Path,
    *,
    attack: str | None,
    model: str | None,
    data: str | None,
    data_dir: Path | None,
    as_json: bool,
) -> int:
    """Print the audit and the table of verdicts, write both as JSON; 1 if a statement fails, else 0."""
    from marginflow.attacks import build
    from marginflow.cli._subject import own_parts
    from marginflow.runs import load_run, write_atomically
    from marginflow.theorems import audit

    run = load_run(path)
    own, network = own_parts(path, model=model, data=data, data_dir=data_dir)
    found = audit(run, own, attack=build(attack), model=network, data_dir=data_dir)
    verdicts = found.verdicts
    content = json.dumps([v.as_dict() for v in verdicts], indent=2, ensure_ascii=False)
    write_atomically(path / "verdicts.json", content + "\n")
    hypotheses = json.dumps(found.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path / "audit.json", hypotheses + "\n")
    failed = [v.statement for v in verdicts if v.outcome == "fails"]
    if as_json:
        print(content)
        return 1 if failed else 0

    print(found, end="\n\n")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {
        "holds": "green",
        "fails": "bold red",
        "does not apply": "dim",
        "not reached": "yellow",
    }
    table = Table(box=None, pad_edge=False, header_style="bold", title=None, padding=(0, 2, 1, 0))
    table.add_column("statement", overflow="fold", min_width=12, max_width=16)
    table.add_column("verdict", overflow="fold", min_width=8, max_width=9)
    table.add_column("measured, against the prediction", overflow="fold")
    for v in verdicts:
        lines = [v.measured]
        if v.outcome != "does not apply":
            lines.append(f"  of: {v.quantity}")
            lines.append(f"  predicted: {v.prediction} (tolerance {v.tolerance})")
            lines += [
                f"  although not met: {h.name}" + (f" ({h.detail})" if h.detail else "")
                for h in v.hypotheses
                if h.met is False
            ]
        if v.advice:
            lines.append(f"  advice: {v.advice}")
        # As text: what comes from files may look like the markup of rich.
        table.add_row(v.statement, Text(v.outcome, style=styles[v.outcome]), "\n".join(lines))
    console = Console(file=sys.stdout, highlight=False, markup=False)
    console.print(table)
    counts = {o: sum(v.outcome == o for v in verdicts) for o in styles}
    print(", ".join(f"{n} {o}" for o, n in counts.items() if n))
    if failed:
        print(f"failed: {', '.join(failed)}")
    print(f"written to {path / 'verdicts.json'}, and the hypotheses to audit.json")
    return 1 if failed else 0
