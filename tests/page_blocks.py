"""The code of a documentation page: what can be run, and running it.

Run are all ```python blocks, and all ```bash and ```console blocks of `marginflow` commands, in their order,
with one namespace and one (temporary) directory for the page. In a console block with prompts, lines without
`$ ` are output. Two comments may stand before a block:

    <!-- not run: needs MNIST -->           it is left out; its commands must still be well-formed
    <!-- run with epochs=3 -->              it runs with every number of epochs replaced
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt

from marginflow.cli import main
from marginflow.cli._app import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SHELLS = ("bash", "console", "sh", "shell")
EPOCHS = re.compile(r"(epochs[= ])\d+")


@dataclass(frozen=True)
class Block:
    """A block of a page: its first line's number, its language, its text, the comment before it."""

    line: int
    language: str
    text: str
    comment: str = ""

    @property
    def skipped(self) -> bool:
        return self.comment.startswith("not run:")

    @property
    def epochs(self) -> str | None:
        found = re.fullmatch(r"run with epochs=(\d+)", self.comment)
        return found[1] if found else None

    @property
    def commands(self) -> list[str]:
        """The command lines of a block without a language or of a shell's, continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    @property
    def ours(self) -> list[str]:
        """Those of the commands that are marginflow's."""
        if self.language not in ("", *SHELLS):
            return []
        return [c for c in self.commands if c.startswith("marginflow ") and "…" not in c]

    @property
    def runnable(self) -> bool:
        if self.language == "python":
            return True
        return self.language in SHELLS and bool(self.ours)


def blocks_of(page: Path) -> list[Block]:
    """All blocks of code of a page, fenced or indented."""
    found, comment = [], ""
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            said = re.fullmatch(r"<!--\s*(.*?)\s*-->\s*", token.content, re.DOTALL)
            comment = said[1] if said else ""
            continue
        if token.type in ("fence", "code_block"):
            start = (token.map or [0])[0] + (token.type == "fence")
            language = token.info.strip().split()[0].lower() if token.info.strip() else ""
            found.append(Block(start, language, token.content, comment))
        comment = ""
    return found


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the blocks of ``page`` in ``folder``; return how many ran."""
    monkeypatch.chdir(folder)
    # Not what a page is about: how wide the reader's terminal is.
    monkeypatch.setenv("COLUMNS", "100")
    # A module, as a reader's script is one: dataclasses and pickle look theirs up.
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    ran = 0
    for block in blocks_of(page):
        if not block.runnable or block.skipped:
            continue
        place, text = f"{page.name}, line {block.line + 1}", block.text
        if block.epochs is not None:
            text = EPOCHS.sub(rf"\g<1>{block.epochs}", text)
        if block.language == "python":
            # Blank lines before it: a traceback shows the page's own lines. This file's own
            # `from __future__` is none of the page's.
            lines = "\n" * block.line + text
            exec(compile(lines, str(page), "exec", dont_inherit=True), vars(script))
        else:
            shown = Block(block.line, block.language, text)
            assert shown.ours == shown.commands, f"{place}: a block of marginflow commands only"
            for command in shown.ours:
                assert exit_code(command) == 0, f"{place}: {command}"
        ran += 1
    return ran


def exit_code(command: str) -> int:
    """What a command ends with, also where an option such as ``--version`` ends it early."""
    try:
        return main(arguments_of(command))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def arguments_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)[1:]


def check_command(command: str) -> None:
    """Raise the parser's error if the command or an option does not exist, or lacks a value."""
    arguments = arguments_of(command)
    if arguments == ["--version"]:
        return  # an option that ends the program while it is parsed
    group: Any = typer.main.get_command(app)
    with group.make_context("marginflow", arguments) as context:
        name, found, rest = group.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        found.make_context(name, rest, parent=context)
