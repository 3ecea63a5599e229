"""Every example runs as a user would run it, without a warning, and checks itself.

Those that need other people's libraries run in the environments that have these: see tests/integrations and
tests/extras. Here they run without, and say what to install.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gallery import EXTRAS, FOLDER, INTEGRATIONS, ORDINARY, check_example, run_example

OPTIONAL = INTEGRATIONS | EXTRAS


def test_every_example_is_on_exactly_one_list() -> None:
    listed = [*ORDINARY, *INTEGRATIONS, *EXTRAS]
    assert sorted(listed) == sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", ORDINARY)
def test_an_example_runs(name: str) -> None:
    check_example(name)


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_an_example_without_its_library_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    module, command = OPTIONAL[name]
    for hidden in {module, module.replace("lightning", "pytorch_lightning")}:
        # Stands for an environment without it, wherever this test runs.
        missing = f"raise ModuleNotFoundError('no {hidden}', name={hidden!r})\n"
        (tmp_path / f"{hidden}.py").write_text(missing, encoding="utf-8")
    out = tmp_path / "out"
    done = run_example(name, "--out", str(out), first=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.rstrip().endswith(command)
    assert not done.stdout
    assert not out.exists()


@pytest.mark.parametrize("name", sorted({*ORDINARY, *OPTIONAL}))
def test_an_example_can_be_read_in_one_go(name: str) -> None:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert any(f"python examples/{name}" in line for line in lines[:20])
