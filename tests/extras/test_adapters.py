"""Other libraries' attacks as ours, and ours in their conventions, with the real libraries.

The objectives coincide where nothing saturates: for one output always, with several classes where ours has
``objective="loss"``. Then the perturbations are the same to 1e-6 in float32 in both directions.
Signs of gradients that are rounding noise are avoided by the choice of examples, not masked: the inputs
are random, so no pixel is without influence.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import FGM, FGSM, PGD, Attack, build
from marginflow.cli import main
from marginflow.errors import InputError, SpecificationError
from marginflow.norms import per_example_norm

pytestmark = [
    pytest.mark.extras,
    # foolbox imports scipy.ndimage.filters, which scipy 2 will not have.
    pytest.mark.filterwarnings(
        "ignore:Please import `gaussian_filter` from the `scipy.ndimage` namespace:DeprecationWarning"
    ),
]

TOLERANCE = 1e-6
N = 12


def ours(kind: str, objective: str = "margin") -> Attack:
    more: dict[str, Any] = {"bounds": (0, 1), "objective": objective}
    return {
        "fgm": FGM(0.6, **more),
        "fgsm": FGSM(0.1, **more),
        "pgd-l2": PGD("l2", 0.6, steps=5, step_size=0.2, **more),
        "pgd-linf": PGD("linf", 0.1, steps=5, step_size=0.03, **more),
    }[kind]


THEIRS = {
    "foolbox-fgm": "foolbox:L2FastGradientAttack,eps=0.6",
    "foolbox-fgsm": "foolbox:LinfFastGradientAttack,eps=0.1",
    "foolbox-pgd-l2": "foolbox:L2PGD,eps=0.6,steps=5,abs_stepsize=0.2,random_start=false",
    "foolbox-pgd-linf": "foolbox:LinfPGD,eps=0.1,steps=5,rel_stepsize=0.3,random_start=false",
    # torchattacks has no FGM, but one step as long as the budget is the same thing.
    "torchattacks-fgm": "torchattacks:PGDL2,eps=0.6,steps=1,alpha=0.6,random_start=false",
    "torchattacks-fgsm": "torchattacks:FGSM,eps=0.1",
    "torchattacks-pgd-l2": "torchattacks:PGDL2,eps=0.6,steps=5,alpha=0.2,random_start=false",
    "torchattacks-pgd-linf": "torchattacks:PGD,eps=0.1,steps=5,alpha=0.03,random_start=false",
    "art-fgm": "art:FastGradientMethod,eps=0.6,norm=2",
    "art-fgsm": "art:FastGradientMethod,eps=0.1,norm=inf",
    "art-pgd-l2": "art:ProjectedGradientDescent,eps=0.6,norm=2,max_iter=5,eps_step=0.2",
    "art-pgd-linf": "art:ProjectedGradientDescent,eps=0.1,norm=inf,max_iter=5,eps_step=0.03",
}
KINDS = ("fgm", "fgsm", "pgd-l2", "pgd-linf")


def network(classes: int) -> nn.Module:
    model = mf.models.mlp(64, 32, 16, classes, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def data(classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    # Never at the bounds, where ART projects in another order.
    x = 0.4 + 0.2 * torch.rand(N, 1, 8, 8, generator=generator)
    y = torch.arange(N) % 2 * 2 - 1 if classes == 1 else torch.arange(N) % classes
    return x, y


def numbered(y: Tensor, classes: int) -> Tensor:
    return (y > 0).long() if classes == 1 else y


def start(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- their attacks as ours


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("name", THEIRS)
def test_theirs_are_ours(name: str, classes: int) -> None:
    attack = build(THEIRS[name])
    assert attack is not None
    model, (x, y) = network(classes), data(classes)
    expected = ours(name.partition("-")[2], "margin" if classes == 1 else "loss")(model, x, y).delta
    found = attack(model, x, y, generator=start()).delta
    assert float(expected.abs().amax(dim=(1, 2, 3)).min()) > 0.02
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


RANDOM = {
    "foolbox": "foolbox:LinfPGD,eps=0.1,steps=3",
    "foolbox-l2": "foolbox:L2PGD,eps=0.5,steps=3",
    "foolbox-noise": "foolbox:L2AdditiveGaussianNoiseAttack,eps=0.5",
    "torchattacks": "torchattacks:PGD,eps=0.1,steps=3",
    "torchattacks-apgd": "torchattacks:APGD,eps=0.5,norm=L2,steps=5",
    "torchattacks-square": "torchattacks:Square,eps=0.1,n_queries=10",
    "art": "art:ProjectedGradientDescent,eps=0.1,eps_step=0.05,max_iter=3,num_random_init=1",
    "art-square": "art:SquareAttack,eps=0.1,max_iter=5",
}
SMALLEST = {
    "foolbox-deepfool": "foolbox:L2DeepFoolAttack,eps=0.5",
    "foolbox-cw": "foolbox:L2CarliniWagnerAttack,eps=0.5,steps=5,binary_search_steps=2",
    "torchattacks-cw": "torchattacks:CW,eps=0.5,steps=5,lr=0.1",
    "torchattacks-fab": "torchattacks:FAB,eps=0.1,steps=3",
    "art-deepfool": "art:DeepFool,eps=0.5,max_iter=5",
}


@pytest.mark.parametrize("spec", [*RANDOM.values(), *SMALLEST.values()], ids=[*RANDOM, *SMALLEST])
@pytest.mark.parametrize("classes", [1, 4])
def test_a_seed_says_all_and_the_model_stays_as_it_was(spec: str, classes: int) -> None:
    attack = build(spec)
    assert attack is not None
    model, (x, y) = network(classes).train(), data(classes)
    # Some of these leave examples alone that are classified wrongly.
    outputs = model(x).detach()
    y = outputs.argmax(dim=1) if classes > 1 else outputs.reshape(-1).sign().long()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    kept = x.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002

    first = attack(model, x, y, generator=start()).delta
    again = attack(model, x, y, generator=start()).delta
    other = attack(model, x, y, generator=start(1)).delta

    assert torch.equal(first, again)
    if not attack.random:
        assert torch.equal(first, other)
    elif spec in RANDOM.values():
        assert not torch.equal(first, other)
    assert float(per_example_norm(first, attack.p).max()) <= attack.eps * (1 + 1e-6)
    assert float((x + first).min()) >= 0
    assert float((x + first).max()) <= 1
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert torch.equal(x, kept)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter.grad, torch.ones_like(parameter))


@pytest.mark.parametrize("spec", [*THEIRS.values(), *RANDOM.values(), *SMALLEST.values()])
def test_a_specification_builds_the_same_attack_again(spec: str) -> None:
    first = build(spec)
    assert first is not None
    second = build(first.spec)
    assert second is not None
    assert second.spec == first.spec
    assert (second.eps, second.p, second.bounds) == (first.eps, first.p, first.bounds)
    assert second.random == first.random
    model, (x, y) = network(1), data(1)
    deltas = [attack(model, x, y, generator=start()).delta for attack in (first, second)]
    assert torch.equal(*deltas)


def test_making_an_attack_draws_no_global_random_numbers() -> None:
    """Of a library's class a first one is made on a network, which has weights."""
    makes: list[Callable[[], Any]] = [
        lambda spec=spec: build(spec)
        for spec in (*THEIRS.values(), *RANDOM.values(), *SMALLEST.values())
    ]
    makes += [
        lambda: mf.attacks.from_foolbox("LinfPGD", eps=0.1),
        lambda: mf.attacks.from_torchattacks("PGD", eps=0.1),
        lambda: mf.attacks.from_art("ProjectedGradientDescent", eps=0.1),
        lambda: build("autoattack-linf:eps=0.1"),
    ]
    for make in makes:
        of_torch, of_numpy, of_python = (
            torch.get_rng_state(),
            np.random.get_state(),  # noqa: NPY002
            random.getstate(),
        )
        make()
        assert torch.equal(torch.get_rng_state(), of_torch)
        assert all(map(np.array_equal, np.random.get_state(), of_numpy))  # noqa: NPY002
        assert random.getstate() == of_python


def test_attacks_given_as_objects() -> None:
    foolbox, torchattacks = (importlib.import_module(m) for m in ("foolbox", "torchattacks"))
    evasion = importlib.import_module("art.attacks.evasion")
    model, (x, y) = network(1), data(1)
    pairs = [
        (
            mf.attacks.from_foolbox(foolbox.attacks.LinfPGD(steps=5, random_start=False), 0.1),
            "foolbox:LinfPGD,eps=0.1,steps=5,random_start=false",
        ),
        (
            mf.attacks.from_torchattacks(torchattacks.PGD, 0.1, steps=5),
            "torchattacks:pgd,eps=0.1,steps=5",
        ),
        (
            mf.attacks.from_torchattacks(lambda m: torchattacks.FGSM(m, eps=0.1), 0.1, "linf"),
            "torchattacks:FGSM,eps=0.1",
        ),
        (
            mf.attacks.from_art(evasion.FastGradientMethod, 0.6, 2),
            "art:FastGradientMethod,eps=0.6,p=l2",
        ),
        (
            mf.attacks.from_art(lambda e: evasion.FastGradientMethod(e, eps=0.1), 0.1, "linf"),
            "art:FastGradientMethod,eps=0.1",
        ),
    ]
    for attack, spec in pairs:
        same = build(spec)
        assert same is not None
        found, expected = (a(model, x, y, generator=start()).delta for a in (attack, same))
        assert torch.equal(found, expected)
        if "(" not in attack.spec:
            assert attack.spec == same.spec
        else:
            with pytest.raises(SpecificationError, match="give the attack itself, as attack=…"):
                build(attack.spec)
    repeated = mf.attacks.from_foolbox(foolbox.attacks.LinfPGD(steps=2).repeat(3), 0.1)
    assert repeated.spec.startswith("foolbox(Repeated, ")


def test_inputs_without_bounds_and_without_image_shape() -> None:
    """foolbox and ART take them as they are; torchattacks sees a square of pixels in [0, 1]."""
    model = mf.models.mlp(7, 16, 1, seed=0)
    x = 0.3 + 0.4 * torch.rand(N, 7, generator=start())
    y = torch.arange(N) % 2 * 2 - 1
    for spec, same in [
        ("foolbox:L2FastGradientAttack,eps=0.2,bounds=none", FGM(0.2)),
        ("art:FastGradientMethod,eps=0.2,norm=2,bounds=none", FGM(0.2)),
        ("torchattacks:PGDL2,eps=0.2,steps=1,alpha=0.2,random_start=false", FGM(0.2)),
    ]:
        attack = build(spec)
        assert attack is not None
        far = 10 * x if attack.bounds is None else x
        found, expected = attack(model, far, y).delta, same(model, far, y).delta
        torch.testing.assert_close(found, expected, atol=5 * TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("torchattacks:PGDL3,eps=1", "did you mean 'PGDL2'"),
        ("foolbox:LinfPGB,eps=1", "did you mean 'LinfPGD'"),
        ("art:FastGradientMethd,eps=1", "did you mean 'FastGradientMethod'"),
        ("torchattacks:PGD,eps=1,stepz=3", "did you mean 'steps'"),
        ("foolbox:LinfPGD,eps=1,step=3", "did you mean 'steps'"),
        ("art:ProjectedGradientDescent,eps=1,max_iterations=3", "did you mean 'max_iter'"),
        ("torchattacks:PGD,eps=1,steps=many", "expected a number"),
        ("foolbox:LinfPGD,eps=1,random_start=3", "expected true or false"),
        ("torchattacks:OnePixel,eps=1", "expected the norm of its ball, as in p=2"),
        ("torchattacks:APGD,eps=1,norm=L7", "expected the norm l1, l2 or linf"),
        ("torchattacks:AutoAttack,eps=1", "use mf.attacks.AutoAttack"),
        ("foolbox:LinfPGD,eps=-1", "expected a number of at least 0"),
        ("art:ProjectedGradientDescent,eps=0.1,max_iter=-3", "art: ProjectedGradientDescent"),
    ],
)
def test_what_cannot_be_built(spec: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(spec)


def test_what_is_no_attack_of_theirs() -> None:
    torchattacks = importlib.import_module("torchattacks")
    bound = torchattacks.PGD(nn.Linear(2, 2))
    for make, given in itertools.product(
        (mf.attacks.from_foolbox, mf.attacks.from_torchattacks, mf.attacks.from_art), (7, None)
    ):
        with pytest.raises(InputError, match="expected"):
            make(given, 0.1)
    with pytest.raises(InputError, match="has its model already fits no other"):
        mf.attacks.from_torchattacks(bound, 0.1)
    with pytest.raises(InputError, match="expected one norm"):
        mf.attacks.from_art("FastGradientMethod", 0.1, 2, norm=math.inf)
    theirs = importlib.import_module("foolbox").attacks.LinfPGD()
    with pytest.raises(InputError, match="expected no options with an attack"):
        mf.attacks.from_foolbox(theirs, 0.1, steps=3)


# --- ours in their conventions


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_ours_by_their_calls(kind: str, classes: int) -> None:
    model, (x, y) = network(classes).eval(), data(classes)
    attack, labels = ours(kind), numbered(y, classes)
    expected = x + attack(model, x, y).delta

    by_torchattacks = mf.attacks.to_torchattacks(attack, model)(x, labels)
    fmodel = mf.attacks.to_foolbox_model(model)
    raw, clipped, success = mf.attacks.to_foolbox(attack)(fmodel, x, labels, epsilons=attack.eps)
    estimator = mf.attacks.to_art(copy.deepcopy(model), x)
    by_art = mf.attacks.to_art_attack(attack, estimator).generate(x.numpy(), labels.numpy())

    for found in (by_torchattacks, raw, clipped, torch.from_numpy(by_art)):
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    margins = mf.adversarial_margins(model, x, y, attack, normalize=False)
    assert torch.equal(success, margins.values <= 0)


@pytest.mark.parametrize("classes", [1, 4])
def test_foolboxs_evaluation_runs_on_our_networks(classes: int) -> None:
    foolbox = importlib.import_module("foolbox")
    model, (x, y) = network(classes).eval(), data(classes)
    labels = numbered(y, classes)
    fmodel = mf.attacks.to_foolbox_model(model)
    clean = mf.adversarial_margins(model, x, y, normalize=False).accuracy
    assert foolbox.accuracy(fmodel, x, labels) == pytest.approx(clean)

    attack = PGD("linf", 0.1, steps=5)
    epsilons = [0.0, 0.03, 0.1]
    _, clipped, success = mf.attacks.to_foolbox(attack)(fmodel, x, labels, epsilons=epsilons)
    robust = 1 - success.float().mean(dim=1)
    for eps, moved, share in zip(epsilons, clipped, robust, strict=True):
        # Without bounds of its own the attack has the model's.
        same = PGD("linf", eps, steps=5, bounds=(0, 1))
        expected = mf.adversarial_margins(model, x, y, same, normalize=False)
        assert float(share) == pytest.approx(expected.accuracy)
        assert float((moved - x).abs().max()) <= eps + 1e-7
    # Restarts by foolbox itself are different starts.
    restarts = mf.attacks.to_foolbox(PGD("linf", 0.1, steps=1, random_start=True))
    one, two = (restarts(fmodel, x, labels, epsilons=0.1)[0] for _ in range(2))
    assert not torch.equal(one, two)
    assert restarts.repeat(2)(fmodel, x, labels, epsilons=0.1)[2].shape == (N,)
    assert "pgd-linf" in repr(restarts)
    targeted = foolbox.criteria.TargetedMisclassification(labels)
    with pytest.raises(InputError, match="our attacks are untargeted"):
        restarts(fmodel, x, targeted, epsilons=0.1)


@pytest.mark.parametrize("classes", [1, 4])
def test_torchattacks_evaluation_runs_on_our_attacks(
    classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torchattacks = importlib.import_module("torchattacks")
    model, (x, y) = network(classes).train(), data(classes)
    labels = numbered(y, classes)
    attack = PGD("linf", 0.1, steps=5, bounds=(0, 1))
    found = mf.attacks.to_torchattacks(attack, model)
    robust = mf.adversarial_margins(model, x, y, attack, normalize=False).accuracy
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=5)

    path = tmp_path / "adversarial.pt"
    accuracy, _, _ = found.save(loader, path, return_verbose=True)
    assert accuracy == pytest.approx(100 * robust)
    assert "Robust accuracy" in capsys.readouterr().out
    stored = torch.load(path, weights_only=True)["adv_inputs"]
    torch.testing.assert_close(stored, x + attack(model, x, y).delta, atol=TOLERANCE, rtol=0)

    fgsm = mf.attacks.to_torchattacks(FGSM(0.1, bounds=(0, 1)), model)
    assert fgsm.model is found.model
    both = torchattacks.MultiAttack([fgsm, found, torchattacks.PGD(found.model, eps=0.1)])
    moved = both(x, labels)
    with torch.no_grad():
        share = float((found.model(moved).argmax(dim=1) == labels).double().mean())
    assert share <= robust
    assert "pgd-linf" in repr(found)
    assert model.training


def test_torchattacks_normalisation() -> None:
    """A network that wants (x − 0.5)/0.25 is attacked in pixels, and handed normalised images."""
    model, (x, y) = network(1).eval(), data(1)
    attack = FGSM(0.1, bounds=(0, 1))
    found = mf.attacks.to_torchattacks(attack, model)
    found.set_normalization_used(mean=[0.5], std=[0.25])
    moved = found((x - 0.5) / 0.25, numbered(y, 1))

    class InPixels(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            output: Tensor = model((z - 0.5) / 0.25)
            return output

    expected = (x + attack(InPixels(), x, y).delta - 0.5) / 0.25
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("classes", [1, 4])
def test_arts_evaluation_runs_on_our_networks(classes: int) -> None:
    metrics, utils = (importlib.import_module(f"art.{m}") for m in ("metrics", "utils"))
    model, (x, y) = network(classes).eval(), data(classes)
    labels = numbered(y, classes)
    attack = PGD("linf", 0.05, steps=5)
    estimator = mf.attacks.to_art(model, x)
    one_hot = utils.to_categorical(labels.numpy(), estimator.nb_classes)
    clean = mf.adversarial_margins(model, x, y, normalize=False).values > 0
    robust = mf.adversarial_margins(model, x, y, attack.with_bounds((0, 1)), normalize=False).values

    accuracy, coverage = utils.compute_accuracy(estimator.predict(x.numpy()), one_hot)
    assert coverage == 1  # two logits that sum to 0 would pass for abstentions
    assert accuracy == pytest.approx(float(clean.double().mean()))
    crafter = mf.attacks.to_art_attack(attack, estimator, batch_size=5)
    moved = crafter.generate(x.numpy(), one_hot)
    accuracy, _ = utils.compute_accuracy(estimator.predict(moved), one_hot)
    assert accuracy == pytest.approx(float((robust > 0).double().mean()))
    # Without labels, the predictions: those classified rightly keep their labels.
    share = metrics.adversarial_accuracy(
        estimator, x.numpy(), labels.numpy(), attack_crafter=crafter
    )
    assert share == pytest.approx(float(((robust > 0) & clean).sum() / clean.sum()))
    size = metrics.empirical_robustness(
        estimator, x.numpy(), "fgsm", {"eps_step": 0.05, "eps": 3.0, "norm": 2}
    )
    assert 0 < size < 1
    crafter.set_params(eps=0.0)
    np.testing.assert_array_equal(crafter.generate(x.numpy(), one_hot), x.numpy())
    with pytest.raises(InputError, match="norm: expected inf, got 2"):
        crafter.set_params(norm=2)
    with pytest.raises(InputError, match="expected a PyTorchClassifier"):
        mf.attacks.to_art_attack(attack, model)


# --- in the rest of the library


SMALL = ["--data", "digits:3,8", "--model", "mlp:16", "--batch-size", "64", "--epochs", "3"]


@pytest.mark.parametrize(
    "attack",
    [
        "foolbox:LinfPGD,eps=0.1,steps=3,rel_stepsize=0.4",
        "torchattacks:PGDL2,eps=0.6,steps=3,alpha=0.3",
    ],
)
def test_the_command_line(attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained against one of theirs, measured under another, verified and drawn."""
    out = tmp_path / "run"
    assert main(["train", *SMALL, "--attack", attack, "--quiet", "--out", str(out)]) == 0
    named = build(attack)
    assert named is not None
    assert mf.load_run(out).config["attack"] == named.spec
    capsys.readouterr()
    pgd = "torchattacks:PGD,eps=0.1,steps=5,alpha=0.03,random_start=false"
    same = "pgd-linf:eps=0.1,steps=5,step=0.03,bounds=0..1"
    assert main(["measure", str(out), "--attack", pgd, "--attack", same, "--json"]) == 0
    theirs, native = json.loads(capsys.readouterr().out)
    assert theirs["attack"] == "torchattacks:PGD,alpha=0.03,random_start=false,steps=5,eps=0.1"
    assert theirs["accuracy"] == native["accuracy"]
    assert main(["verify", str(out)]) == 0
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert named.spec.partition(":")[0] in (tmp_path / "page.html").read_text(encoding="utf-8")

    # What was interrupted goes on to the same bits.
    longer = [*SMALL[:-1], "4"]
    full = tmp_path / "full"
    assert main(["train", *longer, "--attack", attack, "--quiet", "--out", str(full)]) == 0
    assert main(["train", "--resume", "--out", str(out), "--epochs", "4", "--quiet"]) == 0
    last: Callable[[Path], dict[str, Tensor]] = lambda p: mf.load_run(p).load_model().state_dict()  # noqa: E731
    assert all(
        torch.equal(a, b) for a, b in zip(last(out).values(), last(full).values(), strict=True)
    )


def test_a_monitor_and_a_training_take_an_attack_that_no_string_builds(tmp_path: Path) -> None:
    torchattacks = importlib.import_module("torchattacks")
    data = mf.load("digits:3,8")
    attack = mf.attacks.from_torchattacks(
        lambda model: torchattacks.PGD(model, eps=0.1, steps=2), 0.1, "linf"
    )
    run = mf.train("mlp:8", data, attack=attack, epochs=2, batch_size=64, out=tmp_path / "run")
    assert run.config["attack"] == "torchattacks(<lambda>, eps=0.1, p=inf)"
    with pytest.raises(InputError, match="attack=…"):
        mf.verify(run)
    assert mf.verify(run, attack=attack)
    record = mf.Monitor(run.load_model(), (data.x, data.y), attack).measure(step=1)
    assert record["adversarial_accuracy"] <= record["clean_accuracy"]
