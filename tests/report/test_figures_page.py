"""Matrices, and the page of all figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from marginflow.errors import InputError
from marginflow.experiments import Curve, FigureData, Matrix, Panel
from marginflow.report import draw, save_figure, write_figures
from marginflow.report._svg import describe
from marginflow.theorems import Verdict

MATRIX = Matrix(
    "Accuracy (%)", "measured under", "trained against", ("A", "B"), ("none", "ℓ∞-PGD"),
    ((50.0, -1.25), (50.0, float("nan"))),
)  # fmt: skip


def figure(*panels: Panel | Matrix, name: str = "cross") -> FigureData:
    verdict = Verdict("Claim <1>", "c", (), "q", "p", "γ̂_m = 2 & more", "t", "fails", "do this")
    return FigureData(name, f"Title of {name}", "Statement <b>.", panels, ("Note.",), (verdict,))


def test_a_matrix_shows_every_number_and_marks_the_largest_of_a_column() -> None:
    (axes,) = draw(figure(MATRIX)).axes
    texts = {(t.get_text(), t.get_position()): t.get_fontweight() for t in axes.texts}
    assert texts == {
        ("50.0", (0.5, 0.5)): "bold",
        ("50.0", (0.5, 1.5)): "bold",
        ("−1.2", (1.5, 0.5)): "bold",
        ("–", (1.5, 1.5)): "normal",
    }
    assert [t.get_text() for t in axes.get_xticklabels()] == ["A", "B"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["none", "ℓ∞-PGD"]
    low, high = axes.get_ylim()
    assert low > high, "the first row is on top"


def test_a_matrix_beside_curves_is_saved_alike_twice(tmp_path: Path) -> None:
    both = figure(MATRIX, Panel("p", "x", "y", (Curve("a", (0, 1), (1, 2)),)))
    first = save_figure(both, tmp_path / "a.svg").read_bytes()
    assert save_figure(both, tmp_path / "b.svg").read_bytes() == first


def test_a_matrix_in_words() -> None:
    words = describe(MATRIX)
    assert words.startswith("Accuracy (%). Table of trained against (rows) by measured under")
    assert "none: A 50.0, B -1.2." in words


@pytest.mark.parametrize("values", [((1.0,), (2.0,)), ((1.0, 2.0),), ((1.0, 2.0), (3.0,))])
def test_a_matrix_whose_parts_do_not_fit(values: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(InputError, match="expected 2 rows of 2 numbers"):
        draw(figure(Matrix("m", "x", "y", ("A", "B"), ("C", "D"), values)))
    with pytest.raises(InputError, match="no cells"):
        draw(figure(Matrix("m", "x", "y", (), (), ())))


def test_the_page_escapes_and_is_the_same_twice(tmp_path: Path) -> None:
    figures = [(figure(MATRIX), 30.0), (figure(MATRIX, name="other"), 600.0)]
    page = write_figures(figures, tmp_path / "new" / "index.html", scale="demo", command="a & b")
    text = page.read_text()
    assert "Statement &lt;b&gt;." in text
    assert "Claim &lt;1&gt;" in text
    assert "<i>γ̂</i><sub>m</sub> = 2 &amp; more".replace(" = ", "\u00a0=\u00a0") in text
    assert "a &amp; b" in text
    assert '<strong class="verdict fails">fails</strong>' in text
    assert "took 30 s in all" in text
    assert "took 10.0 min in all" in text
    assert text.count("<svg") == 2
    again = write_figures(figures, tmp_path / "again.html", scale="demo", command="a & b")
    assert again.read_bytes() == page.read_bytes()


def test_what_the_page_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.html"):
        write_figures([(figure(MATRIX), 1.0)], tmp_path / "a.pdf", scale="demo", command="")
    with pytest.raises(InputError, match="at least one"):
        write_figures([], tmp_path / "a.html", scale="demo", command="")
