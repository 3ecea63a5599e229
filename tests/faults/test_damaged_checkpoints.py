"""Checkpoints cut, lost, swapped and forged: noticed, said, and the run goes on from the one before."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_runs import JOBS, bits, content, made
from safetensors.torch import load, save

from marginflow.cli import main
from marginflow.errors import RunError
from marginflow.runs import RunDirectory

Capture = pytest.CaptureFixture[str]
Log = pytest.LogCaptureFixture


@pytest.fixture(scope="module", params=JOBS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(request.param, tmp_path_factory.mktemp("runs") / request.param)


def copied(whole: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A copy, and its two checkpoints' tensors, newest first."""
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    found = sorted((run / "checkpoints").glob("*.safetensors"), reverse=True)
    assert len(found) == 2
    return run, found


def test_cut_anywhere_and_resumed(whole: Path, tmp_path: Path, caplog: Log) -> None:
    expected = bits(whole)
    for suffix in (".safetensors", ".json"):
        length = len(max((whole / "checkpoints").glob(f"*{suffix}")).read_bytes())
        for cut in (0, 1, 7, 8, 9, length // 3, length // 2, length - 2):
            run, (newest, _) = copied(whole, tmp_path)
            path = newest.with_suffix(suffix)
            path.write_bytes(path.read_bytes()[:cut])
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="marginflow"):
                made(whole.name, run, "--resume")
            assert f"the checkpoint {newest.name} is damaged" in caplog.text
            assert caplog.text.count("is damaged") == 1
            assert "using the checkpoint before it" in caplog.text
            assert bits(run) == expected, (suffix, cut)


def test_a_side_file_cut_at_every_length(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    for step in (1, 2):
        run.save_checkpoint({"model.w": torch.full((3,), float(step))}, {"step": step})
    run.close()
    side = run.path / "checkpoints" / "step-00000002.json"
    text = side.read_bytes()
    for cut in range(len(text) - 1):  # all but the newline
        side.write_bytes(text[:cut])
        found = run.latest_checkpoint()
        assert found is not None
        assert found.info["step"] == 1


def test_both_damaged_is_an_error_and_nothing_is_removed(
    whole: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, paths = copied(whole, tmp_path)
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    before = content(run)
    capsys.readouterr()
    assert main([*JOBS[whole.name], "--out", str(run), "--resume"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"no checkpoint of {str(run)!r} is whole" in error
    assert all(path.name in error for path in paths)
    assert "put back a copy of the directory, or train anew with --force" in error
    assert content(run) == before
    made(whole.name, run, "--force")
    assert bits(run) == bits(whole)


@pytest.mark.parametrize("lost", [1, 2])
def test_deleted_ones_are_made_again(whole: Path, lost: int, tmp_path: Path, caplog: Log) -> None:
    run, paths = copied(whole, tmp_path)
    for path in paths[:lost]:
        path.unlink()
        path.with_suffix(".json").unlink()
    with caplog.at_level(logging.WARNING, logger="marginflow"):
        made(whole.name, run, "--resume")
    assert ("it begins at step 0, and they are made again" in caplog.text) is (lost == 2)
    assert bits(run) == bits(whole)


def test_the_side_file_of_another(whole: Path, tmp_path: Path, caplog: Log) -> None:
    run, (newest, older) = copied(whole, tmp_path)
    shutil.copy(older.with_suffix(".json"), newest.with_suffix(".json"))
    with caplog.at_level(logging.WARNING, logger="marginflow"):
        made(whole.name, run, "--resume")
    if newest.read_bytes() != older.read_bytes():
        assert f"{newest.name} is damaged (its hash is another)" in caplog.text
    assert bits(run) == bits(whole)


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def _model(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: change(v) if n.startswith("model.") else v for n, v in tensors.items()}

    return changed


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_model(lambda w: w[:, :-1].contiguous()), id="shape"),
        pytest.param(_model(lambda w: w.to(torch.int64)), id="dtype"),
        pytest.param(_model(lambda w: w.to(torch.float16)), id="precision"),
        pytest.param(lambda t: {n.replace("model.", "network."): v for n, v in t.items()}, id="name"),
        pytest.param(lambda t: {}, id="nothing"),
    ],
)  # fmt: skip
def test_other_tensors_under_the_right_hash(
    whole: Path, change: Change, tmp_path: Path, capsys: Capture
) -> None:
    """No accident does this: it is refused, and the run is as it was."""
    run, (newest, _) = copied(whole, tmp_path)
    newest.write_bytes(save(change(load(newest.read_bytes()))))
    side = newest.with_suffix(".json")
    info = json.loads(side.read_text())
    side.write_text(json.dumps(info | {"sha256": hashlib.sha256(newest.read_bytes()).hexdigest()}))
    before = content(run)
    capsys.readouterr()
    assert main([*JOBS[whole.name], "--out", str(run), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert content(run) == before


def test_saved_again_at_its_step_it_is_never_seen_with_anothers_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import marginflow.runs._directory as directory

    run = RunDirectory.create(tmp_path / "run", {})
    run.save_checkpoint({"model.w": torch.zeros(3)}, {"step": 0})
    real, count = directory.write_alone, 0

    def killed(*args: object, **kwargs: object) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(directory, "write_alone", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint({"model.w": torch.ones(3)}, {"step": 0})
    assert run.checkpoint_to_resume() is None, "begun anew, and not called damaged"
    with pytest.raises(RunError, match="no checkpoint yet"):
        _ = __import__("marginflow").load_run(run.path).checkpoint()
    run.close()
