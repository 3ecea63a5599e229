"""The measurements of a run as a list, as columns and as frames of other libraries.

Source: marginflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from marginflow._checks import optional

if TYPE_CHECKING:
    import pandas
    import polars

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Levels at which the distribution of the normalised margins is recorded."""

Kind = Literal["bool", "int", "float", "str"]


def flatten(record: Mapping[str, Any], layers: Sequence[str] = ()) -> dict[str, Any]:
    """One measurement without lists in it: ``layer_norms/linear1.weight``, ``…_quantiles/0.05``.

    An entry of a list gets the name of its layer or its quantile's level, if there are as many
    of these, and its place in the list otherwise.

    Args:
        record: a measurement, as ``metrics.jsonl`` has it.
        layers: the layers' names, in the order of ``layer_norms``.
    """
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            parts = {str(key): entry for key, entry in value.items()}
        elif isinstance(value, Sequence) and not isinstance(value, str):
            parts = dict(zip(_labels(name, len(value), layers), value, strict=True))
        else:
            flat[name] = value
            continue
        flat |= {f"{name}/{label}": entry for label, entry in flatten(parts, layers).items()}
    return flat


def numbers_in(record: Mapping[str, Any], layers: Sequence[str] = ()) -> dict[str, float]:
    """The finite numbers of :func:`flatten`, without the step; truth values as 0 and 1."""
    return {
        name: float(value)
        for name, value in flatten(record, layers).items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def layer_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The layers' names in a run's configuration; none where it has no table of layers.

    Args:
        config: the content of a ``run.json``.
    """
    layers = config.get("layers") or ()
    if not all(isinstance(layer, Mapping) and "name" in layer for layer in layers):
        return ()
    return tuple(str(layer["name"]) for layer in layers)


def _labels(name: str, count: int, layers: Sequence[str]) -> list[str]:
    if name == "layer_norms" and count == len(layers) == len(set(layers)):
        return list(layers)
    if name.endswith("_quantiles") and count == len(QUANTILES):
        return [f"{level:g}" for level in QUANTILES]
    return [str(place) for place in range(count)]


class Metrics(list[dict[str, Any]]):
    """The measurements of a run, oldest first: a list of dictionaries that can be had as a table.

    A table has a row a measurement and a column a number. Lists become several columns, with the
    names of :func:`flatten`; what a measurement lacks is missing there (None, NaN or null).

    Args:
        records: the measurements.
        layers: the layers' names, for the columns of ``layer_norms``.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = (), layers: Sequence[str] = ()) -> None:
        super().__init__(records)
        self.layers = tuple(layers)

    def flat(self) -> list[dict[str, Any]]:
        """The measurements without lists in them, see :func:`flatten`."""
        return [flatten(record, self.layers) for record in self]

    def columns(self) -> dict[str, list[Any]]:
        """Columns by name, in the order in which measurements name them; None is a missing value.

        The values of a column are of one type: ``bool``, ``int``, ``float`` or ``str``.
        """
        rows = self.flat()
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: _of_one_type([row.get(name) for row in rows]) for name in names}

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a pandas frame; missing numbers are NaN.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        pd = optional("pandas", "pandas", "the frame of a run", "pandas")
        return pd.DataFrame(
            {
                name: pd.Series(values, dtype=_pandas_type(values))
                for name, values in self.columns().items()
            }
        )

    def to_polars(self) -> polars.DataFrame:
        """The table as a polars frame; missing values are null.

        Raises:
            MissingDependencyError: polars is not installed.
        """
        pl = optional("polars", "polars", "the frame of a run", "polars")
        types = {"bool": pl.Boolean, "int": pl.Int64, "float": pl.Float64, "str": pl.String}
        return pl.DataFrame(
            [
                pl.Series(name, values, dtype=types[kind_of(values)])
                for name, values in self.columns().items()
            ]
        )


def kind_of(values: Iterable[Any]) -> Kind:
    """The type that all values of a column share; ``float`` if all are missing."""
    types = {type(value) for value in values if value is not None}
    if types == {bool}:
        return "bool"
    if types == {int}:
        return "int"
    return "float" if types <= {bool, int, float} else "str"


def _of_one_type(values: list[Any]) -> list[Any]:
    convert = {"bool": bool, "int": int, "float": float, "str": str}[kind_of(values)]
    return [None if value is None else convert(value) for value in values]


def _pandas_type(values: list[Any]) -> str:
    kind, gaps = kind_of(values), any(value is None for value in values)
    if kind == "bool":
        return "boolean" if gaps else "bool"  # "bool" has no missing values
    if kind == "int":
        return "float64" if gaps else "int64"
    return "float64" if kind == "float" else "str"
