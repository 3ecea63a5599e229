"""The Python blocks of the README and of the tour run, but for fewer epochs; no link leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/in-python.md", "docs/versions.md")
LINK = re.compile(r"""(?:\]\(|src=")([^)#\s"]+)""")


@pytest.mark.parametrize(
    ("page", "least", "printed"),
    [
        ("README.md", 2, ("Lemma 3",)),
        ("docs/in-python.md", 5, ("Homogeneity(", "Eq. 36 holds")),
    ],
)
def test_the_blocks_of_a_page_run(
    page: str, least: int, printed: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= least
    names: dict[str, object] = {}
    for block in blocks:
        exec(re.sub(r"epochs=\d+", "epochs=3", block), names)
    out = capsys.readouterr().out
    for words in printed:
        assert words in out


@pytest.mark.parametrize("page", PAGES)
def test_no_link_leads_nowhere(page: str) -> None:
    path = ROOT / page
    links = [link for link in LINK.findall(path.read_text(encoding="utf-8")) if "://" not in link]
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_table_compares_the_versions_that_are_tested() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pinned = (ROOT / "constraints-extras.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==([^\s\\]+)", pinned, re.MULTILINE))
    for name, package in (
        ("foolbox", "foolbox"),
        ("torchattacks", "torchattacks"),
        ("Adversarial Robustness Toolbox", "adversarial-robustness-toolbox"),
    ):
        assert f"{name} {pins[package]}" in " ".join(text.split())
