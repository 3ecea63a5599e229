"""The tests against other people's libraries run only where `-m extras` asks for them.

`make test` has an environment without those libraries and deselects these tests; `make
test-extras` runs them, and there a missing library fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("markexpr"):
        return  # -m decides
    extras = [item for item in items if item.path.is_relative_to(_HERE)]
    items[:] = [item for item in items if not item.path.is_relative_to(_HERE)]
    config.hook.pytest_deselected(items=extras)
