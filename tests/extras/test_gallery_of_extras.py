"""The examples that need attack libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from gallery import EXTRAS, check_example

pytestmark = pytest.mark.extras


@pytest.mark.parametrize("name", sorted(EXTRAS))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    assert "marginflow" in check_example(name, "--out", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
