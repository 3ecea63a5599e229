"""AutoAttack through torchattacks: on any number of classes, at least as strong as PGD."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import PGD, AutoAttack, build
from marginflow.errors import InputError, SpecificationError

pytestmark = pytest.mark.extras

EXAMPLES = 80
CLASSES = {1: "digits:3,8", 3: "digits:1,3,8", 5: "digits:1,3,5,8,9"}
BUDGETS = {"linf": 0.08, "l2": 0.6}
Trained = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def networks() -> dict[int, Trained]:
    """Networks trained a little against FGSM, with one output and with several."""
    found = {}
    for outputs, spec in CLASSES.items():
        data = mf.load(spec)
        model = mf.models.mlp(64, 32, 16, outputs, seed=0)
        loss = "logistic" if outputs == 1 else "cross-entropy"
        mf.train(
            model, data, attack="fgsm:eps=0.03", loss=loss, lr=0.2, batch_size=32, epochs=15,
            measure=False,
        )  # fmt: skip
        found[outputs] = (model, data.x[:EXAMPLES], data.y[:EXAMPLES])
    return found


def margins(trained: Trained, attack: mf.attacks.Attack | None, seed: int = 0) -> Tensor:
    return mf.adversarial_margins(*trained, attack, normalize=False, seed=seed).values


def robust(values: Tensor) -> float:
    return float((values > 0).double().mean())


@pytest.mark.parametrize("norm", BUDGETS)
@pytest.mark.parametrize("outputs", CLASSES)
def test_it_is_at_least_as_strong_as_pgd(
    networks: dict[int, Trained], outputs: int, norm: str
) -> None:
    trained, eps = networks[outputs], BUDGETS[norm]
    attack = AutoAttack(norm, eps, queries=200)
    found = margins(trained, attack)
    once = least = margins(trained, PGD(norm, eps, steps=60, bounds=(0, 1)))
    for seed in range(3):
        pgd = PGD(norm, eps, steps=60, random_start=True, bounds=(0, 1))
        least = torch.minimum(least, margins(trained, pgd, seed))
    # Something is left to lose, and something is lost.
    assert 0.1 < robust(least) < robust(margins(trained, None)) - 0.05
    assert robust(found) <= robust(least)
    # Its margins are as small as those of PGD once, also of examples whose class does not change.
    assert float(found.mean()) <= float(once.mean()) + 0.02 * float(once.abs().mean())
    assert float(found.min()) <= float(once.min()) + 0.01 * float(once.abs().max())

    model, x, y = trained
    delta = attack(model, x, y, generator=torch.Generator().manual_seed(0)).delta
    assert float(delta.flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1).max()) <= (
        eps * (1 + 1e-6)
    )
    assert float((x + delta).min()) >= 0
    assert float((x + delta).max()) <= 1
    assert torch.equal(found, margins(trained, attack))


def test_torchattacks_own_standard_version_is_no_stronger(networks: dict[int, Trained]) -> None:
    """Theirs, with its four parts as they are, needs four classes."""
    torchattacks = importlib.import_module("torchattacks")
    model, x, y = networks[5]
    eps = BUDGETS["linf"]
    standard = torchattacks.AutoAttack(copy.deepcopy(model), eps=eps, n_classes=5, seed=0)
    # Its Square alone would take most of the time.
    standard._autoattack.attacks[-1].n_queries = 300
    moved = standard(x, y)
    theirs = margins((model, moved, y), None)
    assert robust(margins((model, x, y), AutoAttack("linf", eps, queries=300))) <= robust(theirs)
    three = torchattacks.AutoAttack(copy.deepcopy(networks[3][0]), eps=eps, n_classes=3, seed=0)
    with pytest.raises(IndexError):
        three(*networks[3][1:])


def test_what_is_run() -> None:
    assert AutoAttack.parts(2) == ("apgd-margin", "apgd-ce", "fab-t", "square")
    for classes in (3, 4, 10):
        assert AutoAttack.parts(classes) == ("apgd-margin", "apgd-ce", "apgd-t", "fab-t", "square")


@pytest.mark.parametrize("norm", BUDGETS)
def test_scaling_the_weights_does_not_switch_it_off(
    networks: dict[int, Trained], norm: str
) -> None:
    """Every layer × 16: cross-entropy fades in float32, its other parts do not."""
    model, x, y = networks[1]
    large = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.mul_(16)
    attack = AutoAttack(norm, BUDGETS[norm], queries=100)
    theirs = PGD(norm, BUDGETS[norm], steps=60, bounds=(0, 1), objective="loss")
    # The random starts are the same, the comparisons of APGD may differ by a rounding.
    before, after = (robust(margins((net, x, y), attack)) for net in (model, large))
    assert abs(before - after) <= 2 / EXAMPLES
    assert robust(margins((large, x, y), theirs)) > after + 0.05


def test_inputs_that_are_no_images_and_have_no_bounds() -> None:
    """On a linear predictor the least margin is known: m − ε‖w‖_q."""
    data = mf.load("separable:n=30,d=3,margin=0.1")
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    clean = margins((model, data.x, data.y), None)
    for bounds in (None, (-8.0, 8.0)):
        for norm, dual in (("linf", 1), ("l2", 2)):
            attack = AutoAttack(norm, 0.3, bounds=bounds, steps=50, queries=50)
            assert build(attack.spec).spec == attack.spec  # type: ignore[union-attr]
            found = margins((model, data.x, data.y), attack)
            length = float(torch.linalg.vector_norm(model.weight.detach(), ord=dual))
            least = clean - 0.3 * length
            # It stops looking at an example once its class has changed.
            alive = found > 0
            torch.testing.assert_close(found[alive], least[alive], atol=2e-4, rtol=0)
            assert torch.equal(alive, least > 0)
            assert bool((found >= least - 1e-5).all())


def test_specifications_and_what_is_refused() -> None:
    attack = build("autoattack-l2:eps=3/4,steps=7,bounds=-1..1")
    assert isinstance(attack, AutoAttack)
    assert attack.spec == "autoattack-l2:eps=0.75,steps=7,queries=5000,bounds=-1.0..1.0"
    assert (attack.eps, attack.p, attack.steps, attack.random) == (0.75, 2.0, 7, True)
    assert AutoAttack("linf", 0).with_eps(0.1).eps == 0.1
    with pytest.raises(SpecificationError, match="expected the norm 'linf' or 'l2', got 'l1'"):
        AutoAttack("l1", 0.1)
    with pytest.raises(InputError, match="steps: expected a whole number of at least 1"):
        AutoAttack("l2", 0.1, steps=0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), torch.rand(3, 1, 4, 4)
    y = torch.tensor([1, -1, 1])
    still = AutoAttack("linf", 0.0)(model, x, y, generator=torch.Generator())
    assert torch.equal(still.delta, torch.zeros_like(x))
