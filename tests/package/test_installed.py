"""The wheel in an empty environment: the commands, the main job, and its types for other people's code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from distributions import Environment, call, version

pytestmark = pytest.mark.package

USER = """\
import marginflow as mf

data = mf.load("digits:3,8")
run = mf.train("mlp:8", data, attack=mf.attacks.FGSM(eps=0.1), epochs=1)
margin: float = run.final["normalized_margin"]
"""


def test_nothing_comes_from_the_source_tree(installed: Environment) -> None:
    place = installed("python", "-c", "import marginflow; print(marginflow.__file__)").strip()
    assert Path(place).is_relative_to(installed.programs.parent)


@pytest.mark.parametrize("line", ["marginflow --version", "python -m marginflow --version"])
def test_the_version(installed: Environment, line: str) -> None:
    assert installed(*line.split()) == f"marginflow {version()}\n"


def test_what_comes_with_it(installed: Environment) -> None:
    assert "No broken requirements found" in installed("pip", "check")
    names = {p["name"].lower() for p in json.loads(installed("pip", "list", "--format", "json"))}
    assert {"marginflow", "torch", "matplotlib", "typer"} <= names
    # What was not asked for does not come: no trackers, attack libraries or test runners.
    assert names.isdisjoint(
        {
            "cvxpy",
            "foolbox",
            "mlflow",
            "mypy",
            "pandas",
            "playwright",
            "pytest",
            "ray",
            "tensorboard",
        }
    )


def test_the_main_job(installed: Environment) -> None:
    job = "train --data digits:3,8 --model mlp:16 --attack fgsm:eps=0.1 --epochs 20 --batch-size 32"
    out = installed("marginflow", *job.split(), "--quiet", "--out", "runs/fgsm")
    assert "20 epochs in" in out
    verdicts = json.loads(installed("marginflow", "verify", "runs/fgsm", "--json"))
    assert "Lemma 3" in {verdict["statement"] for verdict in verdicts}
    out = installed("marginflow", "report", "runs/fgsm", "--format", "svg")
    assert "The report lies in" in out
    page = (installed.folder / "runs/fgsm/report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "Lemma 3" in page
    assert list((installed.folder / "runs/fgsm/figures").glob("*.svg"))


def test_its_types_reach_the_code_that_uses_it(installed: Environment, tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(USER, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(USER.replace("eps=0.1", 'eps="0.1"'), encoding="utf-8")
    check = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"]
    against = ["--python-executable", installed.programs / "python"]
    checked = call([*check, *against, "right.py", "wrong.py"], tmp_path, expect=1)
    assert checked.stdout.splitlines() == [
        'wrong.py:4: error: Argument "eps" to "FGSM" has incompatible type "str"; expected "float"'
        "  [arg-type]"
    ]


def test_a_missing_extra_says_how_to_get_it(installed: Environment) -> None:
    job = "train --data digits:3,8 --model mlp:4 --log tensorboard --out runs/logged"
    command = [installed.programs / "marginflow", *job.split()]
    done = call(command, installed.folder, expect=2)
    assert "pip install 'marginflow[tensorboard]'" in done.stderr
    assert not (installed.folder / "runs/logged").exists()
