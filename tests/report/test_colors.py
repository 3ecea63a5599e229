"""Who sees the curves: colours as people without red, green or blue cones have them, and marks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from marginflow.experiments import Curve, FigureData, Panel
from marginflow.report import comparison, draw
from marginflow.report._theme import theme_named
from marginflow.runs import Run

# Machado, Oliveira, Fernandes (2009), severity 1: matrices of linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
LEAST = 15.0  # in CIELAB, where 2.3 is just noticeable side by side


def lab(color: str, seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIELAB (D65) of an sRGB colour, seen through a matrix of linear RGB."""
    encoded = np.array(to_rgb(color))
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    white = TO_XYZ @ np.ones(3)
    ratio = TO_XYZ @ np.clip(seen @ linear, 0, 1) / white
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def difference(a: str, b: str, vision: str) -> float:
    return float(np.linalg.norm(lab(a, VISION[vision]) - lab(b, VISION[vision])))


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_curves_can_be_told_apart(theme: str, vision: str) -> None:
    palette = theme_named(theme).palette
    closest = min((difference(a, b, vision), a, b) for a, b in itertools.combinations(palette, 2))
    assert closest[0] >= LEAST, closest


def test_the_simulation_takes_away_what_it_should() -> None:
    # matplotlib's own green and red are far apart, but not without red or green cones.
    assert difference("tab:green", "tab:red", "normal") > 80
    assert difference("tab:green", "tab:red", "deuteranopia") < 30
    assert difference("#ffffff", "#000000", "protanopia") == pytest.approx(100, abs=0.5)
    # Lab of pure red, by the tables of colour science.
    assert lab("#ff0000", VISION["normal"]) == pytest.approx([53.24, 80.09, 67.20], abs=0.05)


@pytest.mark.parametrize("points", [10, 200])
def test_each_colour_has_a_mark_of_its_own(points: int) -> None:
    x = list(range(points))
    curves = [Curve(str(k), x, [k + v / points for v in x], color=k) for k in range(7)]
    axes = draw(FigureData("n", "", "", [Panel("", "x", "y", curves)])).axes[0]
    assert len({line.get_marker() for line in axes.lines}) == 7
    marked = [line.get_markevery() for line in axes.lines]
    assert all(1 <= len(places) <= 25 for places in marked)
    assert all(0 <= place < points for places in marked for place in places)
    # The key to the marks stands in the legend.
    handles = axes.get_legend().get_lines()
    assert [h.get_marker() for h in handles] == [line.get_marker() for line in axes.lines]


def test_pairs_of_one_run_share_the_mark_filled_and_open(make_run: Callable[..., Run]) -> None:
    runs = [make_run("a"), make_run("b")]
    drawn = draw(comparison(runs))
    axes = next(a for a in drawn.axes if a.get_title(loc="left") == "Clean accuracy")
    marks = [(line.get_marker(), line.get_markerfacecolor()) for line in axes.lines[:4]]
    paper = theme_named("light").paper
    assert [mark for mark, _ in marks] == ["o", "o", "s", "s"]
    assert [filling == paper for _, filling in marks] == [False, True, False, True]
