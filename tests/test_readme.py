"""The README's Python blocks run as they stand, but for fewer epochs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) >= 2
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(re.sub(r"epochs=\d+", "epochs=3", block), names)
    out = capsys.readouterr().out
    assert "Homogeneity(" in out
    assert "Eq. 36 holds" in out
