"""A run's certificate: the right network, data and attack, and files that are whole or the old ones."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import marginflow as mf
from marginflow.errors import InputError, ModelError, RunError, StorageError
from marginflow.kkt import _run as module
from marginflow.kkt import certify_run, read_certificate
from marginflow.runs import RunDirectory

DATA = "separable:n=12,d=64,margin=0.4,seed=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained until all margins are positive: on easy data that takes a few steps."""
    out = tmp_path_factory.mktemp("runs") / "fgm"
    mf.train("mlp:6", DATA, attack="fgm:eps=0.05", lr=0.5, epochs=60, dtype="float64", out=out)
    return out


def test_it_is_that_of_the_network_the_data_and_the_attack(folder: Path) -> None:
    found = certify_run(folder)
    data, run = mf.load(DATA), mf.load_run(folder)
    attack = mf.attacks.FGM(0.05)
    by_hand = mf.kkt_certificate(run.load_model(), data.x, data.y, attack, loss="logistic")
    assert found.certificate.as_dict() == by_hand.as_dict()
    assert found.step == run.final["step"] == 60
    content = found.as_dict()
    assert content["support"]["labels"] == data.y[by_hand.support].tolist()
    assert (content["split"], content["seed"], content["data"]) == ("train", 0, DATA)
    clean = certify_run(folder, attack="none", loss="exponential", derivative="detached", tau=0.5)
    assert (clean.certificate.attack, clean.certificate.loss) == ("none", "exponential")
    assert (clean.certificate.derivative, clean.certificate.tau) == ("detached", 0.5)
    assert clean.certificate.smallest_margin > found.certificate.smallest_margin


def test_a_run_in_memory_with_frozen_and_shared_parameters() -> None:
    class Net(nn.Module):
        """One weight in two places, above a frozen one."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 5, bias=False)
            self.twice = nn.Linear(5, 5, bias=False)
            self.out = nn.Linear(5, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.nn.functional.leaky_relu(self.first(x), 0.1)
            h = torch.nn.functional.leaky_relu(self.twice(h), 0.1)
            return self.out(torch.nn.functional.leaky_relu(self.twice(h), 0.1))

    torch.manual_seed(3)
    net = Net().double()
    net.first.requires_grad_(False)
    run = mf.train(net, mf.load(DATA), lr=0.5, epochs=20, measure=False, dtype="float64")
    found = certify_run(run, fitted_only=True).certificate
    # The shared weight counts once, with degree 2; the frozen one is a constant.
    assert found.order == 3
    sizes = [p.detach().square().sum() for p in net.parameters() if p.requires_grad]
    assert found.norm == pytest.approx(float(torch.stack(sizes).sum().sqrt()), rel=1e-12)
    assert len(sizes) == 2


def test_what_is_kept_is_what_was_certified(folder: Path) -> None:
    found = certify_run(folder, tau=10.0)
    path = found.save(folder)
    saved = read_certificate(folder)
    assert saved is not None
    content = json.loads(path.read_text())
    assert saved.content == content
    assert content.pop("examples_file")["shown"] == len(found.shown)
    assert content == found.as_dict()
    c, data = found.certificate, mf.load(DATA)
    largest = c.multipliers[found.shown]
    assert largest.tolist() == sorted((m for m in c.multipliers.tolist() if m > 0), reverse=True)
    assert list(saved.clean) == c.support[found.shown].tolist()
    for place, index in zip(found.shown.tolist(), saved.clean, strict=True):
        assert torch.equal(saved.clean[index], data.x[index].double())
        assert torch.equal(saved.adversarial[index], c.adversarial_examples[place])


def test_only_the_largest_multipliers_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHOWN", 2)
    found = certify_run(folder, tau=10.0)
    assert int((found.certificate.multipliers > 0).sum()) > 2
    found.save(tmp_path)
    (file,) = (tmp_path / "certificate").iterdir()
    least = float(found.certificate.multipliers.topk(2).values[-1])
    places = torch.isin(found.certificate.support, load_file(file)["index"])
    assert int(places.sum()) == 2
    assert float(found.certificate.multipliers[places].min()) == least


def everything(root: Path) -> dict[str, bytes]:
    names = ("certificate", "certificate.json")
    files = [p for name in names for p in [root / name, *(root / name).glob("*")] if p.is_file()]
    return {p.name: p.read_bytes() for p in files}


def test_two_that_are_written_at_once_leave_one_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (certify_run(folder, tau=tau) for tau in (1.0, 10.0))
    beside = threading.Thread(target=second.save, args=[tmp_path])
    replace = os.replace

    def meanwhile(source: str, target: Path) -> None:
        """Between the inputs and the certificate that names them, the other one may begin."""
        if target.name == "certificate.json" and beside.ident is None:
            beside.start()
            beside.join(0.5)
        replace(source, target)

    monkeypatch.setattr("os.replace", meanwhile)
    first.save(tmp_path)
    beside.join()
    read = read_certificate(tmp_path)
    assert read is not None
    assert read.content["tau"] == 10.0, "the second waited for the first"
    assert list(read.clean) != []
    assert len(everything(tmp_path)) == 2


@pytest.mark.parametrize("dies_at", [1, 2])
def test_an_interrupted_write_leaves_the_earlier_certificate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    certify_run(folder, tau=1.0).save(tmp_path)
    before, whole = everything(tmp_path), read_certificate(tmp_path)
    other = certify_run(folder, attack="fgm:eps=0.02", tau=10.0)
    calls, replace = 0, os.replace

    def dies(*paths: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise OSError(28, "No space left on device")
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", dies)
        with pytest.raises(StorageError, match="No space left"):
            other.save(tmp_path)
    after = everything(tmp_path)
    assert {name: after[name] for name in before} == before
    read = read_certificate(tmp_path)
    assert read is not None
    assert whole is not None
    assert read.content == whole.content
    assert list(read.clean) == list(whole.clean) != []
    other.save(tmp_path)
    read = read_certificate(tmp_path)
    assert read is not None
    assert read.content["attack"] == "fgm:eps=0.02"
    assert len(everything(tmp_path)) == 2, "what is no longer needed goes"


def test_a_damaged_certificate_says_so(folder: Path, tmp_path: Path) -> None:
    assert read_certificate(tmp_path) is None
    certify_run(folder).save(tmp_path)
    path = tmp_path / "certificate.json"
    good = path.read_text()
    for text, message in [
        ("{", "damaged"),
        ("[]", "no format_version"),
        ('{"format_version": 1}', "damaged: it has no examples_file; make it again"),
        ('{"format_version": 99}', "update it"),
        ('{"format_version": 1, "examples_file": {"sha256": "../../../etc/passwd"}}', None),
    ]:
        path.write_text(text)
        if message is None:
            read = read_certificate(tmp_path)
            assert read is not None
            assert not read.clean
            continue
        with pytest.raises(RunError, match=message):
            read_certificate(tmp_path)
    path.write_text(good)
    (file,) = (tmp_path / "certificate").iterdir()
    file.write_bytes(b"other")
    read = read_certificate(tmp_path)
    assert read is not None
    assert not read.clean
    assert read.content == json.loads(good)


def test_a_new_run_in_its_place_has_no_certificate(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 0.5, "epochs": 2, "out": tmp_path / "run"}
    mf.train("mlp:6", DATA, attack="fgm:eps=0.05", **options)
    certify_run(tmp_path / "run", fitted_only=True).save(tmp_path / "run")
    assert read_certificate(tmp_path / "run") is not None
    mf.train("mlp:6", DATA, force=True, **options)
    assert read_certificate(tmp_path / "run") is None
    assert not (tmp_path / "run" / "certificate").exists()


def test_what_a_killed_writer_left_goes_when_the_run_is_continued(
    folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    certify_run(run).save(run)
    before = everything(run)
    leftovers = [run / ".certificate.json.abc", run / "certificate" / ".support-1.safetensors.abc"]
    for path in leftovers:
        path.write_bytes(b"a part")
    RunDirectory.reopen(run).close()
    assert not any(path.exists() for path in leftovers)
    assert everything(run) == before


def test_the_nearest_point_of_a_run() -> None:
    run = mf.train("mlp:2", "separable:n=4,d=3,margin=0.4", lr=0.5, epochs=40, dtype="float64")
    found = certify_run(run, nearest=True, fitted_only=True)
    beside = found.nearest
    assert beside is not None
    c = found.certificate
    network, data = run.load_model(), found.data
    alone = mf.nearest_kkt_point(network, data.x[c.fitted], data.y[c.fitted])
    assert beside.as_dict() == alone.as_dict() == found.as_dict()["nearest"]
    assert beside.gain == beside.margin / beside.margin_before - 1
    assert beside.converged
    assert beside.margin >= beside.margin_before
    assert "left to gain" in str(beside)
    assert max(map(len, str(beside).splitlines())) <= 80


def test_the_nearest_point_is_refused_before_anything_is_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "kkt_certificate", lambda *a, **b: pytest.fail("computed"))
    with pytest.raises(InputError, match="without a random start"):
        certify_run(folder, attack="pgd-l2:eps=0.1,random=true", nearest=True)
    monkeypatch.setattr("marginflow.kkt._nearest._MOST_WEIGHTS", 10)
    with pytest.raises(InputError, match="at most 10 trainable weights, got 390"):
        certify_run(folder, nearest=True)


def test_what_a_run_may_lack(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run in"):
        certify_run(tmp_path)
    with pytest.raises(RunError, match="not those that the run was trained on"):
        certify_run(folder, mf.load("separable:n=12,d=64,margin=0.4,seed=2"))
    with pytest.raises(InputError, match="has no test split"):
        certify_run(folder, split="test")
    run = mf.load_run(folder)
    run.config["attack"] = "finite-set:3 perturbations"
    with pytest.raises(InputError):
        certify_run(run)
    model = mf.models.mlp(64, 6, 1).double()
    assert certify_run(folder, model=model).certificate.order == 2
    with pytest.raises(ModelError, match="another model"):
        certify_run(folder, model=mf.models.mlp(64, 7, 1))
