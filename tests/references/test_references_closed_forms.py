"""The closed forms against 60-digit arithmetic and against the differential equation."""

import math

import mpmath
import numpy as np
import pytest

from marginflow.errors import InputError
from marginflow.references import one_layer_norm, reduced_flow, two_layer_norm
from marginflow.references.closed_forms import log_expi

LOG_TIMES = [-math.inf, -50.0, -3.0, 0.0, 1.0, 4.5, 30.0, 300.0, 1e3, 1e4, 1e6]


def exact_one(log_time, g, start):
    e = mpmath.mpf(g)
    return mpmath.log(mpmath.exp(e * start) + e**2 * mpmath.exp(mpmath.mpf(log_time))) / e


def exact_two(log_time, g, start):
    """Bisection on ln v, then Newton: slow, and sure."""
    slope = mpmath.mpf(g)
    target = mpmath.ei(slope * start) + 2 * slope * mpmath.exp(mpmath.mpf(log_time))
    low = mpmath.log(slope * start)
    high = mpmath.log(max(2, 2 * slope * start, 2 * mpmath.log(max(abs(target), 2)) + 5))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mpmath.ei(mpmath.exp(middle)) < target else (low, middle)
    s = (low + high) / 2
    for _ in range(4):
        s -= (mpmath.ei(mpmath.exp(s)) - target) / mpmath.exp(mpmath.exp(s))
    return mpmath.exp(s) / slope


@pytest.mark.parametrize(
    ("norm", "exact"), [(one_layer_norm, exact_one), (two_layer_norm, exact_two)]
)
@pytest.mark.parametrize("g", [1e-3, 0.1, 0.7, 3.0, 50.0])
def test_sixty_digits(norm, exact, g):
    worst = 0.0
    with mpmath.workdps(60):
        for start in (1e-8, 0.01, 0.3725 / g, 1.0, 5.0, 200.0):
            values = norm(LOG_TIMES, slope=g, start=start)
            for log_time, value in zip(LOG_TIMES, values, strict=True):
                expected = exact(log_time, g, start)
                worst = max(worst, float(abs((mpmath.mpf(float(value)) - expected) / expected)))
    print(f"\n{norm.__name__}, slope {g}: relative error {worst:.1e} for ln t up to 1e6")
    assert worst < 1e-14


def test_log_expi():
    with mpmath.workdps(60):
        for v in [0.5, 1.0, 7.0, 49.999, 50.0, 51.0, 700.0, 1e4, 1e8]:
            expected = mpmath.log(mpmath.ei(v))
            assert float(abs(mpmath.mpf(float(log_expi(v))) - expected)) <= 1e-14 * max(v, 1.0)


def test_far_beyond_float64():
    """At ln t = 1e300 the norms are still ln t / g."""
    for norm in (one_layer_norm, two_layer_norm):
        assert float(norm(1e300, slope=2.0, start=0.1)) == pytest.approx(5e299, rel=1e-12)


@pytest.mark.parametrize(("depth", "norm"), [(1, one_layer_norm), (2, two_layer_norm)])
@pytest.mark.parametrize(
    ("clock", "log_times"), [("log", [-2.0, 1.0, 20.0, 1e4]), ("time", [-2.0, 5.0])]
)
def test_the_differential_equation(depth, norm, clock, log_times):
    """One example x = (3, 4), ε = 1: margin slope 5 − 1 along x."""
    flow = reduced_flow(
        [[3.0, 4.0]], [1], [0.06, 0.08], depth=depth, eps=1.0, log_times=log_times, clock=clock
    )
    sizes = np.linalg.norm(flow.weights, axis=1)
    error = np.max(np.abs(sizes / norm(log_times, slope=4.0, start=0.1) - 1))
    print(f"\ndepth {depth}, clock {clock}: integrator against closed form {error:.1e}")
    assert error < 1e-9


def test_shapes():
    assert one_layer_norm(1.0, slope=1.0, start=0.0).shape == ()
    assert two_layer_norm(np.ones((2, 3)), slope=1.0, start=1.0).shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: one_layer_norm(math.nan, slope=1.0, start=1.0), "log_time"),
        (lambda: one_layer_norm(math.inf, slope=1.0, start=1.0), "log_time"),
        (lambda: two_layer_norm("soon", slope=1.0, start=1.0), "log_time"),
        (lambda: one_layer_norm(1.0, slope=0.0, start=1.0), "slope"),
        (lambda: one_layer_norm(1.0, slope=1.0, start=-1.0), "start"),
        (lambda: two_layer_norm(1.0, slope=1.0, start=0.0), "start"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError, match=words):
        call()
