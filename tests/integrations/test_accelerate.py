"""The monitor in a loop of Hugging Face's accelerate, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import marginflow as mf

pytestmark = pytest.mark.integrations

EPS = 0.05
DATA = mf.load("digits:3,8").sample(96)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(16, 1),
    )


def loop(out: Path | None, *, prepared: bool = False, precision: str = "no") -> dict[str, Any]:
    """Six epochs; the network that the monitor gets is ``prepared``, or unwrapped."""
    AcceleratorState._reset_state(reset_partial_state=True)
    set_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    net = network()
    loader = DataLoader(TensorDataset(DATA.x, DATA.y), batch_size=32, shuffle=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    seen: list[Any] = []
    monitor = None
    if out is not None:
        inner = model if prepared else accelerator.unwrap_model(model)
        monitor = mf.Monitor(inner, DATA, f"fgsm:eps={EPS}", out=out, schedule="every")
    for epoch in range(1, 7):
        model.train()
        for x, y in loader:
            seen.append((torch.get_rng_state(), [m.training for m in model.modules()]))
            optimizer.zero_grad()
            accelerator.backward(softplus(-y * model(x).reshape(-1)).mean())
            optimizer.step()
        if monitor is not None:
            grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
            monitor.measure(epoch, epoch=epoch)
            after = [p.grad for p in net.parameters() if p.grad is not None]
            assert len(grads) == len(after) == 6
            assert all(map(torch.equal, grads, after))
    if monitor is not None:
        monitor.close()
    return {"weights": net.state_dict(), "seen": seen, "monitor": monitor, "net": net}


@pytest.mark.parametrize("prepared", [False, True], ids=["unwrapped", "as prepared"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_is_the_same_to_the_bit(prepared: bool, precision: str, tmp_path: Path) -> None:
    plain = loop(None, precision=precision)
    watched = loop(tmp_path / "run", prepared=prepared, precision=precision)
    assert plain["weights"].keys() == watched["weights"].keys()
    for name, value in plain["weights"].items():
        assert torch.equal(value, watched["weights"][name]), name
    assert len(plain["seen"]) == len(watched["seen"]) == 18
    for (state, modes), (other, others) in zip(plain["seen"], watched["seen"], strict=True):
        assert torch.equal(state, other)
        assert modes == others
    assert [r["step"] for r in mf.load_run(tmp_path / "run").metrics] == list(range(1, 7))


def test_the_numbers_are_those_by_hand(tmp_path: Path) -> None:
    watched = loop(tmp_path / "run")
    net, last = watched["net"].eval(), mf.load_run(tmp_path / "run").final
    x = DATA.x.clone().requires_grad_()
    clean = DATA.y * net(x).reshape(-1)
    (slope,) = torch.autograd.grad(clean.sum(), x)
    with torch.no_grad():
        hit = DATA.y * net(DATA.x - EPS * slope.sign()).reshape(-1)
    assert last["clean_accuracy"] == float((clean > 0).double().mean())
    assert last["adversarial_accuracy"] == float((hit > 0).double().mean())
    assert last["margin"] == pytest.approx(float(hit.min()), rel=1e-5)
    assert last["normalized_margin"] is None
    assert "norm_product" in watched["monitor"].left_out
