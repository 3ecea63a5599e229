"""Section 3.2 at single points: every attack, both derivatives, every activation, float64.

The oracles are central differences of the loss and of the margins, example by example, with the
perturbation computed anew at every set of weights (``total``) or held (``detached``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from naive_flows import net
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import FGM, FGSM, PGD, Attack, Derivative, ExactLinear, FiniteSet
from marginflow.runs import Run
from marginflow.theorems import Evidence
from marginflow.theorems.lemma_3 import lemma_3
from marginflow.theorems.lemma_4 import lemma_4
from marginflow.theorems.lemma_9 import lemma_9
from marginflow.theorems.lemma_10 import lemma_10
from marginflow.theorems.lemma_11 import lemma_11
from marginflow.theorems.lemma_13 import lemma_13
from marginflow.theorems.theorem_4 import _sides, theorem_4

DELTAS = torch.tensor([[0.2, 0.0, -0.2], [0.0, -0.3, 0.1], [-0.1, 0.2, 0.2], [0.0, 0.0, 0.0]])
GENERAL: dict[str, Attack | None] = {
    "none": None,
    "fgm": FGM(eps=0.4),
    "fgsm": FGSM(eps=0.2),
    "pgd-l2": PGD("l2", eps=0.4, steps=3, step_size=0.2),
    "pgd-linf": PGD("linf", eps=0.2, steps=3, step_size=0.1),
    "pgd-l2-random": PGD("l2", eps=0.4, steps=2, step_size=0.2, random_start=True),
    "pgd-linf-random": PGD("linf", eps=0.2, steps=2, step_size=0.1, random_start=True),
    "finite-set": FiniteSet(DELTAS.double()),
}
EXACT: dict[str, Attack | None] = {
    "exact-1.5": ExactLinear(1.5, 0.1),
    "exact-2": ExactLinear(2.0, 0.1),
    "exact-inf": ExactLinear("linf", 0.1),
}
ATTACKS = {**GENERAL, **EXACT}
ACTIVATIONS = ["identity", "relu", "leaky-relu", "squared-relu"]
CASES = [(a, n) for a in ACTIVATIONS for n in ([*GENERAL, *EXACT] if a == "identity" else GENERAL)]
KINKED = ("relu", "leaky-relu")


def data(n: int = 6) -> mf.Dataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return mf.Dataset(x, torch.sign(x[:, 0] * x[:, 1] + 0.2).long())


@functools.cache
def evidence(activation: str, name: str, derivative: Derivative = "total") -> Evidence:
    """Three epochs of a network with three layers: four points of a path."""
    attack = ATTACKS[name]
    model = net(3, 4, 3, 1, activation=activation, seed=4)
    run = mf.train(
        model, data(), attack=attack, loss="exponential", lr=0.1, epochs=3,
        derivative=derivative, keep_weights=True,
    )  # fmt: skip
    return Evidence(run, data(), attack=attack)


def perturbed(attack: Attack | None, model: nn.Module, d: mf.Dataset) -> Tensor:
    if attack is None:
        return d.x
    draw = torch.Generator().manual_seed(0)
    return d.x + attack(model, d.x, d.y, generator=draw).delta


def margin_list(model: nn.Module, z: Tensor, d: mf.Dataset) -> list[float]:
    """y_i f(x_i + δ_i)."""
    with torch.no_grad():
        outputs = model(z).reshape(-1).tolist()
    return [label * f for label, f in zip(d.y.tolist(), outputs, strict=True)]


def loss_of(model: nn.Module, z: Tensor, d: mf.Dataset) -> float:
    return math.fsum(math.exp(-m) for m in margin_list(model, z, d)) / d.n


def layer_norms(model: nn.Module) -> list[float]:
    return [math.sqrt(float(p.detach().square().sum())) for p in model.parameters()]


def differences(model: nn.Module, value: Callable[[], float], h: float = 1e-6) -> list[Tensor]:
    """Central differences of ``value()`` by every weight."""
    found = []
    for p in model.parameters():
        flat = p.data.view(-1)
        slopes = torch.empty_like(flat)
        for k in range(len(flat)):
            at = float(flat[k])
            flat[k] = at + h
            up = value()
            flat[k] = at - h
            slopes[k] = (up - value()) / (2 * h)
            flat[k] = at
        found.append(slopes.view_as(p))
    return found


def agrees(activation: str, name: str) -> bool:
    """Whether holding δ fixed changes nothing, by the notes: exact, or piecewise constant."""
    exact = name in ("none", "finite-set", *EXACT)
    constant = name in ("fgsm", "pgd-linf", "pgd-linf-random")
    linear = activation == "identity" and not name.endswith("random")
    return exact or constant or linear


# Lemma 3


@pytest.mark.parametrize(("activation", "name"), CASES)
def test_lemma_3(activation: str, name: str) -> None:
    verdict = lemma_3(evidence(activation, name))
    if name == "none":
        assert verdict.outcome == "does not apply"
        assert "a perturbation" in verdict.measured
        return
    assert verdict.outcome == "holds"
    changed, _, total = verdict.measured.split()[:3]
    assert int(changed) == 0
    assert int(total) == 4 * 3 * 6 * 3  # points, draws, examples, features


def test_lemma_3_examines_standard_training_as_it_was_measured() -> None:
    run = mf.train(net(3, 4, 1), data(), measure_with="fgm:eps=0.3", lr=0.1, epochs=2)
    assert lemma_3(Evidence(run, data())).outcome == "holds"


class Fading(FGM):
    """δ shrinks as the weights grow: no scale invariance, though it says so."""

    def _perturb(self, query: Any, generator: Any) -> tuple[Tensor, Tensor]:
        delta, dead = super()._perturb(query, generator)
        size = torch.stack([p.square().sum() for p in query.model.parameters()]).sum()
        return delta / (1 + size), dead


class Rounded(FGM):
    """One bit off after a scaling by two."""

    def _perturb(self, query: Any, generator: Any) -> tuple[Tensor, Tensor]:
        delta, dead = super()._perturb(query, generator)
        first = next(iter(query.model.parameters())).detach()
        if float(first.abs().max()) > 1:
            delta = torch.nextafter(delta, torch.zeros_like(delta))
        return delta, dead


def with_attack(attack: Attack, activation: str = "squared-relu", **options: Any) -> Evidence:
    d = options.pop("sample", data())
    model = options.pop("model", None) or net(3, 4, 3, 1, activation=activation, seed=4)
    run = mf.train(
        model, d, attack=attack, lr=0.1, epochs=3, keep_weights=True,
        **{"loss": "exponential", "derivative": "total", **options},
    )  # fmt: skip
    return Evidence(run, d, attack=attack)


def test_lemma_3_fails_on_attacks_that_change() -> None:
    for attack in (Fading(0.4), Rounded(0.4)):
        verdict = lemma_3(with_attack(attack))
        print(f"\n{type(attack).__name__}: {verdict.measured}")
        assert verdict.outcome == "fails"


def test_lemma_3_shows_how_many_signs_an_attack_on_the_loss_flips() -> None:
    """Against a count of its own: several classes, all layers multiplied by 2, 3 and 5."""
    d = mf.load("digits:0,1,2,n=60").to(dtype=torch.float64)
    attack = FGSM(0.1, objective="loss")
    model = mf.models.mlp(64, 12, 3, seed=0).double()
    e = with_attack(attack, sample=d, model=model, loss="cross-entropy", derivative="detached")
    verdict = lemma_3(e)
    assert verdict.outcome == "does not apply"
    assert "the attack follows the margin, not the loss" in verdict.measured
    for factor in (2, 3, 5):
        flipped = numbers = 0
        for weights in e.run.trajectory().values():
            signs = []
            for scale in (1, factor):
                scaled = mf.models.mlp(64, 12, 3, seed=0).double()
                with torch.no_grad():
                    for n, p in scaled.named_parameters():
                        p.copy_(scale * weights[n])
                x = d.x.clone().requires_grad_()
                loss = torch.nn.functional.cross_entropy(scaled(x), d.y, reduction="sum")
                signs.append(torch.autograd.grad(loss, x)[0].sign())
            flipped += int((signs[0] != signs[1]).sum())
            numbers += signs[0].numel()
        assert flipped > 0
        assert f"×{factor} {flipped / numbers:.2%}" in verdict.measured
    print(f"\n{verdict.measured}")


# Lemma 4


@pytest.mark.parametrize("derivative", ["detached", "total"])
@pytest.mark.parametrize(("activation", "name"), CASES)
def test_lemma_4(activation: str, name: str, derivative: Derivative) -> None:
    """⟨W_k, G_k⟩ as the slope of L as layer k is stretched, −c_k ν by a loop, and ours."""
    e = evidence(activation, name)
    verdict = lemma_4(e)
    assert verdict.outcome == "holds"
    attack, site = ATTACKS[name], e.sites[-1]
    model, d = site.model, data()
    held = perturbed(attack, model, d)
    nu = math.fsum(math.exp(-m) * m for m in margin_list(model, held, d)) / d.n
    loss = loss_of(model, held, d)
    found = site.inner(site.slope(derivative).gradients).tolist()
    q = 2 if activation == "squared-relu" else 1
    for k, p in enumerate(model.parameters()):
        before, values = p.detach().clone(), []
        for a in (1 + 1e-5, 1 - 1e-5):
            p.data = a * before
            values.append(
                loss_of(model, held if derivative == "detached" else perturbed(attack, model, d), d)
            )
        p.data = before
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(-(q ** (2 - k)) * nu, rel=1e-6)
        assert loss * found[k] == pytest.approx(slope, rel=1e-6)
    assert site.slope(derivative).nu * loss == pytest.approx(nu, rel=1e-12)


def test_lemma_4_without_scale_invariance() -> None:
    """Through δ(W) it is off, and only the derivative with δ held is judged where that was used."""
    d = mf.load("digits:0,1,2,n=30").to(dtype=torch.float64)
    attack = PGD("l2", eps=0.5, steps=2, step_size=0.3, objective="loss")
    options: dict[str, Any] = {"sample": d, "loss": "cross-entropy"}
    models = [mf.models.mlp(64, 6, 3, activation="squared-relu", seed=0).double() for _ in "ab"]
    total = lemma_4(with_attack(attack, model=models[0], derivative="total", **options))
    held = lemma_4(with_attack(attack, model=models[1], derivative="detached", **options))
    print(f"\n{total.measured}")
    assert total.outcome == "does not apply"
    assert "a scale invariant attack (Definition 1)" in total.measured
    assert float(total.measured.rsplit(" ", 1)[1]) > 1e-4
    assert held.outcome == "holds"
    assert "total" not in held.measured


@pytest.mark.parametrize("derivative", ["detached", "total"])
def test_lemma_4_for_several_classes(derivative: Derivative) -> None:
    """ν = −(1/n) Σ ⟨∇_f ℓ_i, f_i⟩ by torch's own cross-entropy."""
    d = mf.load("digits:0,1,2,n=30").to(dtype=torch.float64)
    model = mf.models.mlp(64, 5, 4, 3, activation="squared-relu", seed=0).double()
    e = with_attack(FGM(0.5), sample=d, model=model, loss="cross-entropy", derivative=derivative)
    assert lemma_4(e).outcome == "holds"
    site = e.sites[-1]
    z = perturbed(FGM(0.5), site.model, d)
    f = site.model(z).detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(f, d.y)
    nu = -float((torch.autograd.grad(loss, f)[0] * f.detach()).sum())
    assert site.slope(derivative).nu * loss.item() == pytest.approx(nu, rel=1e-12)
    assert theorem_4(e)[0].outcome == "does not apply"


@pytest.mark.parametrize("loss", ["exponential", "logistic"])
def test_nothing_underflows(loss: str) -> None:
    """Margins of thousands: L is 0 in float64, both sides are not."""
    d = mf.Dataset(torch.eye(3, dtype=torch.float64) + 0.5, torch.tensor([1, 1, 1]))
    model = net(3, 4, 3, 1, activation="squared-relu", seed=4)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(5 * p.abs())
    run = mf.train(model, d, attack=FGM(0.1), loss=loss, lr=1e-9, epochs=1, derivative="total")
    assert run.final["log_loss"] < -1000
    e = Evidence(run, d)
    assert lemma_4(e).outcome == "holds"
    assert theorem_4(e)[0].outcome == "holds"
    assert 0 < float(e.sites[0].inner(e.sites[0].slope("total").gradients).abs().min()) < 1e6


# Lemma 9


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lemma_9(activation: str) -> None:
    e = evidence(activation, "none")
    assert lemma_9(e).outcome == "holds"
    model = e.sites[0].model
    q = 2 if activation == "squared-relu" else 1
    for k, p in enumerate(model.parameters()):
        before, outputs = p.detach().clone(), []
        for a in (1, 1 + 1e-5, 1 - 1e-5):
            p.data = a * before
            outputs.append(model(data().x).detach().reshape(-1))
        p.data = before
        f, up, down = outputs
        torch.testing.assert_close((up - down) / 2e-5, q ** (2 - k) * f, rtol=1e-6, atol=1e-9)


def wrong_degrees(e: Evidence, **config: Any) -> Evidence:
    """The same run with the degree of one layer forged."""
    layers = [dict(layer) for layer in e.config["layers"]]
    layers[1]["degree"] += 0.001
    run = Run(
        {**e.run.config, "layers": layers, **config},
        e.run.metrics,
        None,
        e.run.model,
        e.run.weights,
    )
    return Evidence(run, e.data, attack=e.attack)


def test_wrong_degrees_fail_every_identity() -> None:
    e = wrong_degrees(evidence("relu", "fgm"))
    for verdict in (lemma_4(e), lemma_9(e), lemma_13(e), theorem_4(e)[0]):
        print(f"\n{verdict.statement}: {verdict.measured}")
        assert verdict.outcome == "fails"


def test_lemma_9_of_several_outputs_and_convolutions() -> None:
    d = mf.load("digits:0,1,2,n=12")
    model = mf.models.cnn((1, 8, 8), 3, channels=(2, 3), hidden=4, kernel=3, seed=0)
    run = mf.train(model, d, attack="fgm:eps=0.3", lr=0.01, epochs=1)
    e = Evidence(run, d)
    assert "12 examples" in lemma_9(e).measured
    assert "final weights only" in lemma_9(e).measured
    for verdict in (lemma_3(e), lemma_4(e), lemma_9(e), lemma_13(e)):
        assert verdict.outcome == "holds", verdict
    assert lemma_11(e).outcome == "does not apply"  # float32


# Lemma 10


@pytest.mark.parametrize(("activation", "name"), CASES)
def test_lemma_10(activation: str, name: str) -> None:
    """Exactly where δ jumps or follows kinks it does not apply."""
    verdict = lemma_10(evidence(activation, name))
    exact = name in ("finite-set", *EXACT) or (
        activation == "identity" and name in ("fgm", "fgsm", "pgd-l2", "pgd-linf")
    )
    smooth = activation in ("identity", "squared-relu") and name in (
        "fgm",
        "pgd-l2",
        "pgd-l2-random",
    )
    if name == "none":
        assert verdict.outcome == "does not apply"
    elif exact or smooth:
        assert verdict.outcome == "holds"
    else:
        assert verdict.outcome == "does not apply"
        assert "Assumption 2" in verdict.measured
        assert ("kinks" in verdict.measured) == (name.startswith(("fgm", "pgd-l2")))


def jumps_of(text: str) -> tuple[float, float]:
    """|Δm| and ‖Δδ‖ that a verdict shows."""
    words = text.split(" = ")
    return float(words[1].split()[0]), float(words[2].split()[0])


def test_lemma_10_sees_jumps_of_the_margins() -> None:
    """FGSM on a squared-ReLU network jumps, and so do its margins; a finite set's do not."""
    moving: dict[str, tuple[float, float]] = {}
    for attack in (FGSM(0.3), FGM(0.3), FiniteSet(DELTAS.double())):
        moving[attack.name] = jumps_of(
            lemma_10(far_apart(attack)).measured.partition("left after up to")[2]
        )
    print(f"\n{moving}")
    assert min(moving["fgsm"]) > 1e-3
    assert max(moving["fgm"]) < 1e-9
    assert moving["finite-set"][0] < 1e-9
    assert moving["finite-set"][1] > 0.1


def far_apart(attack: Attack) -> Evidence:
    """A path of two points that are not near each other."""
    start, end = (net(3, 6, 1, activation="squared-relu", seed=s) for s in (1, 2))
    run = mf.train(start, data(), attack=attack, lr=1e-6, epochs=1, keep_weights=True)
    for n, w in end.state_dict().items():
        run.weights[1][n].copy_(w)
    return Evidence(run, data(), attack=attack)


class Pretended(FGSM):
    """FGSM that claims to be the exact maximum."""

    exact = True


def test_lemma_10_fails_on_margins_that_jump() -> None:
    verdict = lemma_10(far_apart(Pretended(0.3)))
    print(f"\n{verdict.measured}")
    assert verdict.outcome == "fails"


# Lemma 11


@pytest.mark.parametrize("derivative", ["detached", "total"])
@pytest.mark.parametrize(("activation", "name"), CASES)
def test_lemma_11(activation: str, name: str, derivative: Derivative) -> None:
    assert lemma_11(evidence(activation, name, derivative)).outcome == "holds"


def test_lemma_11_fails_on_a_drift_and_says_what_it_needs() -> None:
    run = evidence("relu", "fgsm").run
    for drift, outcome in ((9e-12, "holds"), (2e-11, "fails")):
        metrics = [*run.metrics[:-1], {**run.metrics[-1], "norm_drift": drift}]
        forged = Run(run.config, metrics, None, run.model, run.weights)
        assert lemma_11(Evidence(forged, data())).outcome == outcome
    for options, words in (
        ({"momentum": 0.5}, "without momentum (momentum 0.5)"),
        ({"dtype": "float32"}, "float64 (float32)"),
        ({"lr": "loss-based"}, "epochs are undone"),
    ):
        run = mf.train(net(3, 4, 1), data(), **{"lr": 0.1, "epochs": 2, **options})
        verdict = lemma_11(Evidence(run, data()))
        assert verdict.outcome == "does not apply"
        assert words in verdict.measured
    run = mf.train(net(3, 1), data(), lr=0.1, epochs=2)
    assert "two layers or more" in lemma_11(Evidence(run, data())).measured


# Lemma 13


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lemma_13(activation: str) -> None:
    verdict = lemma_13(evidence(activation, "none"))
    print(f"\n{activation}: {verdict.measured}")
    if activation not in KINKED:
        assert verdict.outcome == "does not apply"
        assert "∇_x f is continuous" in verdict.measured
        return
    assert verdict.outcome == "holds"
    beside, on = (int(verdict.measured.split(f" {w}")[0].split()[-1]) for w in ("kinks", "of them"))
    assert beside == on > 10


@pytest.mark.parametrize("activation", KINKED)
def test_kinks_are_where_a_unit_vanishes(activation: str) -> None:
    """By the weights themselves: at each kink some unit of some layer is 0 to rounding."""
    e = evidence(activation, "none")
    kinks, (first, second, _) = e.kinks, [p.detach() for p in e.sites[-1].model.parameters()]
    assert kinks is not None
    slope = 0.01 if activation == "leaky-relu" else 0.0
    hidden = kinks.below @ first.T
    deeper = torch.where(hidden > 0, hidden, slope * hidden) @ second.T
    least = torch.minimum(hidden.abs().amin(dim=1), deeper.abs().amin(dim=1))
    assert float(least.max()) < 1e-12
    assert float(kinks.jumps.min()) > 1e-3


def test_torch_on_a_kink_by_weights_in_whole_numbers() -> None:
    """A pre-activation that is 0 exactly: the subgradient torch takes, and both one-sided slopes."""
    model = net(3, 2, 2, 1, activation="leaky-relu")
    whole = [[[1, 2, -1], [1, -1, 2]], [[2, -1], [1, 3]], [[1, -2]]]
    with torch.no_grad():
        for p, w in zip(model.parameters(), whole, strict=True):
            p.copy_(torch.tensor(w))
    x = torch.tensor([[1.0, 1.0, 3.0]], dtype=torch.float64)
    assert (next(iter(model.parameters())) @ x[0])[0].item() == 0.0
    f = model(x).squeeze()
    slopes = torch.autograd.grad(f, list(model.parameters()))
    for p, g in zip(model.parameters(), slopes, strict=True):
        assert (p * g).sum().item() == pytest.approx(f.item(), rel=1e-12)
    for side in (1e-9, -1e-9):
        moved = x + torch.tensor([[side, 0.0, 0.0]], dtype=torch.float64)
        f = model(moved).squeeze()
        for p, g in zip(
            model.parameters(), torch.autograd.grad(f, list(model.parameters())), strict=True
        ):
            assert (p * g).sum().item() == pytest.approx(f.item(), rel=1e-12)


# Theorem 4, the identity


@pytest.mark.parametrize("derivative", ["detached", "total"])
@pytest.mark.parametrize(("activation", "name"), CASES)
def test_the_identity_of_theorem_4(activation: str, name: str, derivative: Derivative) -> None:
    """Both sides by central differences: of L for G, and of each γ̂_i along −G."""
    e = evidence(activation, name, derivative)
    verdict = theorem_4(e)[0]
    applies = derivative == "total" or agrees(activation, name)
    assert verdict.outcome == ("holds" if applies else "does not apply")
    attack, d = ATTACKS[name], data()
    site = e.sites[1]
    model = site.model
    held = perturbed(attack, model, d)
    if derivative == "detached":
        g = differences(model, lambda: loss_of(model, held, d))
    else:
        g = differences(model, lambda: loss_of(model, perturbed(attack, model, d), d))
    start = [p.detach().clone() for p in model.parameters()]
    degrees = site.homogeneity.degrees

    def normalised(h: float) -> list[float]:
        for p, w, v in zip(model.parameters(), start, g, strict=True):
            p.data = w - h * v
        rho = math.prod(r**c for r, c in zip(layer_norms(model), degrees, strict=True))
        return [m / rho for m in margin_list(model, perturbed(attack, model, d), d)]

    h = 1e-6
    up, down = normalised(h), normalised(-h)
    for p, w in zip(model.parameters(), start, strict=True):
        p.data = w
    margins = margin_list(model, held, d)
    left = math.fsum(
        math.exp(-m) * (a - b) / (2 * h) for m, a, b in zip(margins, up, down, strict=True)
    )
    rho = math.prod(r**c for r, c in zip(layer_norms(model), degrees, strict=True))
    across = 0.0
    for w, v in zip(start, g, strict=True):
        unit = w / torch.linalg.vector_norm(w)
        across += float((v - (v * unit).sum() * unit).square().sum())
    right = d.n / rho * across
    if applies:
        assert left == pytest.approx(right, rel=1e-5)
    else:
        assert abs(left / right - 1) > 5e-6  # beyond the differences' error, below 1e-7
        shown = float(verdict.measured.split("measured all the same: ")[1].split()[0])
        assert shown >= 0.9 * abs(left / right - 1)
    ours = _sides(site, derivative)
    scale = rho / d.n / loss_of(model, held, d) ** 2
    assert ours[0] == pytest.approx(left * scale, rel=1e-5)
    assert ours[1] == pytest.approx(right * scale, rel=1e-5)


def test_the_identity_for_the_logistic_loss() -> None:
    """With |ℓ′| in place of e^{−m}."""
    assert theorem_4(with_attack(FGM(0.4), loss="logistic"))[0].outcome == "holds"


def test_the_identity_fails_on_an_attack_that_is_not_what_it_says() -> None:
    verdict = theorem_4(with_attack(Fading(0.4)))[0]
    print(f"\n{verdict.measured}")
    assert verdict.outcome == "fails"


def test_the_identity_needs_two_classes_and_scale_invariance() -> None:
    verdict = theorem_4(with_attack(FGM(0.4, objective="loss")))[0]
    assert verdict.outcome == "does not apply"
    assert "a scale invariant attack" in verdict.measured
