"""The reduced flow against the network it reduces, and against the directions it must reach."""

import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from marginflow.errors import DataError, InputError
from marginflow.references import largest_feasible_eps, reduced_flow, robust_svm
from marginflow.references.reduced_flow import _Field


def network_flow(x, y, start, widths, eps, times):
    """The flow of all weights W_1 … W_L of the balanced network with product ``start``, naively."""
    rng = np.random.default_rng(0)
    size = np.linalg.norm(start)
    units = [start / size] + [
        v / np.linalg.norm(v) for v in map(rng.normal, [0] * 9, [1] * 9, widths)
    ]
    units = [*units[: len(widths) + 1], np.ones(1)]
    depth = len(widths) + 1
    layers = [size ** (1 / depth) * np.outer(units[k + 1], units[k]) for k in range(depth)]
    shapes = [w.shape for w in layers]
    cuts = np.cumsum([w.size for w in layers])[:-1]
    z = y[:, None] * x

    def unpack(flat):
        return [part.reshape(s) for part, s in zip(np.split(flat, cuts), shapes, strict=True)]

    def product(parts):
        result = parts[0]
        for w in parts[1:]:
            result = w @ result
        return result

    def field(_, flat):
        parts = unpack(flat)
        p = product(parts)[0]
        r = np.linalg.norm(p)
        gradient = np.zeros_like(p)
        for zi in z:
            gradient -= np.exp(-(zi @ p - eps * r)) / len(z) * (zi - eps * p / r)
        moves = []
        for k in range(depth):
            after = product([*parts[k + 1 :], np.eye(1)] if k + 1 < depth else [np.eye(1)])
            before = product(parts[:k]) if k else np.eye(len(p))
            moves.append(-(after.T @ gradient[None] @ before.T))
        return np.concatenate([m.ravel() for m in moves])

    flat = np.concatenate([w.ravel() for w in layers])
    solution = solve_ivp(
        field, (0, times[-1]), flat, t_eval=times, method="DOP853", rtol=1e-12, atol=1e-13
    )
    return np.array([product(unpack(column))[0] for column in solution.y.T])


@pytest.mark.parametrize("widths", [(), (4,), (5, 3), (3, 6, 2)])
def test_the_network_itself(widths, separable):
    x, y = separable(0, 8, 4)
    start = np.array([0.3, -0.2, 0.5, 0.1])
    times = np.array([0.1, 1.0, 10.0, 40.0])
    expected = network_flow(x, y, start, widths, 0.1, times)
    found = reduced_flow(
        x, y, start, depth=len(widths) + 1, eps=0.1, log_times=np.log(times), clock="time",
        rtol=1e-12, atol=1e-13,
    )  # fmt: skip
    error = np.max(np.abs(found.weights - expected))
    print(f"\nL = {len(widths) + 1}: network against reduced flow {error:.1e}")
    assert error < 1e-10


@pytest.mark.parametrize(
    ("depth", "p", "loss"),
    [(1, 2, "exponential"), (2, 1.5, "logistic"), (2, 2, "logistic"), (3, 4, "exponential")],
)
def test_the_clocks_agree(depth, p, loss, separable):
    x, y = separable(1, 8, 3)
    eps = 0.3 * largest_feasible_eps(x, y, p=p)
    common = {"depth": depth, "eps": eps, "p": p, "loss": loss, "log_times": [-1.0, 0.0, 2.0, 4.0]}
    start = [0.2, 0.3, -0.1]
    raw = reduced_flow(x, y, start, clock="time", **common)
    log = reduced_flow(x, y, start, clock="log", **common)
    assert raw.success
    assert log.success
    np.testing.assert_allclose(raw.weights, log.weights, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(raw.log_loss, log.log_loss, atol=1e-7)


@pytest.mark.parametrize("logistic", [False, True])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_jacobian_is_the_derivative(depth, q, logistic, separable):
    x, y = separable(2, 8, 4)
    field = _Field(y[:, None] * x, depth, 0.1, q, logistic)
    w, h = np.array([0.5, -1.1, 0.3, 0.8]), 1e-6
    steps = h * np.eye(4)
    columns = [field.in_log_time(0.7, w + e) - field.in_log_time(0.7, w - e) for e in steps]
    jacobian = field.jacobian(0.7, w)
    error = np.abs(jacobian - np.array(columns).T / (2 * h)).max()
    assert error < 1e-8 * np.abs(jacobian).max()


@pytest.mark.parametrize(
    ("depth", "p", "loss"),
    [
        (1, 1.5, "logistic"),
        (1, 2, "exponential"),
        (2, 2, "logistic"),
        (2, 3, "exponential"),
        (3, 1.5, "exponential"),
        (3, 2, "logistic"),
        (3, 3, "exponential"),
    ],
)
def test_it_reaches_the_robust_svm(depth, p, loss, separable):
    x, y = separable(3, 8, 4)
    eps = 0.4 * largest_feasible_eps(x, y, p=p)
    limit = robust_svm(x, y, eps, p=p)
    flow = reduced_flow(
        x, y, [0.2, -0.1, 0.1, 0.2], depth=depth, eps=eps, p=p, loss=loss, log_times=[1e2, 1e4, 1e6]
    )
    assert flow.success
    distances = np.linalg.norm(flow.direction - limit.direction, axis=1)
    normalised = flow.margins.min(axis=1) / np.linalg.norm(flow.weights, axis=1)
    print(
        f"\nL = {depth}, l{p}, {loss}: distance {distances}, margin gap {limit.margin - normalised}"
    )
    assert np.all(np.diff(distances) < 0)
    assert distances[-1] < 1e-2
    assert np.all(normalised <= limit.margin * (1 + 1e-9))
    assert normalised[-1] == pytest.approx(limit.margin, rel=1e-3)


@pytest.mark.parametrize(
    ("x", "start"),
    [
        # Mirrored support vectors: the second coordinate stays small while the first grows.
        ([[2.0, 0.2], [2.0, -0.2], [3.0, 3.0]], [0.2, 0.1]),
        # The third coordinate hangs on the perturbation alone, and fades.
        ([[1.0, 0.5, 0.0], [1.0, -0.3, 0.0]], [0.2, 0.1, 0.3]),
    ],
)
@pytest.mark.parametrize("depth", [1, 2])
def test_coordinates_that_stay_small_do_not_stop_it(depth, x, start):
    """At ln t = 10⁶ margins are rounded to 10⁻¹⁰, far above atol; the limit is known by hand.

    The first two examples are the support and the limit is e_1, where their slopes α, of sum 1, must
    cancel the second coordinate; so ``m_2 − m_1 → ln(α_1/α_2)``, up to O(1/ln t).
    """
    flow = reduced_flow(x, [1] * len(x), start, depth=depth, eps=0.05, log_times=[1e3, 1e6])
    assert flow.success
    assert flow.evaluations < 10_000
    share = -x[1][1] / (x[0][1] - x[1][1])
    gaps = flow.margins[:, 1] - flow.margins[:, 0]
    apart = np.abs(gaps - math.log(share / (1 - share)))
    assert np.all(apart * flow.log_time < 20)
    assert np.abs(flow.direction[-1] - np.eye(len(start))[0]).max() < 1e-3


def test_its_records_are_what_they_say(separable):
    x, y = separable(4, 6, 3)
    flow = reduced_flow(x, y, [1.0, 0, 0], depth=2, eps=0.2, loss="logistic", log_times=[0.0, 3.0])
    for w, margins, log_loss in zip(flow.weights, flow.margins, flow.log_loss, strict=True):
        by_hand = [yi * (xi @ w) - 0.2 * np.linalg.norm(w) for xi, yi in zip(x, y, strict=True)]
        np.testing.assert_allclose(margins, by_hand, rtol=1e-12)
        assert log_loss == pytest.approx(math.log(np.mean(np.log1p(np.exp(-margins)))), rel=1e-12)
    np.testing.assert_array_equal(flow.log_time, [0.0, 3.0])


def test_sliding_is_a_value_with_advice(separable):
    """ℓ∞: a coordinate that wants to stay at 0 makes the field jump at every step."""
    x, y = separable(0, 8, 4)
    eps = 0.9 * largest_feasible_eps(x, y, p=math.inf)
    flow = reduced_flow(
        x, y, [0.1, 0.1, 0.1, 0.1], depth=1, eps=eps, p=math.inf, log_times=[1.0, 1e3]
    )
    assert not flow.success
    assert len(flow.log_time) == len(flow.weights) == len(flow.log_loss) < 2
    assert "robust_svm" in flow.message


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"depth": 0}, InputError, "depth"),
        ({"depth": 1.5}, InputError, "depth"),
        ({"eps": -1.0}, InputError, "eps"),
        ({"p": 0.1}, InputError, "p:"),
        ({"loss": "hinge"}, InputError, "loss"),
        ({"clock": "sun"}, InputError, "clock"),
        ({"rtol": 0.0}, InputError, "rtol"),
        ({"log_times": [1.0, 1.0]}, InputError, "increasing"),
        ({"log_times": []}, InputError, "log_times"),
        ({"log_times": [math.inf]}, InputError, "finite"),
        ({"log_times": [1e3], "clock": "time"}, InputError, "clock='log'"),
        ({"start": [0.0, 0.0]}, DataError, "non-zero"),
        ({"start": [1.0]}, DataError, "shape"),
    ],
)
def test_refusals(change, error, words):
    start = change.get("start", [1.0, 0.0])
    options = {"depth": 1, "log_times": [1.0]} | {k: v for k, v in change.items() if k != "start"}
    with pytest.raises(error, match=words):
        reduced_flow(np.eye(2), [1, 1], start, **options)
