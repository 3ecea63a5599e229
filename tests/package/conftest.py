"""The files of the package, built once, and an environment that has nothing else.

These tests run in an environment of their own (`make package`), which has neither torch nor marginflow in it.
"""

from __future__ import annotations

import re
import sys

import pytest
from distributions import ROOT, Built, Environment, call


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The suite's own needs torch, which is not here."""


@pytest.fixture(scope="session")
def built() -> Built:
    """Both, in dist/: the wheel is made from the source distribution, so that one is enough."""
    folder = ROOT / "dist"
    for old in [*folder.glob("marginflow-*.whl"), *folder.glob("marginflow-*.tar.gz")]:
        old.unlink()
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder], ROOT)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="session")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel with what it needs, and not one package more."""
    root = tmp_path_factory.mktemp("environment")
    call([sys.executable, "-m", "venv", root / "venv"], root)
    programs = root / "venv" / "bin"
    folder = root / "elsewhere"
    folder.mkdir()
    # Without sums: with them pip takes nothing that is not listed, and the wheel is not. So what is
    # installed is what the wheel declares, in the versions that are tested.
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = root / "pins.txt"
    pins.write_text(
        "\n".join(re.findall(r"^[\w.-]+==[^\s\\]+", text, re.MULTILINE)), encoding="utf-8"
    )
    pinned = ["--constraint", pins]
    call([programs / "pip", "install", "--quiet", *pinned, "torch", built.wheel], folder)
    return Environment(programs, folder)
