"""What TAB offers in a real bash, and that the offered values are valid and none is missing."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import marginflow as mf
from marginflow.ascent._methods import _ELSEWHERE
from marginflow.attacks import _build as attack_names
from marginflow.certified import METHODS
from marginflow.cli._app import app
from marginflow.cli._completion import RUNS, VALUES, complete_values, run_directories
from marginflow.datasets import _NAMES
from marginflow.experiments import EXPERIMENTS, SCALES
from marginflow.losses import _LOSSES
from marginflow.models import _build as model_names

NEEDS_A_FILE = {"finite-set:", "npz:"}
FOREIGN = ("foolbox", "torchattacks", "art", "autoattack")


def offered(line: str, folder: Path) -> list[str]:
    """What bash completes the last word of ``line`` to, with the function that --show-completion prints."""
    words = shlex.split(line) + ([""] if line.endswith(" ") else [])
    programs = folder / ".programs"
    programs.mkdir(exist_ok=True)
    program = programs / "marginflow"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m marginflow "$@"\n')
    program.chmod(0o755)
    script = f"""
    {_script()}
    COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}
    _marginflow_completion marginflow
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.split()


def _script() -> str:
    from typer._completion_shared import get_completion_script

    return get_completion_script(
        prog_name="marginflow", complete_var="_MARGINFLOW_COMPLETE", shell="bash"
    )


def test_options_and_values_in_bash(tmp_path: Path) -> None:
    assert offered("marginflow rep", tmp_path) == ["report", "reproduce"]
    assert "--measure-with" in offered("marginflow train --m", tmp_path)
    assert offered("marginflow train --attack fg", tmp_path) == ["fgm:eps=1.5", "fgsm:eps=16/255"]
    assert offered("marginflow flow --method st", tmp_path) == ["stiff", "steps"]
    assert offered("marginflow maximize --method st", tmp_path) == ["steepest:norm=sign"]
    for run in ("runs/demo/fgsm", "runs/one", "notes"):
        (tmp_path / run).mkdir(parents=True)
    for run in ("runs/demo/fgsm", "runs/one"):
        (tmp_path / run / "run.json").write_text("{}")
    assert offered("marginflow report runs/d", tmp_path) == ["runs/demo/fgsm"]
    assert offered("marginflow compare runs/one ", tmp_path) == ["runs/demo/fgsm", "runs/one"]


def test_runs_are_not_sought_inside_runs_nor_too_far_down(tmp_path: Path) -> None:
    for run in ("a", "a/b", "x/y/z", "x/y/zz/too-far", ".hidden"):
        (tmp_path / run).mkdir(parents=True, exist_ok=True)
        (tmp_path / run / "run.json").write_text("{}")
    assert run_directories(f"{tmp_path}/") == [f"{tmp_path}/a", f"{tmp_path}/x/y/z"]
    assert run_directories(f"{tmp_path}/x/y/zz/t") == [f"{tmp_path}/x/y/zz/too-far"]
    assert run_directories(f"{tmp_path}/none/") == []


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("attack", set(attack_names._KINDS)),
        ("model", set(model_names._KINDS)),
        ("data", set(_NAMES)),
        ("loss", set(_LOSSES)),
        ("certified", set(METHODS)),
        ("scale", set(SCALES)),
        ("figures", {"all", "paper", "ours", *EXPERIMENTS}),
    ],
)
def test_no_kind_is_missing(name: str, kinds: set[str]) -> None:
    assert {value.partition(":")[0] for value in VALUES[name]} == kinds


def test_whole_specifications_are_valid() -> None:
    for attack in VALUES["attack"]:
        if attack not in NEEDS_A_FILE and not attack.startswith(FOREIGN):
            mf.attacks.build(attack)
    for model in VALUES["model"]:
        mf.models.build(model, input_shape=(1, 28, 28), outputs=1)
    for method in VALUES["maximize method"]:
        if method not in _ELSEWHERE:
            mf.ascent.build_method(method)
    for data in VALUES["data"]:
        if not data.startswith("mnist") and data not in NEEDS_A_FILE:
            mf.load(data)


def test_every_name_stands_for_a_parameter_of_a_command() -> None:
    commands = {
        c.name or c.callback.__name__: c.callback for c in app.registered_commands if c.callback
    }
    parameters = {n for function in commands.values() for n in function.__annotations__}
    plain = {name.partition(" ")[2] or name for name in VALUES}
    assert plain | set(RUNS) <= parameters
    assert {name.partition(" ")[0] for name in VALUES if " " in name} <= set(commands)


def test_a_parameter_without_a_list_is_left_to_the_shell() -> None:
    small = typer.Typer()

    @small.command()
    def act(out: str = "") -> None: ...

    complete_values(small)
    assert act.__annotations__ == {"out": str, "return": type(None)}
