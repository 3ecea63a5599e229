"""`make audit` and `make lock`: what is not known is not cleared; sums are written where they belong."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SILENT = None, "ConnectionError: no route to host"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield {name: importlib.import_module(name) for name in ("audit", "lock")}
    for name in ("audit", "lock"):
        sys.modules.pop(name, None)


def report(tools: dict[str, ModuleType], file: str, **vulnerable: list[str]) -> dict[str, Any]:
    """pip-audit's report of a file in which each package is known."""
    wanted = tools["lock"].pins((ROOT / file).read_text(encoding="utf-8"))
    return {
        "dependencies": [
            {
                "name": name.lower(),
                "version": version,
                "vulns": [
                    {"id": one, "fix_versions": ["9.9"]} for one in vulnerable.get(name.lower(), [])
                ],
            }
            for name, version in (pin.split("==") for pin in wanted)
        ]
    }


def test_without_a_network_nothing_is_cleared_and_nothing_fails(
    tools: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = tools["audit"].audit("constraints-docs.txt", lambda *_: SILENT)
    assert found.missed == len(found.packages) > 30
    assert [line.partition(":")[0] for line in found.silent] == ["pypi", "osv"]
    monkeypatch.setattr(tools["audit"], "audit", lambda name: found)
    assert tools["audit"].main(["constraints-docs.txt"]) == 0
    printed = capsys.readouterr().out
    assert f"0 of {len(found.packages)} packages audited" in printed
    assert "no answer from osv: ConnectionError" in printed
    assert f"NOT AUDITED: {len(found.packages)} packages" in printed
    assert tools["audit"].main(["--strict", "constraints-docs.txt"]) == 2


def test_a_package_that_the_database_skips_is_not_audited(tools: dict[str, ModuleType]) -> None:
    said = report(tools, "constraints-docs.txt")
    said["dependencies"][0] = {"name": "babel", "skip_reason": "not found"}
    asked = []

    def ask(name: str, service: str) -> tuple[dict[str, Any] | None, str]:
        asked.append(service)
        return (said, "") if service == "pypi" else SILENT

    found = tools["audit"].audit("constraints-docs.txt", ask)
    assert found.missed == 1
    assert asked == ["pypi", "osv"]


def test_a_known_vulnerability_fails(
    tools: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = report(tools, "constraints-docs.txt", jinja2=["CVE-2099-1"])
    found = tools["audit"].audit("constraints-docs.txt", lambda *_: (said, ""))
    assert found.missed == 0
    assert not found.silent
    monkeypatch.setattr(tools["audit"], "audit", lambda name: found)
    assert tools["audit"].main(["constraints-docs.txt"]) == 1
    printed = capsys.readouterr().out
    assert "jinja2 3.1.6: CVE-2099-1 (mended in: 9.9)" in printed
    assert "NOT AUDITED" not in printed


def test_sums_are_replaced_and_nothing_else_is(tools: dict[str, ModuleType]) -> None:
    old, new = "0" * 64, "f" * 64
    text = (
        f"# why\n-r other.txt\nB==2 \\\n    --hash=sha256:{old} \\\n    --hash=sha256:{old}\na==1\n"
    )
    locked = tools["lock"].locked(text, {"B==2": [new], "a==1": [old, new]})
    assert locked == (
        f"# why\n-r other.txt\nB==2 \\\n    --hash=sha256:{new}\n"
        f"a==1 \\\n    --hash=sha256:{old} \\\n    --hash=sha256:{new}\n"
    )
    assert tools["lock"].pins(locked) == ["B==2", "a==1"]
    assert tools["lock"].locked(locked, {"B==2": [new], "a==1": [old, new]}) == locked
