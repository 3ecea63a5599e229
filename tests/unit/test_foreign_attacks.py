"""What holds of other libraries' attacks without the libraries: promises, specifications, what is missing."""

from __future__ import annotations

import importlib
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import FGM, FGSM, PGD, ExactLinear, FiniteSet, TwoLogits
from marginflow.attacks._foreign import ForeignAttack
from marginflow.attacks._logits import Layout
from marginflow.cli import main
from marginflow.errors import (
    DataError,
    InputError,
    MissingDependencyError,
    SpecificationError,
)

COMMAND = r"pip install 'marginflow\[attack-libraries\]'"


@dataclass(frozen=True, eq=False, init=False)
class Careless(ForeignAttack):
    """A library at its worst: it seeds, trains, accumulates gradients and goes out of every bound."""

    then: Callable[[Tensor], Tensor] | None = None

    name: ClassVar[str] = "careless"

    def __init__(self, then: Callable[[Tensor], Tensor] | None = None, **more: Any) -> None:
        given = {"eps": 0.1, "p": 2, "bounds": (0, 1), "options": {}, **more}
        super().__init__("Careless", **given, sayable=False, draws=True)
        object.__setattr__(self, "then", then)

    def _adversarial(self, victim: nn.Module, x: Tensor, labels: Tensor, classes: int) -> Tensor:
        victim.train()
        assert victim(x).shape == (len(x), classes)
        assert labels.min() >= 0
        assert labels.max() < classes
        z = x.clone().requires_grad_()
        victim(z).sum().backward()
        victim.zero_grad()
        noise = torch.rand_like(x) + float(np.random.rand()) + random.random()  # noqa: NPY002
        x.zero_()
        return noise if self.then is None else self.then(noise)


class Normalized(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def data(classes: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = torch.arange(6) % 2 * 2 - 1 if classes == 1 else torch.arange(6) % classes
    return x, y


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("classes", [1, 3])
def test_the_promises_hold_whatever_a_library_does(classes: int) -> None:
    torch.manual_seed(0)
    model = Normalized(classes).train()
    model.layers[1].eval()
    parameters = list(model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    parameters[1].requires_grad_(False)
    x, y = data(classes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    copied = x.clone()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    states = (torch.rand(3), np.random.rand(3), random.random())  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    attack = Careless()

    found = attack(model, x, y, generator=seeded())

    assert torch.equal(torch.rand(3), states[0])
    np.testing.assert_array_equal(np.random.rand(3), states[1])  # noqa: NPY002
    assert random.random() == states[2]
    assert torch.equal(x, copied)
    assert [module.training for module in model.modules()] == modes
    # Parameters, and the running means that the forward in training mode moved.
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert all(p.grad is None for p in parameters[1:])
    assert [p.requires_grad for p in parameters] == [True, False, *[True] * (len(parameters) - 2)]
    length = torch.linalg.vector_norm(found.delta.flatten(1), dim=1)
    assert float(length.max()) <= 0.1 * (1 + 1e-6)
    assert float((x + found.delta).min()) >= 0
    assert float((x + found.delta).max()) <= 1

    again = attack(model, x, y, generator=seeded())
    other = attack(model, x, y, generator=torch.Generator().manual_seed(8))
    assert torch.equal(again.delta, found.delta)
    assert not torch.equal(other.delta, found.delta)
    assert not attack.scale_invariant
    assert not attack.exact


def test_what_a_library_may_not_give() -> None:
    model = Normalized(1).eval()
    x, y = data(1)

    def raises(_: Tensor) -> Tensor:
        raise KeyError("from inside")

    cases: list[tuple[Callable[[Tensor], Tensor], str]] = [
        (lambda z: z[:2], r"shape \(6, 1, 4, 4\) from careless, got shape \(2, 1, 4, 4\)"),
        (lambda z: z / 0, "expected finite examples .* got NaN or infinity"),
        (raises, "careless refused: KeyError: 'from inside'"),
    ]
    for then, says in cases:
        with pytest.raises(InputError, match=says):
            Careless(then)(model, x, y, generator=seeded())
    with pytest.raises(InputError, match="expected derivative='detached', got 'total'"):
        Careless()(model, x, y, derivative="total", generator=seeded())
    with pytest.raises(InputError, match="needs generator="):
        Careless()(model, x, y)
    with pytest.raises(DataError, match="expected −1 and \\+1"):
        Careless()(model, x, (y > 0).long(), generator=seeded())


def test_dead_inputs_are_those_without_a_gradient_of_the_margin() -> None:
    """Not those that an attack merely left alone."""
    model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(16, 1, bias=False))
    x, y = data(1)
    x[2] = 0
    found = Careless(lambda z: x.clone())(model, x, y, generator=seeded())
    assert found.dead_inputs.tolist() == [False, False, True, False, False, False]


def test_an_attack_that_no_string_builds_says_so() -> None:
    spec = Careless(bounds=None).spec
    assert spec == "careless(Careless, eps=0.1, p=2.0, bounds=none)"
    for kind in ("foolbox", "torchattacks", "art", "finite-set"):
        with pytest.raises(SpecificationError, match=r"no string builds; give .* as attack=…"):
            mf.attacks.build(spec.replace("careless", kind))


# --- what is missing


CALLS: list[tuple[str, Callable[[], Any]]] = [
    ("foolbox", lambda: mf.attacks.from_foolbox("LinfPGD", 0.1)),
    ("foolbox", lambda: mf.attacks.to_foolbox(FGSM(0.1))),
    ("foolbox", lambda: mf.attacks.to_foolbox_model(nn.Linear(2, 1))),
    ("foolbox", lambda: mf.attacks.build("foolbox:LinfPGD,eps=0.1")),
    ("torchattacks", lambda: mf.attacks.from_torchattacks("PGD", 0.1)),
    ("torchattacks", lambda: mf.attacks.to_torchattacks(FGSM(0.1), nn.Linear(2, 1))),
    ("torchattacks", lambda: mf.attacks.build("torchattacks:PGD,eps=0.1")),
    ("torchattacks", lambda: mf.attacks.AutoAttack("linf", 0.1)),
    ("torchattacks", lambda: mf.attacks.build("autoattack-l2:eps=0.1")),
    ("art", lambda: mf.attacks.from_art("FastGradientMethod", 0.1)),
    ("art", lambda: mf.attacks.to_art(nn.Linear(2, 1), torch.zeros(1, 2))),
    ("art", lambda: mf.attacks.to_art_attack(FGSM(0.1), None)),
    ("art", lambda: mf.attacks.build("art:FastGradientMethod,eps=0.1")),
]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("foolbox", "torchattacks", "art"):
        for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(("library", "call"), CALLS, ids=[str(n) for n in range(len(CALLS))])
def test_a_missing_library_names_the_command(library: str, call: Callable[[], Any]) -> None:
    with pytest.raises(MissingDependencyError, match=COMMAND) as caught:
        call()
    packages = {"art": "adversarial-robustness-toolbox"}
    assert caught.value.package == packages.get(library, library)


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    "attack", ["foolbox:LinfPGD,eps=0.1", "torchattacks:PGD,eps=0.1", "autoattack-linf:eps=0.1"]
)
def test_the_command_line_without_a_library(
    attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 with the command, and no run directory half made."""
    out = tmp_path / "run"
    command = ["train", "--data", "digits:3,8", "--model", "mlp:4", "--epochs", "1"]
    assert main([*command, "--attack", attack, "--out", str(out)]) == 2
    assert "pip install 'marginflow[attack-libraries]'" in capsys.readouterr().err
    assert not out.exists()


def test_a_library_without_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchattacks without torchvision, say: the same command."""
    (tmp_path / "foolbox.py").write_text("import a_package_that_nobody_has\n")
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "foolbox"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(MissingDependencyError, match=f"a_package_that_nobody_has.*{COMMAND}"):
        mf.attacks.build("foolbox:LinfPGD,eps=0.1")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("foolbox:eps=0.1", "expected the name of one attack first, as in foolbox:NAME"),
        ("art", "expected the name of one attack first"),
        ("torchattacks:PGD,APGD,eps=0.1", "expected the name of one attack first"),
        ("torchattacks:PGD", r"expected eps=…, as in torchattacks:NAME,eps=8/255"),
        ("torchattacks:PGD,eps=a", "expected a number or a fraction"),
        ("foolbox:LinfPGD,eps=0.1,bounds=1", "expected an interval"),
        ("torchattacks:PGD,eps=0.1,bounds=0..1", "knows the bounds 0..1 only"),
        ("autoattack-linf:steps=5", r"expected eps=…, as in autoattack-linf:eps=8/255"),
        ("autoattack-linf:eps=0.1,query=5", "did you mean 'queries'"),
        ("autoattack:eps=0.1", "did you mean 'autoattack-l"),
        ("autoatack-linf:eps=0.1", "did you mean 'autoattack-linf'"),
    ],
)
def test_malformed_specifications(spec: str, says: str) -> None:
    """Before a library is asked for, and so without any."""
    with pytest.raises(SpecificationError, match=says):
        mf.attacks.build(spec)


# --- logits and layouts


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_two_logits_have_the_margins_of_one_output(shape: tuple[int, ...]) -> None:
    f = torch.randn(shape, generator=seeded())
    y = torch.tensor([1, -1, 1, -1, 1])
    logits = TwoLogits(nn.Identity())(f)
    labels = (y > 0).long()
    margins = logits.gather(1, labels[:, None]) - logits.gather(1, 1 - labels[:, None])
    assert torch.equal(margins.reshape(-1), f.reshape(-1) * y)
    logistic = nn.functional.softplus(-f.reshape(-1) * y)
    torch.testing.assert_close(
        nn.functional.cross_entropy(logits, labels, reduction="none"), logistic
    )
    several = torch.randn(4, 3, generator=seeded())
    assert TwoLogits(nn.Identity())(several) is several


@pytest.mark.parametrize("label", [0, 1])
def test_cross_entropy_of_two_logits_keeps_a_gradient_where_it_is_small(label: int) -> None:
    """At a margin of 40 float32 knows no 1 − e^{−40}, but e^{−40}: half of ∇ℓ for either label."""
    f = torch.tensor([80.0 * label - 40.0], requires_grad=True)
    nn.functional.cross_entropy(TwoLogits(nn.Identity())(f), torch.tensor([label])).backward()
    expected = (1 - 2 * label) * math.exp(-40.0) / 2
    assert f.grad is not None
    assert float(f.grad) == pytest.approx(expected, rel=1e-4)


def test_a_network_has_one_wrapper_for_as_long_as_it_is_held() -> None:
    model = nn.Linear(2, 1).eval()
    wrapper = TwoLogits.of(model)
    assert TwoLogits.of(model) is wrapper
    assert TwoLogits.of(wrapper) is wrapper
    assert TwoLogits.of(nn.Linear(2, 1)) is not wrapper
    assert not wrapper.training
    assert TwoLogits(nn.Linear(2, 1)).training


@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (3, 8, 8), (1, 4, 4), (2, 5, 6)])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 2.0)])
def test_examples_of_any_shape_as_square_images(
    shape: tuple[int, ...], bounds: tuple[float, float]
) -> None:
    x = torch.rand(4, *shape, generator=seeded(), dtype=torch.float64)
    x = bounds[0] + (bounds[1] - bounds[0]) * x
    layout = Layout(nn.Identity(), shape, x, bounds=bounds)
    image = layout.to_image(x)
    assert image.ndim == 4
    assert image.shape[2] == image.shape[3] >= 5
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1
    torch.testing.assert_close(layout(image), x, atol=1e-15, rtol=1e-15)
    moved = layout.to_image(x / 2)
    torch.testing.assert_close(layout.difference(image - moved), x / 2, atol=1e-15, rtol=1e-15)
    assert layout(image.float()).dtype == torch.float32


# --- other budgets and bounds


def test_another_budget() -> None:
    pgd = PGD("linf", 0.2, steps=4, step_size=0.1, bounds=(0, 1))
    half = pgd.with_eps(0.1)
    assert (half.eps, half.step_size, half.steps, half.bounds) == (0.1, 0.05, 4, (0.0, 1.0))
    assert (pgd.eps, pgd.step_size) == (0.2, 0.1)
    assert PGD("l2", 0.0, steps=5).with_eps(1).step_size == 0.5
    assert pgd.with_eps(0).step_size == 0
    assert FGM(1.0).with_eps(2).spec == FGM(2.0).spec
    assert ExactLinear(2, 0.1).with_eps(0.3).spec == ExactLinear(2, 0.3).spec
    for wrong in (-0.1, math.nan, "a"):
        with pytest.raises(InputError, match="eps"):
            pgd.with_eps(wrong)  # type: ignore[arg-type]
    deltas = FiniteSet(torch.ones(1, 2))
    assert deltas.with_eps(deltas.eps) is deltas
    with pytest.raises(InputError, match="make another set"):
        deltas.with_eps(0.5)


def test_other_bounds() -> None:
    assert FGSM(0.1).with_bounds((0, 1)).spec == FGSM(0.1, bounds=(0, 1)).spec
    assert FGSM(0.1, bounds=(0, 1)).with_bounds(None).spec == FGSM(0.1).spec
    with pytest.raises(InputError, match="low < high"):
        FGSM(0.1).with_bounds((1, 0))
