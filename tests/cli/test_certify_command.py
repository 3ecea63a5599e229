"""``marginflow certify``: what it prints, what it refuses, what it leaves in the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import marginflow as mf
from marginflow.cli import main
from marginflow.runs import RunDirectory

Capture = pytest.CaptureFixture[str]
DATA = "separable:n=12,d=64,margin=0.4,seed=1"


def trained(out: Path, data: str = DATA, *more: str) -> Path:
    command = ["train", "--data", data, "--model", "mlp:6", "--lr", "0.5", "--epochs", "60"]
    assert main([*command, "--dtype", "float64", "--quiet", "--out", str(out), *more]) == 0
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "fgm", DATA, "--attack", "fgm:eps=0.05")


def test_it_prints_the_certificate_and_keeps_it(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(folder.parent)
    assert main(["certify", folder.name]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    data, run = mf.load(DATA), mf.load_run(folder)
    attack = mf.attacks.FGM(0.05)
    cert = mf.kkt_certificate(run.load_model(), data.x, data.y, attack, loss="logistic")
    assert out.startswith(str(cert))
    content = json.loads((folder / "certificate.json").read_text())
    for key, value in cert.as_dict().items():
        if key != "support":
            assert content[key] == value, key
    # The rows of the curve are points of it, the ends and τ = 2 among them.
    table = [line.split() for line in out.split("r(τ)\n")[-1].split("\n\n")[0].splitlines()]
    taus = [f"{tau:.4g}" for tau in cert.curve.taus.tolist()]
    assert {row[0] for row in table} <= set(taus)
    assert {"2", taus[-1]} <= {row[0] for row in table}
    for row in table:
        at = taus.index(row[0])
        assert int(row[1]) == int(cert.curve.supports[at])
        assert float(row[2]) == pytest.approx(float(cert.curve.residuals[at]), abs=1e-6)
    assert f"written to {folder.name}/certificate.json,\nwith the inputs of" in out


def test_json_is_what_is_kept(folder: Path, capsys: Capture) -> None:
    command = ["certify", str(folder), "--attack", "none", "--tau", "inf", "--json"]
    assert main([*command, "--threads", "1", "--memory", "1", "--max-support", "5"]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((folder / "certificate.json").read_text())
    assert printed == {key: value for key, value in kept.items() if key != "examples_file"}
    assert (printed["attack"], printed["tau"], printed["truncated"]) == ("none", None, True)
    assert len(printed["support"]["indices"]) == 5


def test_examples_that_are_not_fitted(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / "certificate.json").unlink(missing_ok=True)
    model, data = mf.load_run(run).load_model(), mf.load(DATA)
    attack = mf.attacks.FGM(0.45)
    bad = int((mf.adversarial_margins(model, data.x, data.y, attack).values <= 0).sum())
    assert 0 < bad < data.n
    command = ["certify", str(run), "--attack", "fgm:eps=0.45"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {bad} of {data.n} margins are not positive")
    assert "--fitted-only" in error
    assert "Traceback" not in error
    assert not (run / "certificate.json").exists()
    assert main([*command, "--fitted-only"]) == 0
    assert f"{data.n - bad} of {data.n}, {bad} with m_i ≤ 0 are left out" in capsys.readouterr().out
    content = json.loads((run / "certificate.json").read_text())
    assert (content["examples"], content["left_out"]) == (data.n - bad, bad)


def test_nothing_is_fitted(tmp_path: Path, capsys: Capture) -> None:
    """Two equal examples of either class: whatever the weights, no margin is positive."""
    one = np.ones((1, 4))
    np.savez(tmp_path / "same.npz", x=np.concatenate([one, one]), y=np.array([1, -1]))
    run = trained(tmp_path / "run", f"npz:{tmp_path / 'same.npz'}", "--attack", "fgm:eps=2.5")
    assert main(["certify", str(run), "--fitted-only"]) == 2
    assert "none of the 2 margins is positive" in capsys.readouterr().err
    assert not (run / "certificate.json").exists()


def test_one_example_and_copies_of_it(tmp_path: Path, capsys: Capture) -> None:
    """A tie of equal gradients: the residual is that of one, and the multipliers add up."""
    x = np.random.default_rng(0).normal(size=(1, 5))
    found = []
    for copies in (1, 3):
        name = tmp_path / f"{copies}.npz"
        np.savez(name, x=np.repeat(x, copies, axis=0), y=np.ones(copies, dtype=np.int64))
        run = trained(tmp_path / f"run-{copies}", f"npz:{name}")
        capsys.readouterr()
        assert main(["certify", str(run), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    alone, thrice = found
    assert alone["support"]["indices"] == [0]
    assert thrice["support"]["indices"] == [0, 1, 2]
    assert thrice["residual"] == pytest.approx(alone["residual"], abs=1e-9)
    total = sum(thrice["support"]["multipliers"])
    assert total == pytest.approx(alone["support"]["multipliers"][0], rel=1e-6)


def test_a_zero_layer(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    found = mf.load_run(run).checkpoint()
    tensors = {
        k: torch.zeros_like(v) if k.endswith("linear2.weight") else v
        for k, v in found.tensors.items()
    }
    assert any(not bool(v.any()) for k, v in tensors.items() if k.startswith("model."))
    RunDirectory(run).save_checkpoint(tensors, found.info)
    assert main(["certify", str(run)]) == 2
    assert "has the norm 0" in capsys.readouterr().err


def test_the_nearest_point(tmp_path: Path, capsys: Capture) -> None:
    run = trained(tmp_path / "run", "separable:n=4,d=3,margin=0.4")
    assert main(["certify", str(run), "--nearest", "--fitted-only"]) == 0
    streams = capsys.readouterr()
    assert "minutes for a ReLU network of 400" in streams.err
    assert "left to gain" in streams.out
    content = json.loads((run / "certificate.json").read_text())["nearest"]
    assert content["residual"] <= 1e-8
    assert content["margin"] >= content["margin_before"]
    assert content["gain"] == pytest.approx(content["margin"] / content["margin_before"] - 1)


BAD: list[tuple[list[str], str]] = [
    (["--tau", "-1"], "tau: expected a number of at least 0, got -1"),
    (["--tau", "nan"], "tau: expected a finite number"),
    (["--tau", "many"], "--tau"),
    (["--attack", "fgsn:eps=0.1"], "did you mean 'fgsm'"),
    (["--attack", "fgm:eps=0.1,objective=loss"], "expected an attack with objective='margin'"),
    (["--attack", "exact-linear:p=2,eps=0.1"], "linear in their input"),
    (["--derivative", "partial"], "unknown derivative"),
    (["--loss", "cross-entropy"], "expected 'exponential' or 'logistic'"),
    (["--loss", "hinge"], "unknown loss"),
    (["--split", "val"], "unknown split"),
    (["--split", "test"], "has no test split"),
    (["--max-support", "0"], "max_support: expected"),
    (["--batch-size", "0"], "batch_size: expected"),
    (["--memory", "0"], "--memory: expected"),
    (["--threads", "0"], "--threads: expected"),
    (["--seed", "-1"], "seed: expected"),
    (["--nearest", "--attack", "pgd-l2:eps=0.1,random=true"], "without a random start"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input(
    options: list[str], message: str, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    for name in ("certificate.json", "certificate"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    before = sorted(p.name for p in run.iterdir())
    assert main(["certify", str(run), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(p.name for p in run.iterdir()) == before


def lost_data(config: dict[str, object]) -> None:
    config["data"] = "npz:/nonexistent.npz"


def other_data(config: dict[str, object]) -> None:
    config["data"] = "separable:n=12,d=64,margin=0.4,seed=2"


def custom_data(config: dict[str, object]) -> None:
    config["data"] = "custom"


def custom_model(config: dict[str, object]) -> None:
    config["model"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lost_data, "cannot be read"),
        (other_data, "are not those that the run was trained on"),
        (custom_data, "cannot be loaded by name"),
        (custom_model, "of its own kind"),
    ],
)
def test_what_cannot_be_found(
    change: Callable[[dict[str, object]], None],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    config = json.loads((run / "run.json").read_text())
    change(config)
    (run / "run.json").write_text(json.dumps(config))
    assert main(["certify", str(run)]) == 2
    assert message in capsys.readouterr().err


def test_no_run_and_no_checkpoint(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["certify", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err
    run = tmp_path / "run"
    shutil.copytree(folder, run, ignore=shutil.ignore_patterns("step-*"))
    assert main(["certify", str(run)]) == 2
    assert "no checkpoint yet" in capsys.readouterr().err


def test_help_shows_a_whole_example(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["certify", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example: marginflow certify runs/" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
