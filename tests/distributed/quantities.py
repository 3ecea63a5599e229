"""Numbers that must not depend on how many processes form them: run alone, or by torchrun with a file."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import marginflow as mf
from marginflow import distributed
from marginflow.ascent import Tempered
from marginflow.engine import build
from marginflow.errors import InputError
from marginflow.losses import get_loss

_ATTACKS = {
    "none": None,
    "fgsm": mf.attacks.FGSM(eps=0.05),
    "fgm": mf.attacks.FGM(eps=0.3),
    "l2, random": mf.attacks.PGD("l2", eps=0.3, steps=3, step_size=0.2, random_start=True),
    "linf, random": mf.attacks.PGD("linf", eps=0.05, steps=3, step_size=0.03, random_start=True),
}


def _networks() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    digits, pair = mf.load("digits").to(torch.float64), mf.load("digits:3,8").to(torch.float64)
    dense = mf.models.mlp(64, 12, 6, 10, seed=1).double()
    one = mf.models.mlp(64, 12, 6, 1, activation="squared-relu", seed=1).double()
    image = mf.load("digits:3,8").x.reshape(-1, 1, 8, 8).double()
    cnn = mf.models.build("cnn:2,3,hidden=5,kernel=3", input_shape=(1, 8, 8), outputs=1, seed=1)
    return {
        "ten classes": (dense, digits.x, digits.y),
        "one output": (one, pair.x, pair.y),
        "cnn": (cnn.double(), image, pair.y),
    }


def gradients() -> dict[str, Tensor]:
    """Of L, of L/e^r, of ln L; batches of fewer examples than processes, margins that underflow L."""
    found = {}
    for name, (model, x, y) in _networks().items():
        loss = get_loss("cross-entropy" if name == "ten classes" else "exponential")
        for kind, attack in _ATTACKS.items():
            for n in (1, 3, 37):
                for large in (False, True):
                    engine = build(
                        model, Tempered(loss, 1e4 if large else 1.0), attack,
                        shape=x.shape[1:], batch_size=n, products="default",
                    )  # fmt: skip
                    of = f"{name}, {kind}, {n}, {large}"
                    source = torch.Generator().manual_seed(5)
                    result = engine(x[:n], y[:n], source, of_log=True)
                    found[f"ln L: {of}"] = result.loss
                    found[f"∇ ln L: {of}"] = torch.cat([g.flatten() for g in result.gradients])
                    found[f"m: {of}"] = result.margins.clone()
                    found[f"f: {of}"] = result.outputs.clone()
                    if large:
                        continue
                    source = torch.Generator().manual_seed(5)
                    result = engine(x[:n], y[:n], source, 1.5, 2 * n)
                    found[f"L: {of}"] = result.loss
                    found[f"∇L: {of}"] = torch.cat([g.flatten() for g in result.gradients])
    return found


def margins() -> dict[str, Tensor]:
    """Minima, log-sum-exps, quantiles; chunks that do not divide."""
    found = {}
    for name, (model, x, y) in _networks().items():
        loss = "cross-entropy" if name == "ten classes" else "logistic"
        for kind, attack in _ATTACKS.items():
            of = f"{name}, {kind}"
            m = mf.adversarial_margins(model, x, y, attack, batch_size=29, loss=loss, seed=3)
            numbers = [m.min, m.normalized_min, m.smoothed, m.accuracy, m.log_loss or 0.0]
            found[f"values: {of}"] = m.values
            found[f"numbers: {of}"] = torch.tensor(numbers, dtype=torch.float64)
    model, x, y = _networks()["one output"]
    bounds = mf.certified_margins(model, x[:5], y[:5], mf.attacks.FGSM(eps=0.01), method="norms")
    return found | {"certified": bounds.values}


def certificates() -> dict[str, Tensor]:
    """Of a network by its layers, and of one by single gradients."""
    found = {}
    data = mf.load("separable:n=23,d=7,margin=0.2,seed=2").to(torch.float64)
    for name in ("layers", "gradients", "kinks"):
        model = mf.models.mlp(7, 8, 4, 1, activation="squared-relu", seed=0).double()
        if name == "kinks":
            model = mf.models.mlp(7, 8, 1, seed=0).double()
        attack = mf.attacks.FGM(eps=0.02)
        with distributed.apart():
            mf.train(model, data, attack=attack, lr=0.3, epochs=300, measure=False)
        used: nn.Module = model
        if name == "gradients":
            used = nn.Sequential(nn.Flatten(), _Scaled(model))
        cert = mf.kkt_certificate(used, data.x, data.y, attack, batch_size=9, fitted_only=True)
        numbers = [cert.residual, *cert.residuals, cert.stationarity, cert.solver_gap < 1e-9]
        found[f"{name}: numbers"] = torch.tensor(numbers, dtype=torch.float64)
        found[f"{name}: multipliers"] = cert.paper_multipliers
        found[f"{name}: margins"] = cert.margins
        found[f"{name}: support"] = cert.support
    return found


class _Scaled(nn.Module):
    """A network that is none of the known layers: its weights are used by ``F.linear``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList([p.detach().clone() for p in model.parameters()])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights[:-1]:
            x = torch.relu(nn.functional.linear(x, weight)).square()
        return nn.functional.linear(x, self.weights[-1])


def trainings() -> dict[str, Tensor]:
    """Last weights and measurements of trainings and of an ascent."""
    found = {}
    jobs: dict[str, Callable[[nn.Module], object]] = {
        "fgsm": lambda model: mf.train(
            model, "digits:3,8", attack="fgsm:eps=0.1", batch_size=32, epochs=4, momentum=0.9, lr=0.05
        ),
        "gradient descent, shrunk": lambda model: mf.train(
            model, "digits:3,8", attack="fgm:eps=0.1", epochs=80, lr=0.5, shrink=True
        ),
        "random start, autograd": lambda model: mf.train(
            model, "digits:3,8", attack="pgd-linf:eps=0.1,steps=2,random=true",
            batch_size=32, epochs=2, engine="autograd",
        ),
        "loss-based": lambda model: mf.train(
            model, "digits:3,8", attack="fgm:eps=0.1", epochs=10, lr="loss-based:a=0.1"
        ),
        # More examples than are evaluated at once: the draws go on from one batch to the next.
        "loss-based, random start, autograd": lambda model: mf.train(
            model, "separable:n=1100,d=64,margin=0.2",
            attack="pgd-linf:eps=0.05,steps=1,random=true", epochs=4, lr="loss-based:a=0.1",
            engine="autograd",
        ),
        "loss-based, random start, fused": lambda model: mf.train(
            model, "separable:n=1100,d=64,margin=0.2",
            attack="pgd-linf:eps=0.05,steps=1,random=true", epochs=4, lr="loss-based:a=0.1",
        ),
        "spheres": lambda model: mf.maximize(
            model, "digits:3,8", attack="fgsm:eps=0.1", epochs=4, batch_size=31
        ),
    }  # fmt: skip
    for name, job in jobs.items():
        model = mf.models.mlp(64, 16, 8, 1, seed=2).double()
        run = job(model)
        final = run.final  # type: ignore[attr-defined]
        found[f"{name}: weights"] = torch.cat([p.detach().flatten() for p in model.parameters()])
        names = ("normalized_margin", "margin", "log_loss", "accuracy", "test_accuracy")
        found[f"{name}: metrics"] = torch.tensor(
            [final[key] for key in names if key in final], dtype=torch.float64
        )
    return found


def in_float32() -> dict[str, Tensor]:
    """Weights after trainings in float32, which double a difference of one rounding again and again."""
    found = {}
    for spec in ("mlp:64,32", "cnn:3,4,hidden=8,kernel=3"):
        for attack in ("fgsm:eps=0.1", "pgd-l2:eps=0.3,steps=2,step=0.2,random=true"):
            run = mf.train(spec, "digits:3,8", attack=attack, batch_size=40, epochs=6, lr=0.1)
            found[f"{spec}, {attack}"] = torch.cat(
                [p.detach().flatten() for p in run.load_model().parameters()]
            )
    return found


def in_shards() -> dict[str, Tensor]:
    """Weights after trainings on four shards, added in the order of a tree."""
    found = {}
    for spec in ("mlp:64,32", "cnn:3,4,hidden=8,kernel=3"):
        for attack in ("none", "pgd-linf:eps=0.1,steps=2,random=true"):
            run = mf.train(
                spec, "digits:3,8", attack=attack, batch_size=41, epochs=3, lr=0.1, shards=4
            )
            found[f"{spec}, {attack}"] = torch.cat(
                [p.detach().flatten() for p in run.load_model().parameters()]
            )
    return found


class _Counting:
    """A sink that counts what it is given."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.count += len(records)

    def close(self) -> None:
        pass


def monitored() -> dict[str, Tensor]:
    """Measurements of a loop, recorded by processes whose clocks differ; what its sinks were given."""
    model, x, y = _networks()["one output"]
    sink, team = _Counting(), distributed.current()
    out = Path(distributed.first(tempfile.mkdtemp)()) / "run"
    with mf.Monitor(
        model, (x, y), _ATTACKS["fgsm"], schedule="every", out=out, log=sink
    ) as monitor:
        if team is not None and team.rank and monitor._recorder is not None:
            monitor._recorder._spent = 1e9  # of its seconds went into checkpoints
        for step in range(5):
            with torch.no_grad():
                next(model.parameters()).mul_(1.1)
            monitor.measure(step)
    given = torch.tensor(float(sink.count))
    margins = [record["normalized_margin"] for record in mf.load_run(out).metrics]
    return {
        "records given to sinks": given if team is None else team.each(given).sum(),
        "margins": torch.tensor(margins, dtype=torch.float64),
    }


def refusals() -> dict[str, Tensor]:
    """What cannot be divided is refused in all processes alike, and they can go on."""
    said: list[str] = []
    tries: list[Callable[[], object]] = [
        lambda: mf.train(
            nn.Sequential(
                nn.Flatten(), nn.Linear(64, 4, bias=False), nn.Dropout(), nn.Linear(4, 1, bias=False)
            ),
            "digits:3,8", epochs=1, measure=False, batch_size=8,
        ),
        lambda: mf.gradient_flow("deep-linear:3", "separable:n=9,d=3", log_time=1.0),
        lambda: mf.train_seeds("mlp:4", "digits:3,8", seeds=2, epochs=1),
        lambda: mf.train("mlp:4", "digits:3,8", epochs=1, seed=_rank()),
        lambda: mf.train("mlp:4", "digits:3,8", epochs=1, out="/proc/none"),
        lambda: mf.train("mlp:4", "digits:3,8", epochs=1, shards=9),
        lambda: mf.adversarial_margins(
            mf.models.mlp(1, 2, 1, seed=0),
            torch.tensor([[0.1], [0.2], [0.3], [0.4], [7.0]]),
            torch.ones(5),
            mf.attacks.FGSM(eps=0.1, bounds=(0, 1)),
        ),
    ]  # fmt: skip
    for one in tries:
        try:
            one()
        except (InputError, OSError) as error:
            said.append(str(error))
    return {text: torch.zeros(1) for text in said}


def _rank() -> int:
    team = distributed.current()
    return 0 if team is None else team.rank


PARTS = {
    "gradients": gradients,
    "margins": margins,
    "certificates": certificates,
    "trainings": trainings,
    "in_float32": in_float32,
    "in_shards": in_shards,
    "monitored": monitored,
    "refusals": refusals,
}


if __name__ == "__main__":
    with distributed.join() as team:
        results = {part: PARTS[part]() for part in sys.argv[2].split(",")}
        if team is not None:
            for name, values in results.items():
                sums = [(k, v.double().sum().item().hex()) for k, v in values.items()]
                team.agree(name, sums)
            if team.rank == 0:
                torch.save(results, sys.argv[1])
