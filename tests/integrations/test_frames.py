"""Measurements as frames of pandas and polars and as Parquet, read back by these libraries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import marginflow as mf
from marginflow.cli import main
from marginflow.runs import Metrics

pytestmark = pytest.mark.integrations

RECORDS: list[dict[str, Any]] = [
    {"step": 0, "rate": None, "layer_norms": [1.5, 0.1], "sliding": False, "gone": None},
    {"step": 2**53 + 1, "rate": 1, "layer_norms": [math.pi, 5e-324], "sliding": True, "best": 4},
    {"step": 9, "rate": 0.5, "layer_norms": [1.7e308, 1 / 3], "method": "stiff", "late": True},
]
METRICS = Metrics(RECORDS, ["conv.weight", "head.weight"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mf.Run:
    out = tmp_path_factory.mktemp("frames") / "run"
    mf.train("mlp:4", "separable:n=8,d=3,margin=0.3", epochs=3, out=out)
    return mf.load_run(out)


def test_a_pandas_frame() -> None:
    import pandas as pd

    frame = METRICS.to_pandas()
    types = {name: str(kind) for name, kind in frame.dtypes.items()}
    assert types == {
        "step": "int64",
        "rate": "float64",
        "layer_norms/conv.weight": "float64",
        "layer_norms/head.weight": "float64",
        "sliding": "boolean",
        "gone": "float64",
        "best": "float64",
        "method": "str",
        "late": "boolean",
    }
    for name, values in METRICS.columns().items():
        got = [None if pd.isna(value) else value for value in frame[name]]
        assert got == values, name


def test_a_polars_frame() -> None:
    frame = METRICS.to_polars()
    assert {name: str(kind) for name, kind in frame.schema.items()} == {
        "step": "Int64",
        "rate": "Float64",
        "layer_norms/conv.weight": "Float64",
        "layer_norms/head.weight": "Float64",
        "sliding": "Boolean",
        "gone": "Float64",
        "best": "Int64",
        "method": "String",
        "late": "Boolean",
    }
    assert frame.to_dict(as_series=False) == METRICS.columns()


def test_no_measurements_are_an_empty_frame() -> None:
    assert Metrics().to_pandas().shape == (0, 0)
    assert Metrics().to_polars().shape == (0, 0)


def test_the_frame_of_a_run(run: mf.Run) -> None:
    frame = run.metrics.to_pandas()
    assert list(frame["epoch"]) == [0, 1, 2, 3]
    assert list(frame["layer_norms/linear2.weight"]) == [m["layer_norms"][1] for m in run.metrics]
    assert math.isnan(frame["epoch_loss"][0])
    other = run.metrics.to_polars()
    assert other.columns == list(frame.columns)
    assert other["margin"].to_list() == [m["margin"] for m in run.metrics]


def test_parquet_gives_every_bit_back(run: mf.Run, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    out = tmp_path / "table.parquet"
    assert main(["export", str(run.path), "--parquet", str(out)]) == 0
    assert pq.read_table(out).to_pydict() == run.metrics.columns()
    assert main(["export", str(run.path), str(run.path), "--parquet", str(out)]) == 2
    assert main(["export", str(run.path), str(run.path), "--parquet", str(out), "--force"]) == 0
    both = pq.read_table(out).to_pydict()
    assert both.pop("run") == [str(run.path)] * 8
    assert both == {name: values * 2 for name, values in run.metrics.columns().items()}


def test_csv_is_read_by_pandas_to_the_last_bit(run: mf.Run, tmp_path: Path) -> None:
    import pandas as pd

    out = tmp_path / "table.csv"
    assert main(["export", str(run.path), "--csv", str(out)]) == 0
    read = pd.read_csv(out)
    pd.testing.assert_frame_equal(read, run.metrics.to_pandas(), check_exact=True)
