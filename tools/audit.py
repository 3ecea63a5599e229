"""Ask the advisory databases about every pinned package (`make audit`).

pip-audit does the asking. A database that cannot be reached, or does not know a package, clears
nothing: such packages are counted as not audited. The exit code is 0 all the same, so that a
machine without a network can run this.
Exit code 1: a known vulnerability. Exit code 2, with --strict: something was not audited.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lock import FILES, ROOT, canonical, pins

SERVICES = ("pypi", "osv")
PATIENCE = 15  # seconds for an answer of a database; pip-audit's own


@dataclass
class Audit:
    """What the databases said of one constraints file."""

    name: str
    packages: set[str]
    audited: set[str] = field(default_factory=set)
    known: list[str] = field(default_factory=list)  # vulnerabilities, as text
    silent: list[str] = field(default_factory=list)  # databases that did not answer, and why

    @property
    def missed(self) -> int:
        """Packages that no database could say anything about."""
        return len(self.packages - self.audited)


def ask(name: str, service: str) -> tuple[dict[str, Any] | None, str]:
    """pip-audit's JSON report of one constraints file, or None and the reason why there is none."""
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / name)),
            *("--disable-pip", "--require-hashes", "--vulnerability-service", service),
            *("--format", "json", "--progress-spinner", "off", "--timeout", str(PATIENCE)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return json.loads(answer.stdout), ""
    except ValueError:
        lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        return None, textwrap.shorten(lines[-1], 76, placeholder=" …")


def audit(name: str, ask: Callable[[str, str], tuple[dict[str, Any] | None, str]] = ask) -> Audit:
    """Ask the databases about ``name``, one after another until each package is known to one."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = Audit(name, {canonical(*pin.split(";")[0].strip().split("==")) for pin in pins(text)})
    for service in SERVICES:
        if not found.missed:
            break
        report, reason = ask(name, service)
        if report is None:
            found.silent.append(f"{service}: {reason}")
            continue
        for package in report["dependencies"]:
            if "version" not in package:  # skipped
                continue
            found.audited.add(canonical(package["name"], package["version"]))
            for one in package["vulns"]:
                mended = ", ".join(one["fix_versions"]) or "none"
                line = f"{package['name']} {package['version']}: {one['id']} (mended in: {mended})"
                if line not in found.known:
                    found.known.append(line)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit the files that are named, by default all; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", default=FILES, help="constraints files (default: all)")
    parser.add_argument("--strict", action="store_true", help="exit 2 if anything was not audited")
    options = parser.parse_args(arguments)
    results = [audit(name) for name in options.files]
    for result in results:
        print(
            f"{result.name}: {len(result.packages) - result.missed} of {len(result.packages)} "
            f"packages audited, {len(result.known)} known vulnerabilities"
        )
        for line in result.known:
            print(f"  {line}")
        for line in result.silent:
            print(f"  no answer from {line}")
    missed = sum(result.missed for result in results)
    if missed:
        print(
            f"NOT AUDITED: {missed} packages; the databases could not be asked or do not know them"
        )
    if any(result.known for result in results):
        return 1
    return 2 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
