"""Bad input over the command line and in Python: each refused with its message, nothing written.

``python tests/refusals/refusal_counts.py`` prints the number of entries by category.
"""

from __future__ import annotations

import inspect
import io
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import typer
from refusal_calls import CALLS
from refusal_counts import counts
from refusal_helpers import Call
from refusal_lines import LINES
from refusal_words import Line

import marginflow as mf
from marginflow.cli import main
from marginflow.cli._app import app
from marginflow.errors import MarginflowError

Guard = Callable[[], AbstractContextManager[None]]


LINE_ENTRIES = [pytest.param(entry, id=entry.id) for entries in LINES.values() for entry in entries]
CALL_ENTRIES = [pytest.param(entry, id=entry.id) for entries in CALLS.values() for entry in entries]


@pytest.mark.parametrize("line", LINE_ENTRIES)
def test_a_bad_command_is_refused(
    line: Line, unharmed: Guard, capsys: pytest.CaptureFixture[str]
) -> None:
    with unharmed():
        code = main(line.arguments)
    out, err = capsys.readouterr()
    assert code == 2, out + err
    assert re.search(line.says, err, re.DOTALL), err
    assert re.search(r"^error: \S", err, re.MULTILINE), err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("call", CALL_ENTRIES)
def test_a_bad_call_is_refused(call: Call, unharmed: Guard) -> None:
    with unharmed(), pytest.raises(MarginflowError) as raised:
        call.call()
    assert isinstance(raised.value, call.error), repr(raised.value)
    text = str(raised.value)
    assert re.search(call.says, text, re.DOTALL), text
    # An option of the command line is named beside its name in Python only.
    for option in re.findall(r"--([a-z-]+)", text):
        said = text.replace(f"--{option}", "")
        assert re.search(rf"\b{option.replace('-', '_')}\b", said), text


def test_every_entry_has_a_name_of_its_own_and_there_are_enough() -> None:
    for table in (LINES, CALLS):
        names = [entry.id for entries in table.values() for entry in entries]
        assert len(set(names)) == len(names)
    total = sum(counts().values())
    assert total >= 400, total


def test_every_public_function_is_called_wrongly() -> None:
    text = "".join(p.read_text() for p in Path(__file__).parent.glob("refusal_*.py"))
    functions = [n for n in mf.__all__ if inspect.isfunction(getattr(mf, n))]
    functions += ["Dataset", "Monitor"]
    missing = [n for n in functions if f"mf.{n}(" not in text]
    assert not missing


FREE = {"title", "address", "help", "version", "install-completion", "show-completion"}
"""Options that take any text, or none."""


def test_every_option_with_a_value_is_given_a_wrong_one() -> None:
    given = [line.arguments for lines in LINES.values() for line in lines]
    group = typer.main.get_command(app)
    missing = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        used = {word for words in given if words and words[0] == name for word in words}
        assert used, name
        for parameter in command.params:
            option = parameter.opts[0]
            if parameter.param_type_name == "option" and not parameter.is_flag:
                everywhere = {word for words in given for word in words}
                if option not in everywhere and option.strip("-") not in FREE:
                    missing.append(f"{name} {option}")
    assert not missing


WORKING = {
    "out": ["train", "--data", "separable:n=8,d=3", "--model", "mlp:2", "--epochs", "1", "--quiet",
            "--out", "with blanks/new run 😀"],
    "npz": ["train", "--data", "npz:with blanks/good data.npz", "--model", "mlp:2", "--epochs", "1",
            "--quiet", "--out", "with blanks/of a file"],
    "home": ["train", "--data", "npz:~/mine.npz", "--model", "mlp:2", "--epochs", "1", "--quiet",
             "--out", "with blanks/of home"],
    "blanks-in-a-specification": ["train", "--data", " separable: n=8, d = 3 ", "--model", " mlp: 2",
                                  "--attack", "fgsm: eps = 1/255", "--epochs", "1", "--quiet",
                                  "--out", "with blanks/spec"],
    "weights": ["measure", "with blanks/my weights.pt", "--model", "mlp:4", "--data",
                "npz:with blanks/good data.npz"],
    "measure": ["measure", "with blanks/a run é 😀"],
    "verify": ["verify", "with blanks/a run é 😀"],
    "report": ["report", "with blanks/a run é 😀", "--out", "with blanks/the page.html"],
    "export": ["export", "with blanks/a run é 😀", "--csv", "with blanks/the table.csv"],
    "resume": ["train", "--resume", "--out", "with blanks/a run é 😀", "--epochs", "3", "--quiet"],
}  # fmt: skip


def test_paths_with_blanks_work(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copied = tmp_path / "a copy of it"
    (copied / "with blanks").parent.mkdir()
    shutil.copytree(world / "work" / "with blanks", copied / "with blanks")
    home = tmp_path / "my home"
    home.mkdir()
    shutil.copy(world / "work" / "good.npz", home / "mine.npz")
    monkeypatch.chdir(copied)
    monkeypatch.setenv("HOME", str(home))
    for name, words in WORKING.items():
        code = main(words)
        said = capsys.readouterr()
        assert code in ((0, 1) if name == "verify" else (0,)), (name, said.err)
    written = {path.name for path in (copied / "with blanks").iterdir()}
    assert {
        "new run 😀",
        "of a file",
        "of home",
        "spec",
        "the page.html",
        "the table.csv",
    } <= written


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "name",
    ["attack-unknown", "mnist-nowhere", "figure-unknown", "resume-other-method", "plan-name"],
)
def test_errors_on_a_terminal_break_at_80_columns(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    (line,) = (entry for lines in LINES.values() for entry in lines if entry.id == name)
    assert main(line.arguments) == 2
    rows = terminal.getvalue().splitlines()
    assert len(rows) > 1
    assert all(len(row) <= 80 or " " not in row for row in rows), rows


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    names = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for words in ([], *([name] for name in names)):
        assert main([*words, "--help"]) == 0
        text = capsys.readouterr().out
        assert "Usage:" in text
        assert max(map(len, text.splitlines())) <= 80, words
    assert isinstance(names, list)
    assert len(names) >= 12
