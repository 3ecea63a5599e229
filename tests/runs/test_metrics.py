"""Measurements as columns, CSV and frames; the frames themselves are tested in tests/integrations."""

from __future__ import annotations

import copy
import csv
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import marginflow as mf
from marginflow.cli import main
from marginflow.errors import MissingDependencyError, RunError
from marginflow.monitor import Monitor
from marginflow.runs import QUANTILES, Metrics, Run, RunDirectory, csv_of, table_of

RECORDS: list[dict[str, Any]] = [
    {"step": 0, "rate": None, "layer_norms": [1.5, 2.5], "sliding": False, "corrections": None},
    {"step": 7, "rate": 1, "layer_norms": [3.0, 0.1], "sliding": True, "corrections": [4, 5]},
    {"step": 9, "rate": 0.5, "layer_norms": [1e-300, 1e300], "method": "stiff", "best": 7},
]
LAYERS = [
    {"name": name, "parameters": [name], "degree": 1} for name in ("conv.weight", "head.weight")
]
CONFIG = {"kind": "train", "layers": LAYERS}


def a_run(folder: Path, name: str, config: dict[str, Any], records: list[dict[str, Any]]) -> Path:
    directory = RunDirectory.create(folder / name, config)
    if records:
        directory.append_metrics(*records)
    directory.close()
    return directory.path


def test_a_row_a_measurement_a_column_a_number() -> None:
    assert Metrics(RECORDS, ["conv.weight", "head.weight"]).columns() == {
        "step": [0, 7, 9],
        "rate": [None, 1.0, 0.5],
        "layer_norms/conv.weight": [1.5, 3.0, 1e-300],
        "layer_norms/head.weight": [2.5, 0.1, 1e300],
        "sliding": [False, True, None],
        "corrections": [None, None, None],
        "corrections/0": [None, 4, None],
        "corrections/1": [None, 5, None],
        "method": [None, None, "stiff"],
        "best": [None, None, 7],
    }


@pytest.mark.parametrize("layers", [(), ("one",), ("same", "same"), ("a", "b", "c")])
def test_layers_without_names_of_their_own_have_numbers(layers: tuple[str, ...]) -> None:
    names = list(Metrics(RECORDS, layers).columns())
    assert names[2:4] == ["layer_norms/0", "layer_norms/1"]


def test_quantiles_have_their_levels() -> None:
    values = [10.0 * level for level in QUANTILES]
    columns = Metrics([{"normalized_margin_quantiles": values}, {"x_quantiles": [1.0]}]).columns()
    levels = {name: value[0] for name, value in columns.items() if name.startswith("norm")}
    assert levels == {f"normalized_margin_quantiles/{q:g}": 10.0 * q for q in QUANTILES}
    assert columns["x_quantiles/0"] == [None, 1.0]


def test_a_column_has_values_of_one_type() -> None:
    columns = Metrics(RECORDS).columns()
    for name, kind in {"step": int, "rate": float, "sliding": bool, "method": str}.items():
        assert {type(value) for value in columns[name]} <= {kind, type(None)}


def test_it_is_a_list_still_and_keeps_its_layers() -> None:
    metrics = Metrics(RECORDS, ["a", "b"])
    assert metrics == RECORDS
    assert json.loads(json.dumps(metrics)) == RECORDS
    for other in (copy.deepcopy(metrics), pickle.loads(pickle.dumps(metrics))):
        assert (type(other), other.layers) == (Metrics, ("a", "b"))
        assert other == RECORDS


def test_a_run_read_trained_or_made_by_hand_has_them(tmp_path: Path) -> None:
    run = mf.train("mlp:4", "separable:n=8,d=3,margin=0.3", epochs=2, out=tmp_path / "run")
    read = mf.load_run(tmp_path / "run")
    names = ["layer_norms/linear1.weight", "layer_norms/linear2.weight"]
    for metrics in (run.metrics, read.metrics, Run(read.config, list(read.metrics)).metrics):
        assert [metrics.columns()[name] for name in names] == [
            [record["layer_norms"][k] for record in run.metrics] for k in (0, 1)
        ]
    data = mf.load("separable:n=8,d=3,margin=0.3")
    monitor = Monitor(mf.models.mlp(3, 4, 1).double(), data)
    monitor.measure(5)
    assert names[0] in monitor.records.columns()


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_without_its_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'marginflow\[{library}\]'$"):
        getattr(Metrics(RECORDS), f"to_{library}")()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_csv_gives_every_bit_back(values: list[float]) -> None:
    text = csv_of(Metrics({"step": k, "x": value} for k, value in enumerate(values)).columns())
    read = list(csv.DictReader(io.StringIO(text)))
    assert [float(row["x"]) for row in read] == values


def test_export_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = a_run(tmp_path, "one", CONFIG, RECORDS), tmp_path / "table.csv"
    assert main(["export", str(run), "--csv", str(out)]) == 0
    assert capsys.readouterr().out == f"3 measurements, 10 columns, in {out}\n"
    assert out.read_text(encoding="utf-8").splitlines() == [
        "step,rate,layer_norms/conv.weight,layer_norms/head.weight,sliding,corrections,"
        "corrections/0,corrections/1,method,best",
        "0,,1.5,2.5,False,,,,,",
        "7,1.0,3.0,0.1,True,,4,5,,",
        "9,0.5,1e-300,1e+300,,,,,stiff,7",
    ]
    assert main(["export", str(run), "--csv", "-"]) == 0
    assert capsys.readouterr().out == out.read_text(encoding="utf-8")


def test_export_of_several_runs_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = a_run(tmp_path, "one", CONFIG, RECORDS[:1])
    other = a_run(tmp_path, "other", {"kind": "flow"}, RECORDS[2:])
    empty = a_run(tmp_path, "empty", CONFIG, [])
    assert main(["export", str(one), str(other), str(empty), "--csv", "-"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["run"] for row in rows] == ["one", "other"]
    assert [row["layer_norms/conv.weight"] for row in rows] == ["1.5", ""]
    assert [row["layer_norms/1"] for row in rows] == ["", "1e+300"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [a_run(tmp_path, name, CONFIG, RECORDS[:1]) for name in ("a/seed-0", "b/seed-0", "c")]
    table = table_of([mf.load_run(path) for path in paths])
    assert table["run"] == [str(paths[0]), str(paths[1]), "c"]


def test_runs_without_measurements_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no measurements in 'empty'"):
        table_of([mf.load_run(a_run(tmp_path, "empty", CONFIG, []))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected one of --csv FILE and --parquet FILE"),
        (["--csv", "a.csv", "--parquet", "a.parquet"], "expected one of"),
        (["--parquet", "-"], "only --csv writes to standard output"),
        (["--csv", "there.csv"], "replace it with --force"),
        (["--csv", "no/folder.csv"], "cannot write 'no/folder.csv'"),
        (["--parquet", "new.parquet"], "pip install 'marginflow[parquet]'"),
    ],
)
def test_export_refuses_and_writes_nothing(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = a_run(tmp_path, "run", CONFIG, RECORDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("there.csv").write_text("mine", encoding="utf-8")
    assert main(["export", str(run), *options]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there.csv"]
    assert Path("there.csv").read_text(encoding="utf-8") == "mine"


def test_export_replaces_with_force(tmp_path: Path) -> None:
    run, out = a_run(tmp_path, "run", CONFIG, RECORDS), tmp_path / "there.csv"
    out.write_text("mine", encoding="utf-8")
    assert main(["export", str(run), "--csv", str(out), "--force"]) == 0
    assert out.read_text(encoding="utf-8").startswith("step,rate,")
