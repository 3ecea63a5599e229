"""Our attacks against foolbox's, torchattacks' and ART's, and the scale test that those fail.

The libraries differentiate the cross-entropy, ours differentiate the margin. For two classes
``∇ CE = −σ(−m) ∇m``: while nothing saturates the directions are the same, and so are the
perturbations, up to rounding:

* δ agrees to 1e-6 in float32 and to 1e-14 in float64 (the budgets are 0.6 in ℓ2, 0.1 in ℓ∞);
* but a sign is noise where ``|∂m/∂x_j|`` is a rounding of the largest one, below 1e-7 of it in float32 and
  1e-16 in float64. The ℓ∞ attacks are compared without such coordinates; they are counted, and
  more than one in a thousand fails.

A library that is not installed fails these tests; it does not skip them.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import marginflow as mf

pytestmark = [
    pytest.mark.extras,
    # foolbox imports scipy.ndimage.filters, which scipy 2 will not have.
    pytest.mark.filterwarnings(
        "ignore:Please import `gaussian_filter` from the `scipy.ndimage` namespace:DeprecationWarning"
    ),
]

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
NOISE = {torch.float32: 1e-7, torch.float64: 1e-16}


@dataclass(frozen=True)
class Ask:
    """One attack, as every library is asked for it: no random start, x + δ in [0, 1]."""

    p: float
    eps: float
    steps: int

    @property
    def step_size(self) -> float:
        return self.eps if self.steps == 1 else self.eps / 3

    def ours(self, objective: str = "margin") -> mf.attacks.Attack:
        common: dict[str, Any] = {"eps": self.eps, "bounds": (0, 1), "objective": objective}
        if self.steps == 1:
            return mf.attacks.FGM(**common) if self.p == 2 else mf.attacks.FGSM(**common)
        return mf.attacks.PGD(self.p, steps=self.steps, step_size=self.step_size, **common)


ASKS = {
    "fgm": Ask(2, 0.6, 1),
    "fgsm": Ask(math.inf, 0.1, 1),
    "pgd-l2": Ask(2, 0.6, 7),
    "pgd-linf": Ask(math.inf, 0.1, 7),
}
KINDS = list(ASKS)

Attack = Callable[[Ask, nn.Module, Tensor, Tensor], Tensor]
"""What is asked, a model with two or more logits, x, labels 0 … C − 1 ↦ δ."""


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.fail(f"{name}: {error}; install it with pip install 'marginflow[attack-libraries]'")


@pytest.fixture(scope="module")
def foolbox() -> Attack:
    library = _module("foolbox")

    def attack(ask: Ask, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if ask.steps == 1:
            fast = library.attacks.LinfFastGradientAttack
            chosen = (library.attacks.L2FastGradientAttack if ask.p == 2 else fast)()
        else:
            two = library.attacks.L2ProjectedGradientDescentAttack
            inf = library.attacks.LinfProjectedGradientDescentAttack
            chosen = (two if ask.p == 2 else inf)(
                abs_stepsize=ask.step_size, steps=ask.steps, random_start=False
            )
        wrapped = library.PyTorchModel(model.eval(), bounds=(0, 1), device=x.device)
        moved, _, _ = chosen(wrapped, x, y, epsilons=ask.eps)
        return moved - x

    return attack


@pytest.fixture(scope="module")
def torchattacks() -> Attack:
    library = _module("torchattacks")

    def attack(ask: Ask, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if ask.steps == 1 and ask.p == math.inf:
            return library.FGSM(model, eps=ask.eps)(x, y) - x
        options: dict[str, Any] = {"eps": ask.eps, "alpha": ask.step_size, "steps": ask.steps}
        if ask.p == 2:
            # It has no FGM, but one step as long as the budget is the same thing.
            chosen = library.PGDL2(model, random_start=False, **options)
            if x.dtype == torch.float64:
                # g/(‖g‖ + 1e-10), the gradient of a mean: visible in the eighth decimal place.
                chosen.eps_for_division = 0.0
        else:
            chosen = library.PGD(model, random_start=False, **options)
        return chosen(x, y) - x

    return attack


@pytest.fixture(scope="module")
def art() -> Attack:
    evasion = _module("art.attacks.evasion")
    classification = _module("art.estimators.classification")

    def attack(ask: Ask, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        classifier = classification.PyTorchClassifier(
            model,
            nn.CrossEntropyLoss(),
            tuple(x.shape[1:]),
            classes,
            clip_values=(0, 1),
            device_type="cpu",
        )
        options: dict[str, Any] = {"norm": ask.p, "eps": ask.eps}
        if ask.steps == 1:
            chosen = evasion.FastGradientMethod(classifier, **options)
        else:
            chosen = evasion.ProjectedGradientDescent(
                classifier, eps_step=ask.step_size, max_iter=ask.steps, verbose=False, **options
            )
        return torch.from_numpy(chosen.generate(x.numpy(), y.numpy())) - x

    return attack


LIBRARIES = ["foolbox", "torchattacks", "art"]


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Attack:
    attack: Attack = request.getfixturevalue(request.param)
    return attack


def two_logits(model: nn.Module) -> nn.Module:
    """A copy of a network with one output as the libraries want it: ART leaves gradients behind."""
    return mf.attacks.TwoLogits(copy.deepcopy(model))


def network(outputs: int, dtype: torch.dtype) -> nn.Module:
    """A small ReLU network with margins of the size of 1."""
    return scaled(mf.models.mlp(64, 48, 16, outputs, seed=20220425).to(dtype), 2.5).eval()


def scaled(model: nn.Module, c: float) -> nn.Module:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(c)
    return copied


def images(dtype: torch.dtype, low: float, high: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((96, 1, 8, 8), generator=generator, dtype=torch.float64)
    return (low + (high - low) * x).to(dtype)


def noisy(ask: Ask, model: nn.Module, x: Tensor, y: Tensor, objective: str) -> Tensor:
    """Where our attack took the sign of a rounding error at any of its steps; shape of x."""
    noise = torch.zeros_like(x, dtype=torch.bool)
    if ask.p == 2:
        return noise
    delta = torch.zeros_like(x)
    for done in range(1, ask.steps + 1):
        z = (x + delta).requires_grad_()
        outputs = model(z)
        if objective == "loss":
            value = nn.functional.cross_entropy(outputs, y, reduction="sum")
        else:
            value = (outputs.reshape(-1) * y).sum()
        (gradient,) = torch.autograd.grad(value, z)
        size = gradient.abs()
        noise |= size <= NOISE[x.dtype] * size.amax(dim=(1, 2, 3), keepdim=True)
        so_far = mf.attacks.PGD(
            ask.p,
            eps=ask.eps,
            steps=done,
            step_size=ask.step_size,
            bounds=(0, 1),
            objective=objective,
        )
        delta = so_far(model, x, y).delta
    return noise


def assert_agree(ours: Tensor, theirs: Tensor, noise: Tensor) -> None:
    apart = (ours - theirs).abs()
    apart[noise] = 0
    assert float(apart.max()) <= TOLERANCE[ours.dtype]
    # Else it would be a comparison of nothing.
    assert int(noise.sum()) <= 1e-3 * noise.numel()
    assert float(ours.abs().amax(dim=(1, 2, 3)).min()) > 0.02


CASES = [
    pytest.param(library, kind, dtype, where, id=f"{library}-{kind}-{str(dtype)[6:]}-{where}")
    for library in LIBRARIES
    for kind in KINDS
    for dtype in (torch.float32, torch.float64)
    for where in ("inside", "bounds")
    # ART computes in float32 only, and clips to the bounds before it projects on the ball, the
    # others after: for ℓ∞ that is the same, for ℓ2 it is not.
    if library != "art"
    or (dtype == torch.float32 and (kind, where) not in [("fgm", "bounds"), ("pgd-l2", "bounds")])
]


@pytest.mark.parametrize(("library", "kind", "dtype", "where"), CASES, indirect=["library"])
def test_two_classes(library: Attack, kind: str, dtype: torch.dtype, where: str) -> None:
    """Our margin gradient on f against their loss gradient on [−f/2, f/2]."""
    ask = ASKS[kind]
    # Inside, nothing is ever clipped, on the way neither; else the range of pixels binds.
    x = images(dtype, *((0.45, 0.55) if where == "inside" else (0.0, 1.0)))
    labels = torch.arange(len(x)) % 2
    y = 2 * labels - 1
    model = network(1, dtype)
    with torch.no_grad():
        margins = model(x).reshape(-1) * y
    assert float(margins.abs().median()) > 0.05
    assert float(margins.abs().max()) < 5

    ours = ask.ours()(model, x, y).delta
    theirs = library(ask, two_logits(model), x.clone(), labels)

    at_the_bounds = ((x + ours) <= 0) | ((x + ours) >= 1)
    assert bool(at_the_bounds.any()) == (where == "bounds")
    assert_agree(ours, theirs, noisy(ask, model, x, y, "margin"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", LIBRARIES, indirect=True)
def test_our_loss_objective_on_five_classes(library: Attack, kind: str) -> None:
    """With objective="loss" ours are the libraries' attacks, whatever the number of classes."""
    ask = ASKS[kind]
    x = images(torch.float32, 0.45, 0.55)
    y = torch.arange(len(x)) % 5
    model = network(5, torch.float32)

    ours = ask.ours("loss")(model, x, y).delta
    theirs = library(ask, copy.deepcopy(model), x.clone(), y)

    assert_agree(ours, theirs, noisy(ask, model, x, y, "loss"))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, mf.Dataset]:
    """A bias-free network trained against FGSM on the bundled digits, and its data."""
    data = mf.load("digits:3,8")
    model = mf.models.mlp(data.features, 64, 32, 1, seed=0)
    attack = mf.attacks.FGSM(eps=0.05)
    mf.train(model, data, attack=attack, lr=0.1, batch_size=32, epochs=60, measure=False)
    return model.eval(), data


STRONG = Ask(2, 1.2, 10)


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which examples are classified rightly, (n,) bool."""
    with torch.no_grad():
        return model(x).reshape(-1) * y > 0


def share(which: Tensor) -> float:
    return float(which.double().mean())


@pytest.mark.parametrize("library", LIBRARIES, indirect=True)
def test_scaling_the_weights_switches_the_libraries_off(
    library: Attack, trained: tuple[nn.Module, mf.Dataset]
) -> None:
    """Every layer × 8 changes no decision, but their strong attack becomes none."""
    model, data = trained
    x, y = data.x, data.y
    found = {}
    for c in (1, 8):
        victim = scaled(model, c)
        delta = library(STRONG, two_logits(victim), x.clone(), (y > 0).long())
        found[c] = share(right(victim, x + delta, y))
    assert share(right(model, x, y)) > 0.98
    assert found[1] < 0.5
    assert found[8] > 0.95


@pytest.mark.parametrize("ask", [*ASKS.values(), STRONG], ids=[*KINDS, "strong"])
@pytest.mark.parametrize("c", [2, 8, 1024])
def test_scaling_the_weights_leaves_ours_alone(
    trained: tuple[nn.Module, mf.Dataset], ask: Ask, c: int
) -> None:
    """Lemma 3: the same perturbations to the bit, so not a single example changes sides."""
    model, data = trained
    victim = scaled(model, c)
    x, y = data.x, data.y
    before = ask.ours()(model, x, y).delta
    after = ask.ours()(victim, x, y).delta
    assert torch.equal(before, after)
    assert torch.equal(right(model, x + before, y), right(victim, x + after, y))


def test_our_loss_objective_fades_as_the_libraries_do(
    trained: tuple[nn.Module, mf.Dataset],
) -> None:
    model, data = trained
    x, y = data.x, data.y
    attack = STRONG.ours("loss")
    assert not attack.scale_invariant
    found = {c: share(right(model, x + attack(scaled(model, c), x, y).delta, y)) for c in (1, 8)}
    assert found[1] < 0.5
    assert found[8] > 0.9
