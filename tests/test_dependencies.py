"""What is imported is declared, what is declared is pinned with its sums, and each has its reason."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Import names that are not those of their distributions.
NAMES = {
    "art": "adversarial-robustness-toolbox",
    "auto_LiRPA": "auto-lirpa",
    "griffe": "griffelib",
    "markdown_it": "markdown-it-py",
    "sklearn": "scikit-learn",
}
# Its only release asks for torch < 1.13, which it does not need: an extra with it could not be installed.
UNDECLARABLE = {"auto-lirpa"}
# Run, not imported.
COMMANDS = {"ruff", "mypy", "import-linter", "pytest-xdist", "mkdocs-material", "mkdocstrings"}
WRITTEN_BY_TESTS = {"marginflow_sample", "mine_of_measure"}

PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s\\;]+)", re.MULTILINE)
CONSTRAINTS = sorted(path.name for path in ROOT.glob("constraints*.txt"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Distributions of pyproject.toml: the core's, and those of extras with all that they include."""
    optional = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])]
    names = set()
    for line in wanted:
        found = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", line)
        assert found
        if found[1] == "marginflow":
            names |= declared(*found[2].split(","))
        else:
            names.add(canonical(found[1]))
    return names


EVERYTHING = declared(*PROJECT["optional-dependencies"])


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Modules that code imports, by a statement or by name, and in which line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno
        elif isinstance(node, ast.Call) and node.args:
            function, first = node.func, node.args[0]
            name = (
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", "")
            )
            by_name = name in {
                "import_module",
                "optional",
                "importorskip",
                "find_spec",
                "__import__",
            }
            if by_name and isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value, node.lineno


def foreign(folder: str) -> dict[str, list[str]]:
    """Distributions of which the code of a folder imports something, and where."""
    root = ROOT / folder
    files = sorted(root.rglob("*.py"))
    # Modules beside the importing one, and marginflow's own.
    own = {path.stem for path in files} | {path.name for path in root.rglob("*") if path.is_dir()}
    own -= {"lightning"}  # marginflow.lightning is called like what it is for
    # Tests share helpers of their own, the fuzzing benchmark those of tests/hostile.
    own |= (
        {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"marginflow"} | WRITTEN_BY_TESTS
    )
    found: dict[str, list[str]] = {}
    for path in files:
        for module, line in imported(ast.parse(path.read_text(encoding="utf-8"))):
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in own:
                name = canonical(NAMES.get(top, top))
                found.setdefault(name, []).append(f"{path.relative_to(ROOT)}:{line}")
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("src", tuple(PROJECT["optional-dependencies"])),
        ("tests", ("dev", "attack-libraries", "integrations", "browser")),
        ("benchmarks", ("dev", "attack-libraries")),
        ("examples", ("attack-libraries", "integrations")),
        ("docs-site", ("docs",)),
        ("tools", ()),
    ],
)
def test_nothing_is_imported_that_is_not_declared(folder: str, extras: tuple[str, ...]) -> None:
    found = foreign(folder)
    assert {
        name: at for name, at in found.items() if name not in declared(*extras) | UNDECLARABLE
    } == {}


def test_the_scan_sees_imports_of_every_kind() -> None:
    code = """
import os.path, numpy.linalg as la
from yaml import load
def f():
    from . import sibling
    import pandas
    optional("mlflow", "mlflow", "x")
    importlib.import_module("foolbox.attacks")
"""
    names = [name for name, _ in imported(ast.parse(code))]
    assert sorted(names) == [
        "foolbox.attacks",
        "mlflow",
        "numpy.linalg",
        "os.path",
        "pandas",
        "yaml",
    ]


def test_the_core_imports_only_what_the_core_declares() -> None:
    # What a module imports at its top is needed by whoever imports it.
    found = set()
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            names = imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else ()
            found |= {name.partition(".")[0] for name, _ in names}
    found -= {*sys.stdlib_module_names, "marginflow"}
    assert {canonical(NAMES.get(name, name)) for name in found} <= declared()
    assert {"torch", "numpy", "typer", "safetensors"} <= found


def test_nothing_is_declared_that_is_not_used() -> None:
    folders = ("src", "tests", "benchmarks", "examples", "docs-site")
    used = {name for folder in folders for name in foreign(folder)} | COMMANDS
    assert EVERYTHING - used == set()
    assert {canonical(name) for name in COMMANDS} <= EVERYTHING


def pins(name: str) -> dict[str, str]:
    """Pins of a constraints file and of those that it includes."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = {canonical(name): version for name, version in PIN.findall(text)}
    for other in re.findall(r"^-r (\S+)$", text, re.MULTILINE):
        assert not found.keys() & pins(other).keys()
        found |= pins(other)
    return found


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_pin_has_the_sums_of_its_files(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=[^\s#])", "\n" + re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    blocks = [block.strip() for block in blocks if block.strip() and not block.startswith("-r ")]
    assert blocks
    for block in blocks:
        pin, *sums = block.split(" \\\n")
        assert PIN.match(pin), pin
        assert sums, f"{pin} has no sum; run make lock"
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", one) for one in sums), pin
        assert sums == sorted(set(sums)), pin


def test_what_is_declared_is_pinned() -> None:
    assert declared("dev") <= pins("constraints.txt").keys()
    assert declared("dev", "attack-libraries", "browser") <= pins("constraints-extras.txt").keys()
    assert declared("dev", "integrations") <= pins("constraints-integrations.txt").keys()
    assert (declared("docs") - declared() | {canonical("mkdocs")}) <= pins(
        "constraints-docs.txt"
    ).keys() | {"ruff"}
    assert {"build", "twine", "pip-audit", "uv", "hatchling"} <= pins(
        "constraints-package.txt"
    ).keys()


def test_what_the_files_share_agrees() -> None:
    """But for what torchattacks pins itself: an old requests, and what belongs to it."""
    old = {"requests", "idna", "urllib3", "chardet", "charset-normalizer"}
    base = pins("constraints.txt")
    assert {"torch", "numpy", "pytest", "mypy", "ruff"} <= base.keys()
    for name in (
        "constraints-extras.txt",
        "constraints-integrations.txt",
        "constraints-package.txt",
    ):
        here = pins(name)
        shared = (here.keys() & base.keys()) - old
        assert shared
        assert {one: here[one] for one in shared} == {one: base[one] for one in shared}, name


def test_pins_satisfy_the_ranges() -> None:
    from packaging.requirements import Requirement

    optional = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in optional for line in extra)]
    versions: dict[str, set[str]] = {}
    for name in CONSTRAINTS:
        for package, version in pins(name).items():
            versions.setdefault(package, set()).add(version)
    for requirement in map(Requirement, lines):
        if requirement.name != "marginflow":
            for version in versions[canonical(requirement.name)]:
                assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_the_environment_is_the_pinned_one() -> None:
    """Only what is pinned is installed: a package that crept in by hand would hide a missing declaration."""
    if "site-packages" in str(Path(importlib.util.find_spec("marginflow").origin)):  # type: ignore[union-attr,arg-type]
        pytest.fail("the tests run on an editable installation: make test")
    wanted = pins("constraints.txt")
    here = {
        canonical(one.metadata["Name"]): one.version.partition("+")[0]
        for one in importlib.metadata.distributions()
    }
    for name, version in wanted.items():
        if name in here:
            assert here[name] == version, f"{name} {here[name]} is installed, {version} pinned"


def table(heading: str) -> dict[str, str]:
    """First and last cell of each row of the table below a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {
        canonical(name.strip("`")): row[-1]
        for row in rows[1:]
        for name in re.findall(r"`([^`]+)`", row[0])
    }


def test_every_direct_dependency_has_its_reason() -> None:
    reasons = (
        table("What the library needs")
        | table("What it can use")
        | table("What builds and tests it")
    )
    assert EVERYTHING - reasons.keys() == set()
    assert {
        "auto-lirpa",
        "pip-audit",
        "uv",
        "build",
        "twine",
        "check-wheel-contents",
    } <= reasons.keys()
    assert declared() == table("What the library needs").keys()
    assert {name: reason for name, reason in reasons.items() if len(reason) < 10} == {}


def test_every_pinned_package_is_on_the_page() -> None:
    direct = (
        table("What the library needs")
        | table("What it can use")
        | table("What builds and tests it")
    )
    through = table("What comes with them")
    known: dict[str, Any] = direct | through
    everything = {name for file in CONSTRAINTS for name in pins(file)}
    assert everything - known.keys() == set()
    assert known.keys() - everything == set(), "no longer pinned"
    assert not direct.keys() & through.keys()


def test_what_comes_with_them_comes_with_those_that_are_named() -> None:
    through = table("What comes with them")
    checked = 0
    for name, asked_by in through.items():
        for parent in re.findall(r"`([^`]+)`", asked_by):
            try:
                lines = importlib.metadata.requires(parent) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # of another environment
            names = {canonical(re.match(r"[\w.-]+", line)[0]) for line in lines}  # type: ignore[index]
            assert name in names, f"{parent} does not ask for {name}"
            checked += 1
    assert checked > 20
