"""Alignment and distance to a KKT point along kept weights, against numpy and scipy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from flow_runs import DATA, changed, panels
from numpy.typing import NDArray
from scipy.optimize import nnls

import marginflow as mf
from marginflow.runs import Run

EPS = 0.05  # of the fixture's flow
Array = NDArray[np.float64]


def kept(run: Run) -> dict[int, list[Array]]:
    return {
        step: [w.numpy().astype(np.float64) for w in weights.values()]
        for step, weights in run.trajectory().items()
    }


def test_alignment_is_that_of_the_singular_values(flow: Run) -> None:
    panel = panels(flow)["Alignment of the layers"]
    assert panel.yscale == "log"
    first, between = panel.curves  # the last layer is a row: of rank one, always
    assert (first.label, first.dashed) == ("rank of W_1", False)
    assert (between.label, between.dashed) == ("W_1 and W_2", True)
    weights = kept(flow)
    records = [record for record in flow.metrics if record["log_time"] is not None]
    assert list(first.x) == list(between.x) == [record["log_time"] for record in records]
    for record, rank, gap in zip(records, first.y, between.y, strict=True):
        w1, w2 = weights[record["step"]]
        u, s, _ = np.linalg.svd(w1)
        assert rank == pytest.approx(1 - s[0] ** 2 / (s**2).sum(), rel=1e-9, abs=1e-13)
        cosine = float(u[:, 0] @ w2[0]) / np.linalg.norm(w2)
        assert gap == pytest.approx(1 - cosine**2, rel=1e-9, abs=1e-13)


def test_several_runs_show_the_one_scalar_for_it_all(flow: Run, descent: Run) -> None:
    panel = panels(flow, descent)["Alignment of the layers"]
    assert [curve.label for curve in panel.curves] == ["flow", "descent"]
    for run, curve in zip((flow, descent), panel.curves, strict=True):
        w1, w2 = kept(run)[run.final["step"]]
        ratio = np.linalg.norm(w2 @ w1) / np.linalg.norm(w1) / np.linalg.norm(w2)
        assert curve.y[-1] == pytest.approx(1 - ratio, rel=1e-9, abs=1e-13)


def test_the_residual_is_that_of_least_squares(flow: Run) -> None:
    panel = panels(flow)["Distance to a KKT point"]
    best, paper = panel.curves
    assert (best.dashed, paper.dashed) == (False, True)
    assert 3 <= len(best.x) <= 12
    assert best.x[-1] == flow.final["log_time"]
    assert all(a <= b * (1 + 1e-9) for a, b in zip(best.y, paper.y, strict=True))  # type: ignore[operator]
    data = mf.load(DATA)
    x = data.x.double().numpy() * data.y.double().numpy()[:, None]
    w1, w2 = kept(flow)[flow.final["step"]]
    product = (w2 @ w1)[0]
    # m_i = <p, y_i x_i> - eps |p| with p = W_2 W_1, differentiated by hand.
    slopes = x - EPS * product / np.linalg.norm(product)
    columns = [np.concatenate([np.outer(w2[0], s).ravel(), w1 @ s]) for s in slopes]
    everything = np.concatenate([w1.ravel(), w2.ravel()])
    _, distance = nnls(np.array(columns).T, everything)
    assert best.y[-1] == pytest.approx(distance / np.linalg.norm(everything), rel=1e-6)


def test_what_has_no_path_has_no_panel(flow: Run, make_run: Callable[..., Run]) -> None:
    names = {"Alignment of the layers", "Distance to a KKT point"}
    assert not names & set(panels(make_run()))
    assert not names & set(panels(changed(flow, model=None)))
    elsewhere = changed(flow, data_sha256="of other data")
    assert names & set(panels(elsewhere)) == {"Alignment of the layers"}
    large = changed(flow, examples=10**9)
    assert names & set(panels(large)) == {"Alignment of the layers"}


def test_a_network_with_kinks_has_a_distance_and_no_alignment() -> None:
    run = mf.train(
        "mlp:6",
        "separable:n=10,d=3,margin=0.3",
        attack="fgm:eps=0.05",
        lr=0.5,
        epochs=60,
        dtype="float64",
        keep_weights=True,
    )
    assert run.final["normalized_margin"] > 0
    found = panels(run)
    assert "Alignment of the layers" not in found
    for curve in found["Distance to a KKT point"].curves:
        assert all(0 < y < 1.5 for y in curve.y if y is not None)
