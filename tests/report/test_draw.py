from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from marginflow.errors import InputError, SpecificationError, StorageError
from marginflow.experiments import Curve, FigureData, Panel
from marginflow.report import comparison, draw, save_figure
from marginflow.report._axes import label_text
from marginflow.report._theme import theme_named
from marginflow.runs import Run

MAGIC = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}


def single(*curves: Curve, **axes: str) -> FigureData:
    texts = {"title": "Title", "xlabel": "epoch", "ylabel": "γ̂_m"} | axes
    return FigureData("name", "", "", [Panel(curves=curves, **texts)])  # type: ignore[arg-type]


def axes_of(figure: FigureData, **options: float) -> Axes:
    drawn = draw(figure, **options)  # type: ignore[arg-type]
    drawn.draw_without_rendering()
    return drawn.axes[0]


def labels(axes: Axes, which: str) -> list[str]:
    axis = axes.xaxis if which == "x" else axes.yaxis
    return [tick.label1.get_text() for tick in axis.get_major_ticks()]


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf", ".SVG"])
def test_the_suffix_decides_the_format_and_the_bytes_repeat(tmp_path: Path, suffix: str) -> None:
    data = single(Curve("a", [0, 1], [0.001, 0.002]))
    first = save_figure(draw(data), tmp_path / "new" / f"a{suffix}")
    second = save_figure(data, tmp_path / f"b{suffix}")  # data are drawn on the way
    assert first == tmp_path / "new" / f"a{suffix}"
    assert first.read_bytes().startswith(MAGIC[suffix.lower()])
    assert first.read_bytes() == second.read_bytes()


def test_a_figure_saved_twice_is_the_same_file(tmp_path: Path, adversarial: Run) -> None:
    figure = draw(comparison([adversarial]))
    pages = [save_figure(figure, tmp_path / f"{k}.svg").read_bytes() for k in range(2)]
    assert pages[0] == pages[1]
    assert b"<dc:date>" not in pages[0]
    assert b"<text" not in pages[0]


def test_the_users_settings_neither_matter_nor_change(tmp_path: Path) -> None:
    data = single(Curve("a", [0, 1], [0.001, 0.002]))
    plain = save_figure(data, tmp_path / "plain.svg").read_bytes()
    theirs = {
        "lines.linewidth": 9.0,
        "savefig.bbox": "tight",
        "svg.fonttype": "none",
        "font.size": 30.0,
        "axes.grid": True,
    }
    with matplotlib.rc_context(theirs):
        assert save_figure(data, tmp_path / "theirs.svg").read_bytes() == plain
        for key, value in theirs.items():
            assert matplotlib.rcParams[key] == value


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.svg.txt", ".svg"])
def test_other_suffixes_are_refused(tmp_path: Path, adversarial: Run, name: str) -> None:
    with pytest.raises(InputError, match=r"ends in \.pdf, \.png, \.svg"):
        save_figure(comparison([adversarial]), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make the folder"):
        save_figure(single(Curve("a", [0], [0])), tmp_path / "file" / "a.svg")


def test_matplotlib_waits_until_something_is_drawn_and_pyplot_forever() -> None:
    code = (
        "import sys, marginflow.report as r\n"
        "from marginflow.experiments import Curve, FigureData, Panel\n"
        "loaded = [m for m in ('matplotlib', 'jinja2') if m in sys.modules]\n"
        "r.draw(FigureData('n', '', '', [Panel('', 'x', 'y', [Curve('', [0, 1], [0, 1])])]))\n"
        "print(loaded, 'matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "True", "False"]


def test_small_numbers_are_scaled_and_say_so() -> None:
    axes = axes_of(single(Curve("a", [0, 1, 2], [0.0005, 0.001, 0.0021])))
    assert axes.get_ylabel().endswith("(×10⁻³)")
    values = [float(text) for text in labels(axes, "y")]
    assert max(values) == 2.0
    assert len({text.partition(".")[2] != "" for text in labels(axes, "y")}) == 1
    assert axes.yaxis.get_offset_text().get_text() == ""


def test_ordinary_numbers_stay_and_large_ones_are_scaled() -> None:
    axes = axes_of(single(Curve("a", [0, 1e6, 2e6], [-0.17, 0.0, 0.1])))
    assert "×" not in axes.get_ylabel()
    assert axes.get_xlabel() == "epoch (×10⁶)"
    assert "−0.15" in labels(axes, "y")


def test_epoch_zero_has_its_place_on_a_symlog_axis() -> None:
    epochs = [0, 1, 3, 10, 100, 1000]
    axes = axes_of(single(Curve("a", epochs, epochs), xscale="symlog"))
    assert labels(axes, "x") == ["0", "1", "10", "100", "1,000"]
    places = [axes.transData.transform((epoch, 0))[0] for epoch in (0, 1, 10, 100)]
    assert places[0] >= axes.bbox.x0
    # Half a decade from 0 to 1, whole ones beyond.
    assert (places[1] - places[0]) / (places[2] - places[1]) == pytest.approx(0.5, abs=0.06)
    assert places[2] - places[1] == pytest.approx(places[3] - places[2])


@pytest.mark.parametrize(("ys", "expected"), [([-1.0, 2.0], 1), ([1.0, 2.0], 0), ([-2.0, -1.0], 0)])
def test_a_zero_line_where_the_sign_changes(ys: Sequence[float], expected: int) -> None:
    axes = axes_of(single(Curve("a", [0, 1], ys)))
    level = [line for line in axes.lines if list(line.get_ydata()) == [0, 0]]
    assert len(level) == expected


def test_symlog_shows_magnitudes_on_both_sides_of_zero() -> None:
    axes = axes_of(single(Curve("a", [0, 1, 2, 3], [-0.17, -0.02, 0.002, 0.02]), yscale="symlog"))
    assert labels(axes, "y") == ["−0.1", "−0.01", "−0.001", "0", "0.001", "0.01"]


def test_wide_logarithmic_axes_carry_powers_and_narrow_ones_numbers() -> None:
    wide = axes_of(single(Curve("a", [1, 1e5], [1e-12, 1.0]), yscale="log", xscale="log"))
    assert labels(wide, "x") == ["1", "10", "100", "10³", "10⁴", "10⁵"]
    assert "10⁻¹²" in labels(wide, "y")
    narrow = axes_of(single(Curve("a", [1, 2], [20.0, 21.0]), yscale="log"))
    assert labels(narrow, "y")[0] == "20"
    assert labels(narrow, "y")[-1] == "21"


def test_gaps_stay_gaps_and_lonely_points_are_marked() -> None:
    x = list(range(40))
    y = [1.0, None, math.nan, 2.0, math.inf, *([3.0] * 35)]
    line = axes_of(single(Curve("a", x, y))).lines[0]
    drawn = list(line.get_ydata())
    assert [k for k, v in enumerate(drawn) if math.isnan(v)] == [1, 2, 4]
    assert line.get_markevery() == [0, 3]
    assert line.get_marker() == "o"


def test_no_marker_on_a_dense_curve() -> None:
    line = axes_of(single(Curve("a", list(range(60)), list(range(60))))).lines[0]
    assert line.get_marker() in ("None", None)


def test_percentages_end_at_a_hundred() -> None:
    axes = axes_of(single(Curve("a", [0, 1, 2], [100.0, 100.0, 100.0]), ylabel="correct (%)"))
    assert axes.get_ylim()[1] < 101
    assert axes.get_ylim()[0] < 96
    assert labels(axes, "y")[-1] == "100"


def all_legends(figure: Figure) -> list[tuple[Axes, object]]:
    return [(axes, axes.get_legend()) for axes in figure.axes if axes.get_legend()]


@pytest.mark.parametrize("width", [4.4, 9.0])
@pytest.mark.parametrize("size", [2, 9])
def test_legends_cover_nothing_and_are_not_cut(width: float, size: int) -> None:
    names = ["fgsm", "a rather long name of a run, eps=16/255, steps=5", "standard"]
    curves = [
        Curve(f"{names[k % 3]} {k}", list(range(50)), [k + math.sin(j) for j in range(50)], color=k)
        for k in range(size)
    ]
    panels = [Panel(f"Panel {k}", "epoch", "y", curves[: size - k % 2 or 1]) for k in range(5)]
    figure = draw(FigureData("n", "Title", "Statement.", panels, ["Note."]), width_inches=width)
    figure.draw_without_rendering()
    boxes = [axes.bbox for axes in figure.axes if axes.axison]
    assert all(box.height > 60 for box in boxes)
    found = all_legends(figure)
    assert len(found) == 5
    for axes, legend in found:
        box = legend.get_window_extent()  # type: ignore[attr-defined]
        label = axes.xaxis.label.get_window_extent()
        assert box.y1 <= label.y0 + 1
        assert not any(box.overlaps(other) for other in boxes)
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 + 1
    notes = [text.get_window_extent() for text in figure.texts]
    assert len(notes) == 3
    for note in notes:
        assert not any(note.overlaps(box) for box in boxes)


def test_names_are_taken_literally_and_symbols_are_set() -> None:
    assert label_text("γ̂_m and ρ_k, degree c_k") == r"$\hat{γ}_{m}$ and $ρ_{k}$, degree $c_{k}$"
    assert label_text("‖W_k‖_F") == r"‖$W_{k}$$‖_{F}$"
    assert label_text("cost $5\n_a run_1") == r"cost \$5 _a run_1"
    assert label_text("日本 ρ") == "□□ ρ"
    hostile = single(Curve(r"$\frac{ \undefined} $", [0, 1], [0, 1]), title="$x", xlabel="a_b^{")
    assert axes_of(hostile).get_legend().get_texts()[0].get_text().count(r"\$") == 2


def luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_themes_are_legible(name: str, adversarial: Run) -> None:
    theme = theme_named(name)
    assert contrast(theme.ink, theme.paper) > 7
    assert contrast(theme.muted, theme.paper) > 4.5
    assert all(contrast(color, theme.paper) > 3 for color in theme.palette[:3])
    assert len(set(theme.variables().values())) == len(theme.variables())
    figure = draw(comparison([adversarial]), theme=name)  # type: ignore[arg-type]
    assert to_rgb(figure.get_facecolor()) == to_rgb(theme.paper)
    assert to_rgb(figure.axes[0].lines[-2].get_color()) == to_rgb(theme.palette[0])
    assert to_rgb(figure.texts[0].get_color()) == to_rgb(theme.ink)


def test_misuse_is_refused() -> None:
    good = single(Curve("a", [0], [0]))
    with pytest.raises(InputError, match="no panels"):
        draw(FigureData("empty", "", "", []))
    with pytest.raises(InputError, match="of one length, got 2, 1, 0 and 0"):
        draw(single(Curve("a", [0, 1], [0])))
    with pytest.raises(InputError, match="of one length"):
        draw(single(Curve("a", [0, 1], [0, 1], low=[0, 0])))
    with pytest.raises(InputError, match="width_inches"):
        draw(good, width_inches=1)
    with pytest.raises(SpecificationError, match="did you mean 'dark'"):
        draw(good, theme="darkk")  # type: ignore[arg-type]
