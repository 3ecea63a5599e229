"""A sweep file: which trials it means, how they are called, and what is refused before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import marginflow as mf
from marginflow.errors import InputError, SpecificationError
from marginflow.sweeps import check_trials, read_plan

OPTIONS = {"data": "separable:n=8,d=2", "model": "mlp:4", "epochs": 2}


def content(**tables: Any) -> dict[str, Any]:
    return {"options": OPTIONS, **tables}


def test_a_grid_is_every_combination_the_last_line_fastest() -> None:
    plan = read_plan(content(grid={"lr": [0.05, 0.1], "batch-size": [2, 4, 8]}))
    assert [(t.options["lr"], t.options["batch_size"]) for t in plan.trials] == [
        (0.05, 2), (0.05, 4), (0.05, 8), (0.1, 2), (0.1, 4), (0.1, 8)
    ]  # fmt: skip
    assert plan.swept == ("lr", "batch_size")
    assert all(t.options["epochs"] == 2 for t in plan.trials)
    assert plan.trials[0].name == "lr-0.05_batch_size-2"


def test_a_list_of_trials() -> None:
    plan = read_plan(content(trials=[{"lr": 0.1}, {"lr": 0.2, "momentum": 0.5}]))
    assert [dict(t.swept) for t in plan.trials] == [{"lr": 0.1}, {"lr": 0.2, "momentum": 0.5}]
    assert [t.name for t in plan.trials] == ["lr-0.1", "lr-0.2_momentum-0.5"]


def test_a_variable_stands_in_the_text_of_options() -> None:
    options = {**OPTIONS, "attack": "pgd-linf:eps={eps},steps={k},step={eps}"}
    plan = read_plan({"options": options, "grid": {"eps": ["8/255", 0.1], "k": [3]}})
    assert [t.options["attack"] for t in plan.trials] == [
        "pgd-linf:eps=8/255,steps=3,step=8/255",
        "pgd-linf:eps=0.1,steps=3,step=0.1",
    ]
    assert "eps" not in plan.trials[0].options
    assert [t.name for t in plan.trials] == ["eps-8-255_k-3", "eps-0.1_k-3"]


def test_names_are_safe_and_distinct_and_hang_on_the_options_alone() -> None:
    models = ["mlp:4", "mlp-4", "../../etc", "a/b c;$(rm)", "MLP:4", "x" * 300]
    options = {"data": "digits:3,8"}
    names = [t.name for t in read_plan({"options": options, "grid": {"model": models}}).trials]
    assert len({name.lower() for name in names}) == len(models)
    assert all(re.fullmatch(r"[A-Za-z0-9_.+-]{1,100}", name) for name in names)
    assert all(Path(name).name == name and name not in (".", "..") for name in names)
    swapped = read_plan({"options": options, "grid": {"model": models[::-1]}}).trials
    assert [t.name for t in swapped] == names[::-1]


def test_what_the_file_may_leave_out(tmp_path: Path) -> None:
    file = tmp_path / "my sweep.toml"
    file.write_text('[options]\ndata = "digits:3,8"\n[grid]\nmodel = ["mlp:4"]\n')
    plan = read_plan(file)
    assert (plan.name, plan.out, plan.job) == ("my sweep", Path("runs/my-sweep"), "train")
    assert (plan.retries, plan.certify, plan.cpus, plan.gpus) == (1, True, 1.0, 0.0)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({}, r"expected a table \[grid\] or tables \[\[trials\]\], got neither"),
        ({"grid": {"lr": [1.0]}, "trials": [{"lr": 1.0}]}, "got both"),
        ({"grid": {}}, "empty grid"),
        ({"grid": {"lr": []}}, "lr: expected at least one value"),
        ({"grid": {"lr": 0.1}}, "lr: expected a list, got 0.1"),
        ({"grid": {"data": "digits"}}, "data: expected a list, got 'digits'"),
        ({"grid": {"lr": [[0.1]]}}, "lr: expected text, a number"),
        ({"grid": {"lr": [0.1, 0.1]}}, "lr = 0.1 is there twice"),
        ({"grid": {"batch-sise": [2]}}, "'batch-sise'|'batch_sise'; did you mean 'batch_size'"),
        ({"grid": {"eps": [0.1]}}, r"a variable would stand as \{eps\} in \[options\]"),
        ({"grid": {"epochs": [2, 3]}}, r"'epochs' is swept and in \[options\]"),
        ({"grid": {"momentum": ["x"]}}, "momentum: got 'x' of the wrong type"),
        ({"grid": {"shrink": [1]}}, "shrink: got 1 of the wrong type"),
        ({"trials": []}, r"expected tables \[\[trials\]\]"),
        ({"trials": [{}]}, "one option at least"),
        ({"gird": {"lr": [1]}}, "did you mean 'grid'"),
        ({"grid": 3}, r"expected a table \[grid\], got 3"),
        ({"sweep": {"retry": 3}, "grid": {"lr": [1]}}, "did you mean 'retries'"),
        ({"sweep": {"retries": -1}, "grid": {"lr": [1]}}, "at least 0, got -1"),
        ({"sweep": {"job": "trian"}, "grid": {"lr": [1]}}, "did you mean 'train'"),
        ({"sweep": {"job": "flow"}, "grid": {"lr": [1]}}, "option of flow in the sweep 'lr'"),
        ({"sweep": {"name": "///"}, "grid": {"lr": [1]}}, "expected letters or digits"),
        ({"resources": {"cpus": 0}, "grid": {"lr": [1]}}, "cpus: expected a number above 0"),
    ],
)
def test_files_that_are_refused(tables: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_plan(content(**tables))


def test_more_refusals() -> None:
    with pytest.raises(InputError, match="model is missing; for example model = 'mlp:256,32'"):
        read_plan({"options": {"data": "digits:3,8"}, "grid": {"lr": [0.1]}})
    options = {**OPTIONS, "attack": "fgsm:eps={eps}"}
    with pytest.raises(InputError, match=r"\{eps\} stands for a variable"):
        read_plan({"options": options, "grid": {"lr": [0.1]}})
    with pytest.raises(SpecificationError, match="option in the sweep 'epoch'"):
        read_plan({"options": {**OPTIONS, "epoch": 3}, "grid": {"lr": [0.1]}})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the sweep file"):
        read_plan(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[grid\n")
    with pytest.raises(InputError, match="no TOML file"):
        read_plan(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"lr": [0.1, -1.0]}, "trial lr-1.0: lr"),
        (
            {"attack": ["fgsm:eps=0.1", "fgms:eps=0.1"]},
            "trial attack-fgms-eps-0.1: unknown attack 'fgms'",
        ),
        ({"batch_size": [2, 0]}, "trial batch_size-0: .*batch_size"),
        ({"threads": [0]}, "trial threads-0: threads"),
        ({"loss": ["hinge"]}, "trial loss-hinge: "),
        ({"engine": ["fused", "quick"]}, "trial engine-quick: "),
        ({"log": ["paper"]}, "trial log-paper: "),
        ({"dtype": ["float16"]}, "trial dtype-float16: "),
    ],
)
def test_every_trial_is_checked_before_anything_is_written(
    grid: dict[str, Any], words: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=words):
        mf.sweep(content(grid=grid), out=out, executor="processes")
    assert not out.exists()


@pytest.mark.parametrize(
    ("job", "good", "bad", "words"),
    [
        ("maximize", {"method": ["spheres", "dual"]}, {"method": ["sphere"]}, "'spheres'"),
        ("maximize", {"method": ["loss-based:a=0.1"]}, {"method": ["loss-based:b=1"]}, "'b'"),
        ("maximize", {"epochs": [1]}, {"from": ["nowhere"]}, "no run in 'nowhere'"),
        ("flow", {"log_time": [5, 10.0]}, {"rtol": [0.5]}, "rtol: expected at most 0.01"),
        ("flow", {"method": ["steps"]}, {"method": ["step"]}, "'steps'"),
    ],
)
def test_other_jobs_are_checked_too(
    job: str, good: dict[str, Any], bad: dict[str, Any], words: str
) -> None:
    base = {"data": "separable:n=8,d=2", "model": "deep-linear:3", "attack": "fgm:eps=0.01"}
    check_trials(read_plan({"sweep": {"job": job}, "options": base, "grid": good}))
    with pytest.raises(InputError, match=words):
        check_trials(read_plan({"sweep": {"job": job}, "options": base, "grid": bad}))
