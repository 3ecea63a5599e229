"""``marginflow measure`` of weights from files, with a model that only a function can build."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import marginflow as mf
from marginflow.cli import main

_MODULE = """
from torch import nn

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))

def normed():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 1))

def broken():
    raise ValueError("no weights today")

number = 3

def three():
    return 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The working folder holds the module ``mine_of_measure``."""
    (tmp_path / "mine_of_measure.py").write_text(_MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    yield importlib.import_module("mine_of_measure")
    sys.modules.pop("mine_of_measure", None)
    sys.path[:] = path


def measured(*arguments: str, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["measure", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)[0]


_ASK = ("--data", "digits:3,8", "--attack", "fgsm:eps=0.1")


@pytest.mark.parametrize("form", ["safetensors", "state dict", "nested", "wrapped", "our own run"])
def test_weights_in_every_form(
    form: str, mine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = mine.plain()
    weights = dict(model.state_dict())
    path = tmp_path / "w.pt"
    if form == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(weights, path)
    elif form == "state dict":
        torch.save(weights, path)
    elif form == "nested":  # as Lightning keeps them
        path = tmp_path / "w.ckpt"
        torch.save({"epoch": 3, "state_dict": {f"model.{n}": w for n, w in weights.items()}}, path)
    elif form == "wrapped":
        torch.save({f"module._orig_mod.{n}": w for n, w in weights.items()}, path)
    else:
        with mf.Monitor(model, mf.load("digits:3,8"), out=tmp_path / "run") as monitor:
            monitor.measure(0)
        (path,) = (tmp_path / "run" / "checkpoints").glob("*.safetensors")
    found = measured(str(path), "--model", "mine_of_measure:plain", *_ASK, capsys=capsys)
    data = mf.load("digits:3,8")
    expected = mf.adversarial_margins(model, data.x, data.y, mf.attacks.FGSM(eps=0.1))
    assert found["normalized_margin"] == expected.normalized_min
    assert found["accuracy"] == expected.accuracy


def test_a_network_that_is_not_homogeneous(
    mine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(mine.normed().state_dict(), tmp_path / "w.pt")
    command = ["w.pt", "--model", "mine_of_measure:normed", *_ASK]
    found = measured(*command, capsys=capsys)
    assert "BatchNorm2d" in found["left_out"]
    assert "normalized_margin" not in found
    assert main(["measure", *command, "--certified", "norms"]) == 0
    shown = capsys.readouterr().out
    assert "Left out" in shown
    assert "certified min m" in shown


def test_a_monitored_run_and_what_it_cannot_name(
    mine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = mf.load("digits:3,8")
    own = mf.Dataset(data.x[:80], data.y[:80], bounds=(0, 1))
    import numpy as np

    np.savez(tmp_path / "own.npz", x=own.x.numpy(), y=own.y.numpy())
    torch.manual_seed(0)
    with mf.Monitor(mine.plain(), own, "fgsm:eps=0.1", loss="logistic", out="run") as monitor:
        monitor.measure(0)
    assert main(["measure", "run"]) == 2
    assert "that cannot be loaded by name" in capsys.readouterr().err
    given = ["--model", "mine_of_measure:plain", "--data", "npz:own.npz"]
    found = measured("run", *given, capsys=capsys)
    assert found["normalized_margin"] == monitor.records[0]["normalized_margin"]
    assert main(["verify", "run", *given]) == 0
    assert "Lemma 3" in capsys.readouterr().out
    assert main(["certify", "run", *given, "--fitted-only"]) in (0, 2)  # 2: nothing is fitted yet
    assert main(["verify", "run", "--model", "mine_of_measure:plain", "--data", "digits:3,8"]) == 2
    assert "are not those that the run was trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["w.pt", "--data", "digits:3,8"], "holds weights only: give --model"),
        (["w.pt", "--model", "mine_of_measure:plain"], "holds weights only: give --data"),
        (["gone.pt", "--model", "mlp:4", "--data", "digits:3,8"], "there is no file 'gone.pt'"),
        (["whole.pt", "--model", "mlp:4", "--data", "digits:3,8"], "save model.state_dict() alone"),
        (["text.pt", "--model", "mlp:4", "--data", "digits:3,8"], "is no file of weights"),
        (["text.safetensors", "--model", "mlp:4", "--data", "digits:3,8"], "cannot read weights"),
        (["list.pt", "--model", "mlp:4", "--data", "digits:3,8"], "expected weights by name"),
        (["w.pt", "--model", "mlp:4,4", "--data", "digits:3,8"], "the checkpoint is of another model"),
        (["w.pt", "--model", "mlx:4", "--data", "digits:3,8"], "did you mean 'mlp'"),
        (["w.pt", "--model", "mine_of_measure:gone", "--data", "digits:3,8"], "no function 'gone'"),
        (["w.pt", "--model", "mine_of_measure:number", "--data", "digits:3,8"], "no function 'number'"),
        (["w.pt", "--model", "nowhere_at_all:f", "--data", "digits:3,8"], "cannot import 'nowhere_at"),
        (["w.pt", "--model", "mine_of_measure:three", "--data", "digits:3,8"], "got int"),
        (["w.pt", "--model", "mine_of_measure:broken", "--data", "digits:3,8"], "no weights today"),
    ],
)  # fmt: skip
def test_wrong_input_is_said(
    arguments: list[str],
    message: str,
    mine: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(mine.plain().state_dict(), tmp_path / "w.pt")
    torch.save(nn.Linear(2, 1), tmp_path / "whole.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("weights", encoding="utf-8")
    assert main(["measure", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "\x1b" not in said
