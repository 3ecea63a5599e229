"""The wheel and the source distribution: all that belongs in them, and nothing else."""

from __future__ import annotations

import email.message
import email.parser
import hashlib
import importlib.metadata
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from distributions import ROOT, Built, call, version

pytestmark = pytest.mark.package


def tracked() -> set[str]:
    """The files of the project as git knows them: the oracle of what belongs in."""
    listed = call(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).stdout
    return {name for name in listed.splitlines() if (ROOT / name).is_file()}


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.parser.Parser().parsestr(archive.read(name).decode())


def test_the_source_distribution_is_the_project(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
    assert set(members) == tracked() | {"PKG-INFO"}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt"} <= set(members)
    assert any(name.startswith("tests/") for name in members)
    assert all(member.isfile() for member in members.values())
    # Pictures of the documentation are the largest; data sets have no place here.
    largest = max(members.values(), key=lambda member: member.size)
    assert largest.size < 2**20, largest.name
    assert built.sdist.stat().st_size < 6 * 2**20


def test_the_wheel_is_the_package(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    described = f"marginflow-{version()}.dist-info/"
    added = {n.removeprefix(described) for n in names if n.startswith(described)}
    assert added == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    code = {n for n in names if not n.startswith(described)}
    assert code == {n.removeprefix("src/") for n in tracked() if n.startswith("src/")}
    assert {"marginflow/py.typed", "marginflow/report/templates/report.html.j2"} <= code
    assert built.wheel.name.endswith("-py3-none-any.whl")


def test_the_tools_of_the_index_accept_both(built: Built) -> None:
    call([sys.executable, "-m", "twine", "check", "--strict", built.wheel, built.sdist], ROOT)
    call([Path(sys.executable).with_name("check-wheel-contents"), built.wheel], ROOT)


def test_the_same_source_gives_the_same_bytes(built: Built, tmp_path: Path) -> None:
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path], ROOT)
    for path in (built.wheel, built.sdist):
        again = tmp_path / path.name
        assert (
            hashlib.sha256(again.read_bytes()).digest()
            == hashlib.sha256(path.read_bytes()).digest()
        ), path.name


def test_the_metadata(built: Built) -> None:
    found = metadata_of(built.wheel)
    assert (found["Name"], found["Version"]) == ("marginflow", version())
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "MIT"
    assert found["Description-Content-Type"] == "text/markdown"
    classifiers = found.get_all("Classifier", [])
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    # The licence is said once, by License-Expression; pages of the project are not public.
    assert not [c for c in classifiers if c.startswith("License ::")]
    assert found.get_all("Project-URL") is None
    assert found["Home-page"] is None


def test_the_tools_are_those_of_the_tested_environments() -> None:
    here, base = (
        dict(
            re.findall(
                r"^([\w.-]+)==([^\s\\]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE
            )
        )
        for name in ("constraints-package.txt", "constraints.txt")
    )
    assert {n: here[n] for n in here if n in base} == {n: base[n] for n in here if n in base}
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    for name in ("build", "check-wheel-contents", "hatchling", "mypy", "pytest", "twine"):
        assert installed[name] == here[name]
