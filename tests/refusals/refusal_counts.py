"""How many refusals are tested, by category: ``python tests/refusals/refusal_counts.py``."""

from __future__ import annotations

from refusal_calls import CALLS
from refusal_lines import LINES


def counts() -> dict[str, int]:
    """The number of entries of each category: command lines first, calls of the API then."""
    lines = {f"command line: {name}": len(entries) for name, entries in LINES.items()}
    calls = {f"API: {name}": len(entries) for name, entries in CALLS.items()}
    return lines | calls


if __name__ == "__main__":
    found = counts()
    for name, number in found.items():
        print(f"{number:4d}  {name}")
    print(f"{sum(found.values()):4d}  in all")
