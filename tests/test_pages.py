"""The code of the documentation runs: each page as it stands, from its first block to its last.

See page_blocks.py for what is run. A page that needs other people's libraries has a test where these are.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from page_blocks import DOCS, ROOT, blocks_of, check_command, run_page

PAGES = {page.relative_to(DOCS).as_posix(): page for page in sorted(DOCS.rglob("*.md"))}
WITH_CODE = [name for name, page in PAGES.items() if any(b.runnable for b in blocks_of(page))]

# Run by another test, which also looks at what they print.
ELSEWHERE = {
    "attack-libraries.md": "extras/test_attack_libraries_page.py",
    "howto/sweep.md": "sweeps/test_sweep_page.py",
    "in-python.md": "test_readme.py",
    "in-your-project.md": "test_guide.py",
    "logging.md": "integrations/test_logging_page.py",
}

# Blocks with the comment `not run: why`, by page: to be few.
NOT_RUN: dict[str, int] = {}


@pytest.mark.parametrize("name", [name for name in WITH_CODE if name not in ELSEWHERE])
def test_the_code_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = sum(block.runnable and not block.skipped for block in blocks_of(PAGES[name]))
    assert run_page(PAGES[name], tmp_path, monkeypatch) == wanted


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_page_that_needs_more_has_a_test_of_its_own(name: str) -> None:
    assert name in WITH_CODE
    assert name in (ROOT / "tests" / ELSEWHERE[name]).read_text(encoding="utf-8")


def test_few_blocks_are_left_out() -> None:
    found = {
        name: count
        for name, page in PAGES.items()
        if (count := sum(block.skipped for block in blocks_of(page)))
    }
    assert found == NOT_RUN


@pytest.mark.parametrize("name", [*PAGES, "../README.md"])
def test_the_commands_of_a_page_exist(name: str) -> None:
    """Those that are not run, too: the command, its options, as many values as these take."""
    for block in blocks_of((DOCS / name).resolve()):
        for command in block.ours:
            try:
                check_command(command)
            except Exception as error:
                message = getattr(error, "format_message", lambda error=error: repr(error))()
                pytest.fail(f"{name}, line {block.line + 1}: {command}\n{message}")


def test_a_fence_says_what_it_is() -> None:
    """A block whose language is not known here would run nowhere, unseen."""
    known = {"", "python", "bash", "console", "sh", "text", "toml", "json", "yaml"}
    odd = [
        f"{name}, line {block.line}: {block.language}"
        for name, page in PAGES.items()
        for block in blocks_of(page)
        if block.language not in known
    ]
    assert odd == []


def test_a_block_that_fails_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nvalue = 2\n```\n\n<!-- not run: why -->\n```python\nvalue = 3\n```\n\n"
        "```python\nassert value == 3\n```\n",
        encoding="utf-8",
    )
    assert [block.skipped for block in blocks_of(page)] == [False, True, False]
    with pytest.raises(AssertionError):
        run_page(page, tmp_path, monkeypatch)


def test_a_command_that_fails_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ marginflow report runs/none\nsome output\n```\n", "utf-8")
    with pytest.raises(AssertionError, match=r"page\.md, line 2: marginflow report runs/none"):
        run_page(page, tmp_path, monkeypatch)
    page.write_text("```bash\npip install x\nmarginflow report runs/none\n```\n", "utf-8")
    with pytest.raises(AssertionError, match="a block of marginflow commands only"):
        run_page(page, tmp_path, monkeypatch)
    with pytest.raises(Exception, match="epcohs") as caught:
        check_command("marginflow train --data digits --epcohs 3")
    assert hasattr(caught.value, "format_message")


def test_epochs_are_replaced_where_a_page_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- run with epochs=3 -->\n\n```python\nprint(dict(epochs=300))\n```\n", "utf-8"
    )
    run_page(page, tmp_path, monkeypatch)
    assert capsys.readouterr().out == "{'epochs': 3}\n"


def test_a_page_has_its_own_future_and_may_ask_for_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\ndef f(x: int) -> int: ...\nassert f.__annotations__['x'] is int\n```\n\n"
        "```bash\nmarginflow --version\n```\n"
    )
    assert run_page(page, tmp_path, monkeypatch) == 2
