"""Write the SHA-256 sums of every pinned package into the constraints files (`make lock`).

The pins themselves are edited by hand: ``name==version``, one a line. uv asks the package index
for the sums of all files of those versions; comments and included files stay as they are.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

BY_HAND = "constraints-cpu.txt"  # a build that the package index does not have

FILES = tuple(sorted({path.name for path in ROOT.glob("constraints*.txt")} - {BY_HAND}))

PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s\\;]+)( *;[^\\]*)?", re.MULTILINE)
SUM = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def pins(text: str) -> list[str]:
    """The lines ``name==version`` of a constraints file, with their markers, without their sums."""
    return [match[0].strip() for match in PIN.finditer(text)]


def locked(text: str, sums: dict[str, list[str]]) -> str:
    """The content of a constraints file with the given sums.

    Args:
        text: the file, with other sums or with none.
        sums: of each pin.
    """
    lines = []
    for line in text.splitlines():
        if line.startswith(("    --hash=", "--hash=")):
            continue
        found = PIN.match(line)
        if found is None:
            lines.append(line)
            continue
        pin = found[0].strip()
        lines.append(" \\\n".join([pin, *(f"    --hash=sha256:{one}" for one in sums[pin])]))
    return "\n".join(lines) + "\n"


def sums_of(wanted: list[str]) -> dict[str, list[str]]:
    """The sums of all files of each pin, as the package index has them."""
    answer = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("uv")), "pip", "compile", "-", "--no-deps"),
            *("--generate-hashes", "--no-header", "--no-annotate", "--quiet"),
            *("--python-version", "3.13"),
        ],
        input="\n".join(wanted),
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        sys.exit(f"uv could not find the sums: {answer.stderr.strip()}")
    parts = re.split(r"\n(?=[A-Za-z0-9])", answer.stdout)
    found = {
        canonical(match[1], match[2]): SUM.findall(part)
        for part in parts
        if (match := PIN.match(part))
    }
    sums = {}
    for pin in wanted:
        name, version = pin.split(";")[0].strip().split("==")
        key = canonical(name, version)
        if not found.get(key):
            sys.exit(f"{pin}: the index has no sums of its files; is the version right?")
        sums[pin] = sorted(set(found[key]))
    return sums


def canonical(name: str, version: str) -> str:
    """``name==version`` with the name as the index spells it."""
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"


def main() -> None:
    """Lock the files that are named, by default all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", default=FILES, help="constraints files (default: all)")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a file would change"
    )
    options = parser.parse_args()
    stale = []
    for name in options.files:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        wanted = pins(text)
        new = locked(text, sums_of(wanted))
        print(f"{name}: {len(wanted)} packages, {len(SUM.findall(new))} sums")
        if new != text:
            stale.append(name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run make lock")


if __name__ == "__main__":
    main()
