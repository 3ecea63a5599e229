"""Nothing is written or deleted outside of a run directory, whatever lies in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_runs import DATA, Ended, check, quiet, read_sweep

import marginflow as mf
from marginflow.errors import RunError
from marginflow.sweeps import load_sweep

Copy = Callable[..., Path]
RESUME = ("train", "--resume", "--quiet", "--epochs", "43", "--out")
TRAIN = ("train", "--data", DATA, "--model", "mlp:2", "--epochs", "1", "--quiet", "--out")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of somebody's, with files that have the names of ours."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("step-00000001.safetensors", ".step-1", "support-0.safetensors", "kept.txt"):
        (folder / name).write_text("mine")
    for name in ("step-00000099.safetensors", "step-00000099.json", "events.out.tfevents.1"):
        (folder / name).write_text("mine")
    return folder


def untouched(folder: Path) -> bool:
    names = sorted(path.name for path in folder.iterdir())
    return len(names) == 7 and all((folder / name).read_text() == "mine" for name in names)


def moved(place: Path, elsewhere: Path) -> None:
    """Put a link to somebody's folder where a folder of the run was."""
    if place.exists():
        place.rename(place.with_name(f"{place.name}-before"))
    place.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("checkpoints", RESUME),
        ("trajectory", RESUME),
        ("certificate", ("certify",)),
        ("figures", ("report", "--format", "svg")),
    ],
)
def test_folders_that_lead_elsewhere_are_refused(
    copied: Copy, elsewhere: Path, place: str, words: tuple[str, ...]
) -> None:
    run = copied("run")
    moved(run / place, elsewhere)
    ended = quiet(*words, run)
    check(ended)
    assert ended.code == 2
    assert "is a symbolic link: expected a folder of the run's own" in ended.err
    assert untouched(elsewhere)


def test_force_replaces_links_and_not_what_they_lead_to(copied: Copy, elsewhere: Path) -> None:
    run = copied("run")
    for place in ("checkpoints", "trajectory", "certificate", "tensorboard", "figures"):
        moved(run / place, elsewhere)
    for place in ("report.html", "verdicts.json", "metrics.jsonl"):
        (run / place).unlink(missing_ok=True)
        (run / place).symlink_to(elsewhere / "kept.txt")
    ended = quiet(*TRAIN, run, "--force")
    assert ended == Ended(0, ended.out, "")
    assert untouched(elsewhere)
    assert not (run / "checkpoints").is_symlink()
    assert mf.load_run(run).final["epoch"] == 1


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("report.html", ("report",)),
        ("verdicts.json", ("verify",)),
        ("audit.json", ("verify",)),
        ("certificate.json", ("certify",)),
        ("bounds.json", ("measure", "--certified", "norms", "--attack", "fgm:eps=0.1")),
        ("run.json", RESUME),
        ("metrics.jsonl", RESUME),
    ],
)
def test_files_that_lead_elsewhere_are_replaced(
    copied: Copy, tmp_path: Path, place: str, words: tuple[str, ...]
) -> None:
    """The link goes, and a file comes; what it led to stays as it was."""
    run, kept = copied("run"), tmp_path / "kept"
    content = (run / place).read_text() if (run / place).exists() else "mine"
    kept.write_text(content)
    (run / place).unlink(missing_ok=True)
    (run / place).symlink_to(kept)
    ended = quiet(*words, run)
    check(ended)
    assert ended.code in (0, 1), ended.err
    assert kept.read_text() == content
    assert (run / place).is_file()
    # What does not change (run.json, other than its epochs) may stay as it is.
    assert not (run / place).is_symlink()


def test_a_lock_that_leads_elsewhere_makes_no_file_there(copied: Copy, tmp_path: Path) -> None:
    run = copied("run")
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(tmp_path / "new")
    ended = quiet(*RESUME, run)
    check(ended)
    assert ended.code == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../../train", "/etc", "..", ".", "", "a/b", 3, None])
def test_a_trial_is_a_folder_of_its_sweep(copied: Copy, name: object) -> None:
    sweep = copied("sweep", "sweep")
    content = json.loads((sweep / "sweep.json").read_text())
    content["trials"][0]["name"] = name
    (sweep / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"sweep\.json' is damaged: trials: expected"):
        load_sweep(sweep)


def test_attempts_at_what_no_folder_is_called_count_for_nothing(copied: Copy) -> None:
    sweep = copied("sweep", "sweep")
    with (sweep / "attempts.jsonl").open("a") as file:
        for name in ("x" * 5000, "../../train", "a\0b"):
            file.write(json.dumps({"trial": name, "outcome": "finished"}) + "\n")
    assert len(load_sweep(sweep).finished) == 2


@pytest.mark.parametrize("place", ["trials", "trials/width-2_eps-0.01"])
def test_a_sweep_is_not_continued_elsewhere(
    copied: Copy, valid: Path, elsewhere: Path, place: str
) -> None:
    sweep = copied("sweep", "sweep")
    moved(sweep / place, elsewhere)
    words = ("sweep", valid / "plan.toml", "--out", sweep, "--resume", "--jobs", 1)
    ended = quiet(*words)
    check(ended)
    assert ended.code == 2
    assert "is a symbolic link" in ended.err
    assert untouched(elsewhere)
    read_sweep(sweep, drawn=False)
    assert untouched(elsewhere)


def test_names_inside_an_archive_make_no_file(tmp_path: Path) -> None:
    """Members are read in memory: a name with ``..`` is that of another array, which is ignored."""
    import zipfile

    import numpy as np

    path = tmp_path / "in" / "a.npz"
    path.parent.mkdir()
    np.savez(path, x=np.eye(4), y=np.array([1, -1, 1, -1]))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../evil.npy", b"x")
        archive.writestr("/tmp/evil-of-marginflow.npy", b"x")
    assert mf.load(f"npz:{path}").n == 4
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.npz", "in"]
    assert not os.path.exists("/tmp/evil-of-marginflow.npy")


def test_links_to_ordinary_files_are_read(copied: Copy, tmp_path: Path) -> None:
    """Large checkpoints may lie on another disk."""
    run = copied("run")
    (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    (tmp_path / "link").symlink_to(run)
    assert quiet("measure", tmp_path / "link").code == 0
