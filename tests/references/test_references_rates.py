"""w⊥* against a closed form and another minimiser, and its predictions against the flow."""

import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import minimize
from scipy.special import logsumexp

from marginflow.errors import InputError
from marginflow.references import (
    limit_angle_times_log_time,
    max_margin,
    memory_exponent,
    predicted_angle,
    reduced_flow,
    w_perp,
)

SPANNING = 3  # a seed whose support vectors span the space: separable(3, 20, 6)


def angles(weights, direction):
    along = weights @ direction
    across = weights - np.outer(along, direction)
    return np.arctan2(np.linalg.norm(across, axis=1), along)


def test_closed_form_two_support_vectors():
    """z = (1, b), (1, −c): e^{−bw} + e^{cw} is least at w = ln(b/c)/(b + c)."""
    b, c = 0.7, 2.5
    found = w_perp([[1.0, b], [-1.0, c], [5.0, 1.0]], [1, -1, 1])
    np.testing.assert_allclose(found.direction, [1, 0], atol=1e-14)
    np.testing.assert_allclose(found.vector, [0, math.log(b / c) / (b + c)], atol=1e-14)
    assert found.margin == pytest.approx(1, rel=1e-14)
    assert found.converged
    assert found.spans
    np.testing.assert_array_equal(found.support, [0, 1])
    np.testing.assert_allclose(found.shares, [c / (b + c), b / (b + c)], rtol=1e-13)


def test_one_support_vector_leaves_nothing_across():
    found = w_perp([[2.0, 1.0, 0.0]], [1])
    assert found.norm == 0
    assert found.converged
    assert not found.spans


@pytest.mark.parametrize("seed", range(6))
def test_another_minimiser_agrees(seed, separable):
    x, y = separable(seed, 25, 5)
    found = w_perp(x, y)
    z = (y[:, None] * x)[found.support]
    across = z - np.outer(z @ found.direction, found.direction)
    other = minimize(lambda w: np.exp(-across @ w).sum(), np.zeros(5), tol=1e-14, method="Powell")
    off = across.T @ np.linalg.lstsq(across.T, other.x)[0]
    np.testing.assert_allclose(found.vector, off, atol=1e-5 * max(found.norm, 1))
    assert found.gradient < 1e-12
    assert abs(found.vector @ found.direction) < 1e-12
    # at w⊥* the shares of the loss are the multipliers of the SVM
    multipliers = max_margin(x, y).multipliers[found.support]
    np.testing.assert_allclose(found.shares, multipliers, atol=1e-10)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8])
def test_the_flow_meets_the_prediction(fraction, separable):
    x, y = separable(SPANNING, 20, 6)
    residual = w_perp(x, y)
    assert residual.spans
    eps = fraction * residual.margin
    log_times = np.array([1e2, 1e3, 1e4, 1e5, 1e6])
    flow = reduced_flow(x, y, x.T @ y / 200, depth=1, eps=eps, log_times=log_times)
    measured = angles(flow.weights, residual.direction)
    ratio = measured * log_times / limit_angle_times_log_time(residual, eps)
    refined = measured / predicted_angle(residual, eps, log_times)
    print(
        f"\neps = {fraction} γ_m: angle · ln t over its limit {ratio}\n    with the offset {refined}"
    )
    assert np.abs(ratio[2:] - 1).max() < 0.02
    assert np.abs(ratio[-1] - 1) < 1e-5
    assert np.abs(refined[1:] - 1).max() < 0.02 * np.abs(ratio[0] - 1) + 1e-3


def test_the_error_of_the_prediction_falls_as_one_over_log_t(separable):
    """The offset in a(t) is a constant: order 1. With it, order 2 in 1/ln t for ε > 0."""
    x, y = separable(SPANNING, 20, 6)
    residual = w_perp(x, y)
    log_times = np.array([1e3, 1e4, 1e5])
    eps = 0.5 * residual.margin
    flow = reduced_flow(x, y, x.T @ y / 200, depth=1, eps=eps, log_times=log_times)
    error = np.abs(
        angles(flow.weights, residual.direction) * log_times
        / limit_angle_times_log_time(residual, eps) - 1
    )  # fmt: skip
    slope = np.polyfit(np.log(log_times), np.log(error), 1)[0]
    print(f"\norder of the error in ln t: {slope:.3f}")
    assert slope == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("fraction", [0.0, 0.8])
def test_another_clock_says_the_same(fraction, separable):
    """dw/ds = −∇ ln φ, d(ln t)/ds = 1/(tφ): the loss never leaves the log domain."""
    x, y = separable(SPANNING, 20, 6)
    residual = w_perp(x, y)
    z, eps = y[:, None] * x, fraction * residual.margin
    log_time = 200.0

    def field(_, state):
        w, now = state[:-1], state[-1]
        r = np.linalg.norm(w)
        logs = -(z @ w - eps * r)
        log_loss = logsumexp(logs) - math.log(len(z))
        shares = np.exp(logs - logsumexp(logs))
        return np.append(shares @ z - eps * w / r, np.exp(-log_loss - now))

    def done(_, state):
        return state[-1] - log_time

    done.terminal = True
    # up to ln t = 0 by raw time; there the clock of this test begins
    start = reduced_flow(x, y, x.T @ y / 200, depth=1, eps=eps, log_times=[0.0], clock="time")
    solution = solve_ivp(
        field, (0.0, 1e5), np.append(start.weights[0], 0.0), method="Radau", events=done,
        rtol=1e-9, atol=1e-10,
    )  # fmt: skip
    w = solution.y_events[0][0, :-1]
    ours = reduced_flow(x, y, x.T @ y / 200, depth=1, eps=eps, log_times=[log_time]).weights[0]
    np.testing.assert_allclose(w, ours, rtol=1e-6, atol=1e-6)
    measured = angles(w[None], residual.direction)[0]
    assert measured == pytest.approx(float(predicted_angle(residual, eps, log_time)), rel=0.02)


def test_the_adversary_speeds_the_direction_up(separable):
    x, y = separable(SPANNING, 20, 6)
    residual = w_perp(x, y)
    measured = []
    for fraction in (0.0, 0.5, 0.8):
        eps = fraction * residual.margin
        flow = reduced_flow(x, y, x.T @ y / 200, depth=1, eps=eps, log_times=[1e5])
        measured.append(angles(flow.weights, residual.direction)[0])
    gains = measured[0] / np.array(measured)
    print(f"\ngain in angle at ln t = 1e5 for ε = 0, γ/2, 0.8 γ: {gains} (theory 1, 2, 5)")
    np.testing.assert_allclose(gains, [1, 2, 5], rtol=1e-3)


def test_without_adversary_the_start_is_never_forgotten(separable):
    """Two support vectors in three dimensions: off their span b° stays, and the limit with it."""
    x, y = separable(0, 10, 3)
    residual = w_perp(x, y)
    assert not residual.spans
    with pytest.raises(InputError, match="limit depends on the start"):
        limit_angle_times_log_time(residual, 0.0)
    across = np.linalg.svd((y[:, None] * x)[residual.support])[2][-1]
    log_times = np.array([1e4, 1e6])
    for push in (0.0, 1.0):
        start = x.T @ y / 100 + push * across
        flow = reduced_flow(x, y, start, depth=1, log_times=log_times)
        off = flow.weights @ across
        assert off[0] == pytest.approx(off[1], abs=1e-6)
        limit = residual.margin * math.hypot(residual.norm, off[1])
        ratio = angles(flow.weights, residual.direction)[1] * log_times[1] / limit
        naive = limit / (residual.norm * residual.margin)
        print(f"\nb° = {off[1]:.4f}: angle · ln t is {naive:.4f} times ‖w⊥*‖γ_m")
        assert ratio == pytest.approx(1, abs=1e-4)
        assert naive > 1.05


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.4])
def test_with_an_adversary_the_start_is_forgotten_at_a_power_of_log_t(fraction, separable):
    x, y = separable(0, 10, 3)
    residual = w_perp(x, y)
    eps = fraction * residual.margin
    across = np.linalg.svd((y[:, None] * x)[residual.support])[2][-1]
    flow = reduced_flow(
        x, y, x.T @ y / 100 + across, depth=1, eps=eps, log_times=[1e3, 1e4, 1e5], rtol=1e-12
    )
    slope = np.diff(np.log(np.abs(flow.weights @ across)))
    slope /= np.diff(np.log(flow.weights @ residual.direction))
    predicted = memory_exponent(residual, eps)
    print(f"\neps = {fraction} γ_m: b° falls with exponent {slope}, predicted {predicted:.6f}")
    np.testing.assert_allclose(slope, predicted, rtol=1e-3)


def test_a_degenerate_machine_makes_no_claim():
    """z = (1, 0) alone holds up the margin; (1, 1) lies on it with multiplier 0."""
    found = w_perp([[1.0, 0.0], [1.0, 1.0]], [1, 1])
    assert not found.converged
    with pytest.raises(InputError, match="multiplier 0"):
        limit_angle_times_log_time(found, 0.1)


def test_refusals():
    with pytest.raises(InputError, match="separable"):
        w_perp([[1.0], [1.0]], [1, -1])
    found = w_perp([[1.0, 0.7], [1.0, -2.0]], [1, 1])
    for eps in (1.0, 1.5):
        with pytest.raises(InputError, match="less than the margin"):
            limit_angle_times_log_time(found, eps)
    with pytest.raises(InputError, match="at least 0"):
        memory_exponent(found, -0.1)
    with pytest.raises(InputError, match="where the expansion begins"):
        predicted_angle(found, 0.5, -10.0)
