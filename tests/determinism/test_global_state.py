"""Results hang on the seeds that are given, not on the global generators, which stay as they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.style  # noqa: F401 - draws a number when it is first imported, which is not our doing
import torch

import marginflow as mf
from marginflow import attacks

PGD = "pgd-linf:eps=0.05,steps=2,step=0.03,random=true"
EXACT = "exact-linear:p=2,eps=0.1"
SEPARABLE = "separable:n=12,d=4,margin=0.3"
DIGITS: dict[str, Any] = {"data": "digits:3,8", "epochs": 2, "batch_size": 64}


def of_run(run: mf.Run) -> list[Any]:
    return [run.metrics, *run.model.state_dict().values()]


def fitted() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A network and examples of which it gets all right."""
    data = mf.load("digits:3,8")
    model = mf.models.build("mlp:8", input_shape=data.shape, seed=0)
    x = data.x[:40]
    return model, x, model(x).detach().reshape(-1).sign()


def a_flow(path: Path) -> Path:
    mf.gradient_flow("deep-linear:3", SEPARABLE, attack=EXACT, log_time=12.0, out=path / "flow")
    return path / "flow"


def a_run(path: Path) -> Path:
    mf.train("mlp:8", **DIGITS, attack=PGD, out=path / "run")
    return path / "run"


# Each makes its own things, so that they, too, see other global generators.
PUBLIC: dict[str, Callable[[Path], list[Any]]] = {
    "train": lambda path: of_run(mf.train("mlp:8", **DIGITS, attack=PGD)),
    "train, autograd": lambda path: of_run(
        mf.train("cnn:2,4,hidden=8,kernel=3", **DIGITS, attack=PGD)
    ),
    "train, shards": lambda path: of_run(mf.train("mlp:8", **DIGITS, attack=PGD, shards=2)),
    "train_seeds": lambda path: [
        part for run in mf.train_seeds("mlp:8", **DIGITS, attack=PGD, seeds=2) for part in of_run(run)
    ],
    "gradient_flow": lambda path: of_run(
        mf.gradient_flow("deep-linear:3", SEPARABLE, attack=EXACT, log_time=12.0).run
    ),
    "maximize": lambda path: of_run(mf.maximize("mlp:8", **DIGITS, attack=PGD)),
    "maximize, relative": lambda path: of_run(
        mf.maximize("mlp:8", **DIGITS, attack=PGD, method="relative")
    ),
    "maximize, dual": lambda path: of_run(
        mf.maximize("deep-linear", SEPARABLE, EXACT, method="dual", epochs=20)
    ),
    "load": lambda path: [mf.load("digits:3,8,n=50").x, mf.load(SEPARABLE).x],
    "build": lambda path: list(
        mf.models.build("mlp:8", input_shape=(64,), seed=3).state_dict().values()
    ),
    "adversarial_margins": lambda path: [
        mf.adversarial_margins(*fitted(), attacks.build(PGD)).normalized
    ],
    "certified_margins": lambda path: [
        mf.certified_margins(*fitted(), attacks.build("fgsm:eps=0.001"), method="norms").values
    ],
    "measure_homogeneity": lambda path: [
        str(mf.measure_homogeneity(fitted()[0], fitted()[1]).layers)
    ],
    "kkt_certificate": lambda path: [mf.kkt_certificate(*fitted(), "none").as_dict()],
    "nearest_kkt_point": lambda path: list(
        mf.nearest_kkt_point(*fitted(), max_iterations=6).model.state_dict().values()
    ),
    "load_model": lambda path: list(mf.load_run(a_run(path)).load_model().state_dict().values()),
    "verify": lambda path: [str(mf.verify(a_flow(path)))],
    "audit": lambda path: [str(mf.audit(a_run(path)))],
    "rerun": lambda path: [str(mf.rerun(a_run(path)))],
}  # fmt: skip


def states(seed: int) -> list[Any]:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    return now()


def now() -> list[Any]:
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state()]  # noqa: NPY002


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b)


@pytest.mark.parametrize("name", PUBLIC)
def test_global_generators_say_nothing_and_stay(name: str, tmp_path: Path) -> None:
    found = []
    for seed in (1, 2):
        before = states(seed)
        found.append(PUBLIC[name](tmp_path / str(seed)))
        assert all(map(same, before, now()))
    assert len(found[0]) == len(found[1]) > 0
    assert all(map(same, *found))
