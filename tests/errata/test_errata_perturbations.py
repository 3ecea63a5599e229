"""Networks and perturbations: what Section 3.2 may be applied to."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from errata_formulas import (
    Perturb,
    Sample,
    Weights,
    clean,
    draw,
    fgm,
    fgsm,
    input_gradient,
    measure,
    worst_of,
)
from torch import Tensor, nn

from marginflow import measure_homogeneity
from marginflow.attacks import FGM, FGSM
from marginflow.errors import NotHomogeneousError
from marginflow.models import mlp


def growth(f: Callable[[float], Tensor]) -> tuple[float, float]:
    """f(2)/f(1) over the examples: its least and greatest value."""
    found = f(2.0) / f(1.0)
    return float(found.min()), float(found.max())


@pytest.mark.parametrize("q", [1, 2, 3])
def test_equal_degrees_above_one_do_not_occur(q: int) -> None:
    weights = draw(1, (6, 4), (5, 6), (1, 5))
    s = Sample(draw(2, (5, 4))[0], torch.ones(5).double(), q)

    def scaled(k: int) -> Callable[[float], Tensor]:
        return lambda a: s.f([w * a if i == k else w for i, w in enumerate(weights)], s.x)

    found = [growth(scaled(k)) for k in range(3)]
    for (low, high), c in zip(found, (q**2, q, 1), strict=True):
        assert low == pytest.approx(2**c, rel=1e-12)
        assert high == pytest.approx(2**c, rel=1e-12)
    # Eq. (3) has one c for all layers; the last layer makes it 1, and then q is 1.
    common = {round(low, 6) for low, _ in found}
    assert (len(common) == 1) == (q == 1)
    # Lemma 4 with one c for all layers, and with c_k
    s = Sample(s.x, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64), q)
    at = measure(s, [w / 3 for w in weights], fgm(0.1), total=False)
    inner = [float(w @ g) for w, g in zip(at.weights, at.gradients, strict=True)]
    for value, c in zip(inner, (q**2, q, 1), strict=True):
        assert value == pytest.approx(-c * at.nu, rel=1e-11)
    assert abs(inner[0] + at.nu) == pytest.approx((q**2 - 1) * abs(at.nu), rel=1e-11, abs=1e-14)


class Biased(nn.Module):
    def __init__(self, *, hidden: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6, dtype=torch.float64)
        self.second = nn.Linear(6, 5, bias=hidden, dtype=torch.float64)
        self.last = nn.Linear(5, 1, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))[:, 0]  # type: ignore[no-any-return]


def test_hidden_biases_make_a_network_quasi_homogeneous() -> None:
    x = draw(3, (6, 4))[0]

    def scaled(hidden: bool, **factors: float) -> Tensor:
        model = Biased(hidden=hidden)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(factors.get(name.replace(".", "_"), 1.0))
            return model(x)

    def first(hidden: bool) -> tuple[float, float]:
        return growth(lambda a: scaled(hidden, first_weight=a, first_bias=a))

    assert first(False) == pytest.approx((2, 2), rel=1e-12)  # a bias of the first layer is harmless
    low, high = first(True)
    print(f"\nf(2W_1)/f(W_1) with a hidden bias: {low:.2f} … {high:.2f}")
    assert high - low > 0.2  # no 2^c for all of them
    # quasi-homogeneous: the hidden bias scales like all that is below it
    a, b, c = 2.0, 3.0, 5.0
    found = scaled(
        True, first_weight=a, first_bias=a, second_weight=b, second_bias=a * b, last_weight=c
    )
    torch.testing.assert_close(found, a * b * c * scaled(True), rtol=1e-12, atol=0)
    # Definition 1 goes with it, and the package refuses the network by name
    y = torch.tensor([1, -1] * 3)
    model = Biased(hidden=True)
    one = FGM(eps=0.3)(model, x, y).delta
    with torch.no_grad():
        model.first.weight.mul_(3)
        model.first.bias.mul_(3)
    assert float((FGM(eps=0.3)(model, x, y).delta - one).abs().max()) > 1e-3
    with pytest.raises(NotHomogeneousError, match=r"second\.bias|'second'"):
        measure_homogeneity(model, x)
    measure_homogeneity(Biased(hidden=False), x)


def crossing(pattern: Callable[[float], Tensor], low: float, high: float) -> tuple[float, float]:
    """Neighbouring points, 1e-13 apart, between which the pattern changes."""
    grid = torch.linspace(low, high, 200).tolist()
    for a, b in pairwise(grid):
        if not torch.equal(pattern(a), pattern(b)):
            break
    else:
        raise AssertionError("no crossing")
    before = pattern(a)
    while b - a > 1e-13:
        c = (a + b) / 2
        a, b = (c, b) if torch.equal(pattern(c), before) else (a, c)
    return a, b


START = draw(70, (3, 2), (1, 3))
STEP = draw(5071, (3, 2), (1, 3))
INPUT = draw(9072, (1, 2))[0]


def along(s: float) -> list[Tensor]:
    """A straight path of weights."""
    return [w + s * d for w, d in zip(START, STEP, strict=True)]


def pgd_inf(eps: float) -> Perturb:
    def perturb(s: Sample, weights: Weights, total: bool) -> Tensor:
        delta = torch.zeros_like(s.x)
        for _ in range(3):
            g = input_gradient(Sample(s.x + delta, s.y, s.q), weights, False)
            delta = (delta - eps / 2 * s.y[:, None] * g.sign()).clamp(-eps, eps)
        return delta

    return perturb


@pytest.mark.parametrize(
    ("name", "q", "perturb", "jumps"),
    [
        ("FGSM, squared ReLU", 2, fgsm(0.4), True),
        ("ℓ∞-PGD, squared ReLU", 2, pgd_inf(0.4), True),
        ("FGSM, ReLU", 1, fgsm(0.4), True),
        ("FGM, ReLU", 1, fgm(0.4), True),
        ("FGM, squared ReLU", 2, fgm(0.4), False),
    ],
)
def test_assumption_2_fails_for_sign_perturbations_and_for_fgm_on_relu(
    name: str, q: int, perturb: Perturb, jumps: bool
) -> None:
    """Along a straight path of weights, where the perturbation changes its sign or the network its units."""
    s = Sample(INPUT, torch.ones(1).double(), q)

    def pattern(t: float) -> Tensor:
        w = along(t)
        if "FGM" in name:
            return s.x[0] @ w[0].T > 0
        return perturb(s, w, False).sign()

    def margin(t: float) -> float:
        return float(s.f(along(t), s.x + perturb(s, along(t), False)))

    a, b = crossing(pattern, 0.0, 1.0)
    jump = abs(margin(b) - margin(a))
    print(f"\n{name}: the margin changes by {jump:.2e} over a step of {b - a:.0e}")
    assert (jump > 0.05) if jumps else (jump < 1e-11)


def test_lemma_10_needs_an_exact_inner_maximum() -> None:
    """First part: (80) takes δ(W) for the worst perturbation at W."""
    s = Sample(INPUT, torch.ones(1).double(), 1)
    eps = 0.4

    def margin(w: Weights, delta: Tensor) -> float:
        return float(s.f(w, s.x + delta))

    a, b = crossing(lambda t: s.x[0] @ along(t)[0].T > 0, 0.0, 1.0)
    before, after = along(a), along(b)
    apart = math.sqrt(
        sum(float((u - v).square().sum()) for u, v in zip(before, after, strict=True))
    )
    rule = fgm(eps)
    gaps = [
        margin(w, rule(s, w, False)) - margin(w, rule(s, v, False))
        for w, v in ((before, after), (after, before))
    ]
    assert max(gaps) > 0.2  # (80), (81): at most 0
    quotient = abs(margin(before, rule(s, before, False)) - margin(after, rule(s, after, False)))
    assert quotient / apart > 1e8
    # The worst of a finite set: both hold, for any two points
    generator = torch.Generator().manual_seed(5)
    deltas = torch.randn((12, 2), generator=generator, dtype=torch.float64)
    deltas = eps * deltas / torch.linalg.vector_norm(deltas, dim=1, keepdim=True)
    rule = worst_of(deltas)
    reach = float(torch.linalg.vector_norm(s.x)) + eps
    for t in torch.linspace(0, 1, 60).tolist():
        w, v = along(t), along(t + 1e-3)
        for one, other in ((w, v), (v, w)):
            assert margin(one, rule(s, one, False)) <= margin(one, rule(s, other, False))
        apart = math.sqrt(sum(float((p - r).square().sum()) for p, r in zip(w, v, strict=True)))
        size = max(float(torch.linalg.matrix_norm(p)) for p in (*w, *v))
        change = abs(margin(w, rule(s, w, False)) - margin(v, rule(s, v, False)))
        assert change <= math.sqrt(2) * size * reach * apart  # f's own Lipschitz constant


def test_lemma_10_bounds_another_gradient() -> None:
    """Second part: (85) is about ∂f at a fixed δ; the gradient of m(W) has ∂δ/∂W in it, which jumps."""
    s = Sample(INPUT, torch.ones(1).double(), 2)
    a, b = crossing(lambda t: s.x[0] @ along(t)[0].T > 0, 0.0, 1.0)
    jumps = {}
    for total in (False, True):
        rows = [torch.cat(measure(s, along(t), fgm(0.4), total=total).rows, dim=1) for t in (a, b)]
        jumps[total] = float((rows[1] - rows[0]).abs().max())
    print(f"\njump of the gradient: detached {jumps[False]:.1e}, total {jumps[True]:.2f}")
    assert jumps[True] > 0.2
    assert jumps[False] < 1e-11


def log_gradient(
    s: Sample, weights: Weights, perturb: Perturb
) -> tuple[float, float, tuple[Tensor, ...]]:
    """ℓ, ln(ℓ/ρ) (−∞ for ℓ ≤ 0) and ∇ ln L, differentiated through δ."""
    held = [w.detach().requires_grad_() for w in weights]
    m = s.y * s.f(held, s.x + perturb(s, held, True))
    log_loss = torch.logsumexp(-m, dim=0)
    g = torch.autograd.grad(log_loss, held)
    ell = -float(log_loss.detach())
    log_rho = sum(
        c * math.log(float(torch.linalg.vector_norm(w)))
        for c, w in zip(s.degrees(weights), weights, strict=True)
    )
    return ell, (math.log(ell) if ell > 0 else -math.inf) - log_rho, g


def falls(
    s: Sample,
    weights: list[Tensor],
    perturb: Perturb,
    h: float,
    steps: int,
    until: float = math.inf,
) -> tuple[list[Tensor], list[float]]:
    """Explicit steps of relative length h; by how much ln(ℓ/ρ) fell, wherever it fell."""
    found, before = [], -math.inf
    for _ in range(steps):
        ell, value, g = log_gradient(s, weights, perturb)
        if ell > until:
            break
        if value < before - 1e-13:
            found.append(before - value)
        before = value
        size = math.sqrt(sum(float(w.square().sum()) for w in weights))
        length = math.sqrt(sum(float(v.square().sum()) for v in g))
        weights = [w - h * size * v / length for w, v in zip(weights, g, strict=True)]
    return weights, found


def test_where_assumption_2_fails_the_normalised_margin_falls_at_every_step_size() -> None:
    eps = 0.15
    axes = eps * torch.eye(4, dtype=torch.float64)
    ball = torch.cat([torch.zeros(1, 4).double(), axes, -axes])
    shares = {}
    for name, seed, q, perturb in (
        ("ReLU + FGM", 2, 1, fgm(eps)),
        ("squared ReLU + FGSM", 3, 2, fgsm(eps)),
        ("squared ReLU + FGM", 3, 2, fgm(eps)),
        ("ReLU, worst of a finite set", 1, 1, worst_of(ball)),
        ("squared ReLU, clean", 3, 2, clean),
    ):
        x = draw(seed + 10_000, (8, 4))[0]
        s = Sample(
            x / torch.linalg.vector_norm(x, dim=1, keepdim=True),
            torch.tensor([1.0, -1.0] * 4, dtype=torch.float64),
            q,
        )
        weights, _ = falls(s, draw(seed, (12, 4), (1, 12)), perturb, 1e-2, 1500, until=1.0)
        assert log_gradient(s, weights, perturb)[0] > 1  # L < 1/n from here on
        coarse, fine = (falls(s, weights, perturb, h, 300)[1] for h in (1e-3, 1e-4))
        shares[name] = [(len(f) / 300, max(f, default=0.0)) for f in (coarse, fine)]
        print(f"\n{name}: share of falling steps and largest fall {shares[name]}", end="")
    for name in ("ReLU + FGM", "squared ReLU + FGSM"):
        for share, largest in shares[name]:
            assert share > 0.25
            assert largest > 0.1  # as large at a tenth of the step: jumps
    (_, coarse_fall), (_, fine_fall) = shares["ReLU, worst of a finite set"]
    assert fine_fall < 0.15 * coarse_fall < 0.01  # kinks, not jumps: falls with the step
    for name in ("squared ReLU + FGM", "squared ReLU, clean"):
        assert shares[name] == [(0.0, 0.0), (0.0, 0.0)]


ABS = [torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.ones(1, 2).double()]
"""``f(x) = |x|`` as a ReLU network."""


def test_eq_20_and_the_adversarial_margin_need_an_exact_inner_maximum() -> None:
    s = Sample(torch.tensor([[0.1]], dtype=torch.float64), torch.ones(1).double(), 1)
    eps = 1.0
    shift = fgm(eps)(s, ABS, False)
    assert float(shift) == -1.0
    clean_margin, adversarial = float(s.f(ABS, s.x)), float(s.f(ABS, s.x + shift))
    assert adversarial - clean_margin == pytest.approx(0.8, rel=1e-14)  # γ_i ≥ γ̃_i is printed
    tau = torch.tensor([[-0.1]], dtype=torch.float64)
    assert float(s.f(ABS, s.x + tau)) - adversarial == pytest.approx(-0.9, rel=1e-14)  # (20): ≥ 0
    # exact
    grid = torch.linspace(-eps, eps, 2001, dtype=torch.float64)[:, None]
    worst = float(s.f(ABS, s.x + worst_of(grid)(s, ABS, False)))
    assert worst == pytest.approx(0, abs=1e-14)
    assert worst <= clean_margin
    assert bool((s.f(ABS, s.x + grid) >= worst).all())


def test_eq_87_has_no_direction_where_the_input_gradient_is_zero() -> None:
    weights = [torch.tensor([[1.0, 2.0], [0.5, 1.0]]).double(), torch.ones(1, 2).double()]
    x, y = torch.tensor([[-1.0, -0.5], [1.0, 1.0]]).double(), torch.tensor([1, -1])
    s = Sample(x, y.double(), 1)
    printed = fgm(0.3)(s, weights, False)
    assert bool(torch.isnan(printed[0]).all())
    assert bool(torch.isfinite(printed[1]).all())
    model = mlp(2, 2, 1).double()
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    found = FGM(eps=0.3)(model, x, y)
    assert found.dead_inputs.tolist() == [True, False]
    assert not found.delta[0].any()
    torch.testing.assert_close(found.delta[1], printed[1])


def test_lemma_3_does_not_reach_cross_entropy() -> None:
    """Figure 3's loss: sgn ∇_x of it changes when the layers are scaled, that of the margin does not."""
    weights = draw(21, (32, 20), (16, 32), (5, 16))
    x, y = draw(22, (50, 20))[0] / 4, torch.arange(50) % 5

    def logits(x: Tensor, a: float, dtype: torch.dtype) -> Tensor:
        h = x.to(dtype)
        for k, w in enumerate(weights):
            h = h @ (a * w / w.shape[1] ** 0.5).to(dtype).T
            h = torch.relu(h) if k < 2 else h
        return h

    def sign(a: float, objective: str, dtype: torch.dtype = torch.float64) -> Tensor:
        z = x.clone().to(dtype).requires_grad_()
        out = logits(z, a, dtype)
        if objective == "loss":
            value = -nn.functional.cross_entropy(out, y, reduction="sum")
        else:
            own = out.gather(1, y[:, None])
            value = (own[:, 0] - out.scatter(1, y[:, None], -torch.inf).amax(dim=1)).sum()
        return torch.autograd.grad(value, z)[0].sign()

    flipped = {
        a: {o: float((sign(a, o) != sign(1.0, o)).double().mean()) for o in ("loss", "margin")}
        for a in (2.0, 3.0, 5.0)
    }
    print(f"\nshare of signs that flip with the scale: {flipped}")
    assert flipped[2.0]["loss"] > 0.03
    assert flipped[5.0]["loss"] > flipped[3.0]["loss"] > flipped[2.0]["loss"]
    assert all(f["margin"] == 0 for f in flipped.values())
    # and late in training, in float32, there is nothing left to take the sign of
    right = logits(x, 1.0, torch.float64).argmax(dim=1) == y
    assert int(right.sum()) >= 5
    assert not bool(sign(60.0, "loss", torch.float32)[right].any())
    assert bool(sign(60.0, "margin", torch.float32)[right].any())
    model = mlp(20, 32, 16, 5).double()
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
        one = FGSM(eps=0.1)(model, x, y).delta
        for p in model.parameters():
            p.mul_(8.0)
    assert torch.equal(FGSM(eps=0.1)(model, x, y).delta, one)
