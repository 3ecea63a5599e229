"""``marginflow measure --certified``: what it prints, what it keeps, what it refuses before it starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import marginflow as mf
from marginflow.certified import INSTALL, fingerprint, read_bounds
from marginflow.cli import main

Capture = pytest.CaptureFixture[str]
DATA = "separable:n=12,d=8,margin=0.4,seed=1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "run"
    command = ["train", "--data", DATA, "--model", "mlp:6", "--lr", "0.5", "--epochs", "40"]
    assert main([*command, "--attack", "fgm:eps=0.05", "--quiet", "--out", str(out)]) == 0
    return out


def test_the_table_and_what_is_kept(folder: Path, capsys: Capture) -> None:
    asked = ["--attack", "fgm:eps=0.02", "--attack", "pgd-linf:eps=0.01,steps=5"]
    capsys.readouterr()
    assert main(["measure", str(folder), "--certified", "norms", *asked]) == 0
    out = capsys.readouterr().out
    run, data = mf.load_run(folder), mf.load(DATA)
    model = run.load_model()
    attacks = [mf.attacks.FGM(0.02), mf.attacks.PGD("linf", 0.01, steps=5)]
    found = [
        mf.adversarial_margins(model, data.x, data.y, attack, certified="norms")
        for attack in attacks
    ]
    bounds = [m.certified for m in found]
    (line,) = (line for line in out.splitlines() if line.startswith("certified min m/ρ"))
    assert [float(cell) for cell in line.split()[3:]] == [
        pytest.approx(c.normalized_min, rel=1e-5) for c in bounds if c is not None
    ]
    assert out.endswith(f"written to {folder / 'bounds.json'}\n")
    kept = read_bounds(folder)
    assert kept is not None
    assert kept["step"] == run.final["step"]
    assert kept["weights_sha256"] == fingerprint(model)
    assert (kept["examples"], kept["split"], kept["data"]) == (12, "train", data.name)
    clean = mf.adversarial_margins(model, data.x, data.y)
    assert kept["clean_accuracy"] == clean.accuracy
    levels = torch.tensor(kept["quantile_levels"], dtype=torch.float64)
    for entry, attack, m in zip(kept["sandwiches"], attacks, found, strict=True):
        assert entry["attack"] == attack.spec
        assert entry["p"] == ("inf" if attack.p == torch.inf else attack.p)
        assert entry["certified_by"] == "norms"
        assert entry["certified_accuracy"] == m.certified_accuracy
        assert entry["adversarial_accuracy"] == m.accuracy
        width = torch.quantile(m.width / float(m.rho or 0), levels)
        assert entry["width_quantiles"] == pytest.approx(width.tolist())
        assert entry["width_median"] == pytest.approx(float(width[3]))
        assert min(entry["width_quantiles"]) >= 0


def test_json_has_the_bounds_too(folder: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert main(["measure", str(folder), "--certified", "norms", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["certified_by"] == "norms"
    assert entry["certified_margin"] <= entry["margin"]
    assert entry["certified_accuracy"] <= entry["accuracy"]
    assert main(["measure", str(folder), "--json"]) == 0
    (plain,) = json.loads(capsys.readouterr().out)
    assert plain == {k: v for k, v in entry.items() if "certified" not in k and k != "width_median"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["crown", "--attack", "fgm:eps=0.1"], INSTALL),
        (["crwn"], "did you mean 'crown'"),
        (["norms", "--attack", "fgm:eps=0.1", "--attack", "none"], "--attack fgsm:eps=8/255"),
    ],
    ids=["missing library", "unknown method", "no attack"],
)
def test_nothing_is_half_done(
    folder: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    """Refused before anything is measured: code 2, one line, no file."""
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    monkeypatch.setattr(mf.Run, "load_data", lambda *a, **k: pytest.fail("it began"))
    capsys.readouterr()
    assert main(["measure", str(folder), "--certified", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert not (folder / "bounds.json").exists()


def test_a_failing_bound_keeps_the_earlier_ones(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["measure", str(folder), "--certified", "norms"]
    assert main(command) == 0
    before = (folder / "bounds.json").read_bytes()
    model = mf.load_run(folder).load_model()
    model.relu1 = torch.nn.GELU()  # type: ignore[assignment]
    monkeypatch.setattr(mf.Run, "load_model", lambda *a, **k: model)
    monkeypatch.setattr(mf, "measure_homogeneity", lambda *a, **k: None)
    assert main(command) == 2
    assert "GELU" in capsys.readouterr().err
    assert (folder / "bounds.json").read_bytes() == before


def test_a_new_run_in_its_place_has_no_bounds(folder: Path) -> None:
    assert main(["measure", str(folder), "--certified", "norms"]) == 0
    mf.train("mlp:4", DATA, out=folder, force=True, epochs=1)
    assert not (folder / "bounds.json").exists()
