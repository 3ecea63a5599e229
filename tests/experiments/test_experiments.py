"""The experiments at tiny settings: what they train, what they return, how they go on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import marginflow as mf
from marginflow.errors import DivergedError, InputError, RunError
from marginflow.experiments import (
    EXPERIMENTS,
    OURS,
    PAPER,
    Matrix,
    Panel,
    Reproduction,
    course_lines,
    reproduce,
    results_of,
)
from marginflow.experiments.libraries import LOSS, METHODS
from marginflow.experiments.libraries import OURS as MARGIN

TINY: dict[str, Any] = {
    "fig1": dataclasses.replace(
        EXPERIMENTS["fig1"]["demo"], model="mlp:8", epochs=6, pgd_epochs=6, long_epochs=12
    ),
    "fig2": dataclasses.replace(
        EXPERIMENTS["fig2"]["demo"], model="mlp:8", fgsm_epochs=3, pgd_epochs=2
    ),
    "fig3": dataclasses.replace(
        EXPERIMENTS["fig3"]["demo"],
        data="digits:n=60",
        model="cnn:2,3,hidden=4,kernel=3",
        fgsm_epochs=2,
        pgd_epochs=1,
    ),
    "fig4": dataclasses.replace(EXPERIMENTS["fig4"]["demo"], model="mlp:8", epochs=3),
    "fig5": dataclasses.replace(EXPERIMENTS["fig5"]["demo"], model="mlp:20", epochs=12),
    "fig6": dataclasses.replace(EXPERIMENTS["fig6"]["demo"], epochs=200),
    "fig7": dataclasses.replace(EXPERIMENTS["fig7"]["demo"], epochs=200),
    "tradeoff": dataclasses.replace(
        EXPERIMENTS["tradeoff"]["demo"], model="mlp:8", epochs=3, sizes=("0", "0.1", "0.2")
    ),
    "cross": dataclasses.replace(EXPERIMENTS["cross"]["demo"], model="mlp:8", epochs=3),
    "overfitting": dataclasses.replace(EXPERIMENTS["overfitting"]["demo"], model="mlp:8", epochs=3),
    "scale-trap": dataclasses.replace(EXPERIMENTS["scale-trap"]["demo"], scales=(1, 8)),
}


def run(name: str, out: Path, **options: Any) -> Reproduction:
    (done,) = reproduce([TINY[name]], out, **options)
    return done


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reproduction]:
    """Everything at once, on two processes; without other libraries, wherever they are installed."""
    out = tmp_path_factory.mktemp("figures")
    ours = {name: METHODS[name] for name in (LOSS, MARGIN)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marginflow.experiments._scale_trap.installed_methods", lambda: ours)
        return {part.figure.name: part for part in reproduce(list(TINY.values()), out, jobs=2)}


def test_every_experiment_is_there_at_every_scale() -> None:
    assert set(EXPERIMENTS) == {*PAPER, *OURS} == set(TINY)
    for name, scales in EXPERIMENTS.items():
        assert set(scales) == {"demo", "mnist", "paper"}
        for experiment in scales.values():
            assert experiment.name == name
            trainings = experiment.trainings()
            assert len({t.name for t in trainings}) == len(trainings)


def test_the_paper_scale_has_the_settings_of_the_paper() -> None:
    def paper(name: str) -> dict[str, object]:
        return dataclasses.asdict(EXPERIMENTS[name]["paper"])

    one = paper("fig1")
    assert (one["model"], one["batch_size"], one["long_epochs"]) == ("mlp:1024,64", 80, 10_000)
    assert one["fgsm"] == "fgsm:eps=16/255"
    assert one["pgd"] == "pgd-linf:eps=16/255,steps=5,step=6/255"
    assert paper("fig2")["sizes"] == ("8/255", "12/255", "24/255")
    three = paper("fig3")
    assert (three["data"], three["model"], three["loss"]) == ("mnist", "cnn", "cross-entropy")
    assert three["sizes"] == ("16/255", "32/255")
    four = paper("fig4")
    assert (four["eps"], four["batch_size"]) == (8.0, 64)
    five = paper("fig5")
    assert (five["data"], five["model"], five["lr"], five["eps"]) == (
        "mnist:2,8", "mlp:10000", 1e-5, 3.0,
    )  # fmt: skip
    (net,) = EXPERIMENTS["fig5"]["paper"].trainings()
    assert net.loss == "exponential"
    # 5 steps of 6/255 where ε = 16/255, and in the same ratio elsewhere.
    step = mf.attacks.build(EXPERIMENTS["fig3"]["paper"].trainings()[0].attack)
    assert step.steps == 5  # type: ignore[union-attr]
    assert step.step_size == pytest.approx(6 / 255)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", list(TINY))
def test_every_figure_has_panels_verdicts_and_its_settings(
    name: str, done: dict[str, Reproduction]
) -> None:
    figure = done[name].figure
    assert figure.name == name
    assert figure.verdicts
    assert figure.statement.endswith(".")
    assert any("seed 0" in note for note in figure.notes)
    for panel in figure.panels:
        if isinstance(panel, Panel):
            assert panel.curves, panel.title
            assert all(len(c.x) == len(c.y) for c in panel.curves)
        else:
            assert isinstance(panel, Matrix)
    content = json.loads(json.dumps(results_of(done[name], "demo"), allow_nan=False))
    assert content["figure"] == name
    assert [v["outcome"] for v in content["verdicts"]] == [v.outcome for v in figure.verdicts]
    assert max(map(len, course_lines(done[name]))) <= 80


def test_figure_1_draws_what_was_measured(done: dict[str, Reproduction]) -> None:
    part = done["fig1"]
    fgsm, standard = part.results["fgsm"][0], part.results["standard"][0]
    panel = part.figure.panels[0]
    assert isinstance(panel, Panel)
    assert panel.ylabel == "γ̂_m (×10⁻³)"
    shown = {r["epoch"]: 1000 * r["normalized_margin"] for r in fgsm.run.metrics if r["epoch"] <= 6}
    assert dict(zip(panel.curves[0].x, panel.curves[0].y, strict=True)) == shown
    assert fgsm.run.final["epoch"] == 12, "the long run goes on"
    assert standard.run.config["attack"] == "none"
    # The kept weights, measured under PGD, against a measurement of the trained network itself.
    pgd = TINY["fig1"].pgd
    data = mf.load("digits:3,8")
    last = standard.records(pgd)[-1]
    measured = mf.adversarial_margins(
        standard.run.load_model(), data.x, data.y, mf.attacks.build(pgd)
    )
    assert last["epoch"] == 6
    assert last["normalized_margin"] == pytest.approx(measured.normalized_min, rel=1e-6)
    with pytest.raises(RunError, match="not under fgm"):
        standard.records("fgm:eps=1")


def test_figures_4_and_5_say_that_no_classifier_withstands(
    done: dict[str, Reproduction],
) -> None:
    (note, _) = done["fig4"].figure.notes
    assert note.startswith("No classifier withstands ε = 0.75 here")
    small = dataclasses.replace(TINY["fig5"], eps=0.1)
    assert "may exist" in small.figure(done["fig5"].results).notes[0]


def test_figures_6_and_7_share_their_runs(done: dict[str, Reproduction]) -> None:
    six, seven = done["fig6"], done["fig7"]
    paths = [
        t.run.path
        for part in (six, seven)
        for seeds in part.results.trained.values()
        for t in seeds
    ]
    assert len(set(paths)) == 3
    for figure in (six.figure, seven.figure):
        assert [panel.title for panel in figure.panels] == ["L = 2", "L = 3", "L = 4"]
        assert [len(panel.curves) for panel in figure.panels] == [2, 3, 4]  # type: ignore[union-attr]
    for depth, panel in zip((2, 3, 4), six.figure.panels, strict=True):
        final = six.results[f"layers-{depth}"][0].run.final["layer_norms"]
        drawn = [curve.y[-1] for curve in panel.curves]  # type: ignore[union-attr]
        assert drawn == pytest.approx(final, rel=1e-12)
    for panel in seven.figure.panels:
        assert panel.curves[-1].y[-1] == pytest.approx(1, abs=1e-15), "one row has rank one"  # type: ignore[union-attr]
        for curve in panel.curves:  # type: ignore[union-attr]
            assert all(0 < y <= 1 + 1e-15 for y in curve.y if y is not None)


def test_growth_of_layers_is_judged_on_the_last_third() -> None:
    from marginflow.experiments._deep_linear import grows

    rising = torch.linspace(0.1, 0.9, 9).double()[:, None].repeat(1, 2)
    assert grows(rising).ok
    dent = rising.clone()
    dent[2] = 0.9
    assert grows(dent).ok, "early points may fall"
    dent = rising.clone()
    dent[7, 1] -= 0.3
    assert not grows(dent).ok
    constant = rising.clone()
    constant[:, 1] = 0.5
    assert not grows(constant).ok
    constant[:, 1] = 1.0
    assert grows(constant).ok, "a ratio that is 1 need not rise"


def test_the_matrix_judges_each_column_by_its_diagonal() -> None:
    from marginflow.experiments._cross import _columns

    names = ("A", "B")
    assert _columns(names, ((2.0, 1.0), (1.0, 3.0)), str).ok
    assert _columns(names, ((2.0, 3.0), (1.0, 3.0)), str).ok, "a tie counts for the diagonal"
    lost = _columns(names, ((2.0, 4.0), (1.0, 3.0)), str)
    assert not lost.ok
    assert lost.text == "1 of 2 columns; under B the net trained with A has 4.0, its own 3.0"


def test_the_trap_shows_on_a_small_net(done: dict[str, Reproduction]) -> None:
    margin, loss = done["scale-trap"].figure.verdicts
    assert margin.outcome == "holds"
    assert loss.outcome == "holds", loss.measured
    clean = [c for c in done["scale-trap"].figure.panels[0].curves if not c.measured]  # type: ignore[union-attr]
    assert len(clean) == 1


def test_a_finished_experiment_is_read_and_an_unfinished_one_goes_on(tmp_path: Path) -> None:
    whole = run("fig4", tmp_path / "whole")
    heard: list[str] = []
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "whole").rglob("step-*")}
    again = run("fig4", tmp_path / "whole", tell=heard.append)
    assert again.figure == whole.figure
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "whole").rglob("step-*")} == stamps
    assert [line.partition(":")[0] for line in heard] == ["fig4/fgm-seed0", "fig4/standard-seed0"]
    # As a kill would leave it: one net short of epochs, the other not begun.
    short = dataclasses.replace(TINY["fig4"], epochs=1)
    next(reproduce([short], tmp_path / "cut"))
    for path in sorted((tmp_path / "cut" / "fig4" / "standard-seed0").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert run("fig4", tmp_path / "cut").figure == whole.figure
    forced = run("fig4", tmp_path / "whole", force=True)
    assert forced.figure == whole.figure
    other = dataclasses.replace(TINY["fig4"], lr=0.2)
    with pytest.raises(RunError, match="other settings"):
        list(reproduce([other], tmp_path / "whole"))


def test_seeds_make_a_band_and_two_processes_the_same_bits(tmp_path: Path) -> None:
    alone = run("fig4", tmp_path / "alone", seeds=2, seed=1)
    together = run("fig4", tmp_path / "together", seeds=2, seed=1, jobs=2)
    assert alone.figure == together.figure
    assert alone.results.seeds == (1, 2)
    curve = alone.figure.panels[0].curves[0]  # type: ignore[union-attr]
    paths = [[1000 * r["normalized_margin"] for r in t.records()] for t in alone.results["fgm"]]
    assert list(curve.low) == [min(pair) for pair in zip(*paths, strict=True)]
    assert list(curve.high) == [max(pair) for pair in zip(*paths, strict=True)]
    assert curve.y == pytest.approx([sum(pair) / 2 for pair in zip(*paths, strict=True)])
    assert "seeds 1 … 2" in alone.figure.notes[-1]
    assert "seed 1:" in alone.figure.verdicts[0].measured


def test_an_error_in_another_process_arrives_whole(tmp_path: Path) -> None:
    wild = dataclasses.replace(TINY["fig5"], lr=1e30)
    with pytest.raises(DivergedError, match="lower lr") as caught:
        list(reproduce([wild, TINY["fig4"]], tmp_path, jobs=2))
    assert caught.value.epoch >= 1


def test_bad_numbers(tmp_path: Path) -> None:
    for options in ({"seeds": 0}, {"jobs": 0}, {"threads": 0}, {"seed": -1}):
        with pytest.raises(InputError):
            run("fig4", tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_damaged_measurement_is_named(tmp_path: Path) -> None:
    run("fig1", tmp_path)
    (place,) = tmp_path.rglob("*.under-pgd-linf.json")
    place.write_text("{")
    with pytest.raises(RunError, match="damaged"):
        run("fig1", tmp_path)


@pytest.mark.parametrize("receiver", ["all processes", "the first process"])
def test_ctrl_c_leaves_checkpoints_and_the_same_command_goes_on(
    receiver: str, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "marginflow", "reproduce", "fig4", "--jobs", "2", "--out", str(tmp_path)
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A test run in the background of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for name in ("fgm", "standard"):
            while not list(tmp_path.glob(f"fig4/{name}-seed0/checkpoints/step-*.json")):
                assert process.poll() is None
                time.sleep(0.02)
        if receiver == "all processes":  # as a terminal does
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        # Before the trainings would be killed, which is at 60.
        _, error = process.communicate(timeout=50)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130, error.decode()
    assert "Traceback" not in error.decode()
    stopped = {
        name: mf.load_run(tmp_path / "fig4" / f"{name}-seed0").final["epoch"]
        for name in ("fgm", "standard")
    }
    assert min(stopped.values()) < 600, "it was interrupted too late to show anything"
