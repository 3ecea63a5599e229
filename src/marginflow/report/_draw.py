"""Figures from their data, with matplotlib. Nothing here touches pyplot or leaves settings behind.

Source: marginflow.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from marginflow._checks import real
from marginflow.errors import InputError
from marginflow.experiments import Curve, FigureData, Matrix, Panel
from marginflow.report._axes import finite, label_text, set_scales, unit_exponent
from marginflow.report._matrix import check_matrix, draw_matrix
from marginflow.report._text import margin_unit, unbroken
from marginflow.report._theme import Theme, ThemeName, theme_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FONT = 9.0
_ROW = 0.19  # inches of a line of a legend
_FEW = 25  # points of a curve that are marked, as one could take the line for a measurement
_SOLID = ("-", (0, (1, 1)))
_DASHED = ((0, (4, 1.8)), (0, (6, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""By the curve's colour: who cannot tell the colours, or prints them grey, can tell these."""
_SPARSE = 6  # marks on a curve that is too dense to mark every point
_INKED = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
_PAPER = ("axes.facecolor", "figure.facecolor")
_SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.labelsize": _FONT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": _FONT + 1,
    "axes.titleweight": "bold",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": _FONT,
    "legend.fontsize": _FONT,
    "mathtext.fontset": "dejavusans",
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "marginflow",
    "xtick.labelsize": _FONT,
    "ytick.labelsize": _FONT,
}


def draw(figure: FigureData, *, width_inches: float = 9.0, theme: ThemeName = "light") -> Figure:
    """Draw ``figure``: its title, its panels with a legend under each, its statement and notes.

    All text is taken literally, except that symbols such as γ̂_m and ρ_k are set as symbols. Axes of
    very small or large numbers say their unit in the label (``×10⁻³``). On a symlog axis of
    epochs, epoch 0 stands half a decade before epoch 1. An empty title, statement
    or list of notes leaves no gap.

    Args:
        figure: what to draw; at least one panel.
        width_inches: width of the figure in inches, which also decides the number of columns.
        theme: ``light`` or ``dark``; colours for all kinds of colour vision.

    Returns:
        a figure that belongs to no window, for :func:`marginflow.report.save_figure` or a notebook.

    Raises:
        InputError: no panels, curves whose x and y differ in length, a width below 2 inches.
        SpecificationError: an unknown theme.
    """
    real("width_inches", width_inches, least=2.0)
    colors = theme_named(theme)
    if not figure.panels:
        raise InputError(f"the figure {figure.name!r} has no panels to draw")
    for panel in figure.panels:
        if isinstance(panel, Matrix):
            check_matrix(panel)
            continue
        for curve in panel.curves:
            _check(panel, curve)
    with own_settings(colors):
        return _drawn(figure, width_inches, colors)


@contextlib.contextmanager
def own_settings(colors: Theme | None = None) -> Iterator[None]:
    """Our settings on matplotlib's defaults, whatever the user's own; restored afterwards."""
    import matplotlib

    ours = dict(_SETTINGS)
    if colors is not None:
        ours |= dict.fromkeys(_INKED, colors.ink) | dict.fromkeys(_PAPER, colors.paper)
        ours["grid.color"] = colors.grid
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours)
        yield


def _check(panel: Panel, curve: Curve) -> None:
    sizes = {len(curve.x), len(curve.y)} | {len(b) for b in (curve.low, curve.high) if len(b)}
    if len(sizes) > 1 or bool(len(curve.low)) != bool(len(curve.high)):
        raise InputError(
            f"the curve {curve.label!r} of {panel.title!r}: expected x, y, low and high of one "
            f"length, got {len(curve.x)}, {len(curve.y)}, {len(curve.low)} and {len(curve.high)}"
        )


def _drawn(figure: FigureData, width: float, colors: Theme) -> Figure:
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = _columns(len(figure.panels), width)
    rows = -(-len(figure.panels) // columns)
    breadth = width / columns
    legends = [_legend(panel, breadth) for panel in figure.panels]
    titles = [_wrapped(panel.title, breadth - 0.5, _FONT + 2) for panel in figure.panels]
    heights = []
    for row in range(rows):
        cells = range(row * columns, min((row + 1) * columns, len(figure.panels)))
        lines = max(legends[k].lines for k in cells)
        titled = max(len(titles[k]) for k in cells)
        heights.append(min(2.5, 0.56 * breadth) + 0.6 + 0.2 * titled + _ROW * lines)
    above = [
        *_block(_wrapped(figure.title, width, _FONT + 3), _FONT + 3, colors.ink, "bold"),
        *_block(_wrapped(figure.statement, width, _FONT), _FONT, colors.ink),
    ]
    notes = [line for note in figure.notes for line in _wrapped(note, width, _FONT - 1)]
    below = _block(notes, _FONT - 1, colors.muted)
    top, bottom = (
        sum(line.height for line in lines) + 0.1 * bool(lines) for lines in (above, below)
    )
    height = top + sum(heights) + bottom
    # Figure texts are no part of the layout: it gets the room between them.
    rect = (0, bottom / height, 1, 1 - (top + bottom) / height)
    layout = ConstrainedLayoutEngine(rect=rect, w_pad=0.06, h_pad=0.06)
    canvas = Canvas(figsize=(width, height), layout=layout)
    axes = canvas.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    for k, panel in enumerate(figure.panels):
        if isinstance(panel, Matrix):
            draw_matrix(axes[k], panel, "\n".join(titles[k]), colors)
        else:
            _draw_panel(axes[k], panel, "\n".join(titles[k]), legends[k], colors)
    for empty in axes[len(figure.panels) :]:
        empty.set_axis_off()
    edge = height - 0.06
    for line in above:
        _write(canvas, line, edge)
        edge -= line.height
    edge = bottom
    for line in below:
        _write(canvas, line, edge)
        edge -= line.height
    # Laid out once and for all: a second pass would move things by a hair, and so the bytes.
    layout.execute(canvas)
    canvas.set_layout_engine("none")
    return canvas


@dataclass(frozen=True)
class _Line:
    """A line of text over or under the panels; its height in inches."""

    text: str
    size: float
    color: str
    weight: str

    @property
    def height(self) -> float:
        return 1.45 * self.size / 72


def _block(lines: Sequence[str], size: float, color: str, weight: str = "normal") -> list[_Line]:
    return [_Line(text, size, color, weight) for text in lines]


def _write(canvas: Figure, line: _Line, edge: float) -> None:
    """Write ``line`` with its upper edge ``edge`` inches above the bottom of the figure."""
    width, height = canvas.get_size_inches()
    canvas.text(
        0.1 / width,
        (edge - 1.05 * line.size / 72) / height,  # the baseline: symbols do not move the line
        line.text,
        fontsize=line.size,
        color=line.color,
        fontweight=line.weight,
        va="baseline",
    )


def _columns(panels: int, width: float) -> int:
    """As many columns as leave three inches a panel, without a ragged 3 + 1."""
    most = max(1, int(width // 2.9))
    if panels <= min(most, 3):
        return panels
    return 2 if most == 2 or (most > 2 and panels == 4) else min(most, 3)


def _wrapped(text: str, width: float, size: float) -> list[str]:
    """Lines of ``text`` that fit into ``width`` inches; DejaVu Sans is about 0.56 em a letter."""
    limit = max(12, int((width - 0.2) * 72 / (0.56 * size)))
    return [label_text(line) for line in textwrap.wrap(unbroken(text), limit)]


@dataclass(frozen=True)
class _Legend:
    """A legend's entries and how it stands under its panel."""

    labels: Sequence[str]
    columns: int

    @property
    def lines(self) -> int:
        """Its height in lines."""
        high = max((1 + label.count("\n") for label in self.labels), default=0)
        return high * -(-len(self.labels) // self.columns)


def _legend(panel: Panel | Matrix, breadth: float) -> _Legend:
    """Side by side where the entries are short; a curve without a name has no entry."""
    if isinstance(panel, Matrix):
        return _Legend((), 1)
    labels = [
        "\n".join(_wrapped(curve.label, breadth - 0.9, _FONT))
        for curve in panel.curves
        if curve.label
    ]
    letters = max((len(part) for label in labels for part in label.split("\n")), default=0)
    fitting = int((breadth - 0.6) / (0.55 + letters * 0.53 * _FONT / 72))
    return _Legend(labels, max(1, min(len(labels), fitting)))


def _draw_panel(axes: Axes, panel: Panel, title: str, legend: _Legend, colors: Theme) -> None:
    from matplotlib.transforms import ScaledTranslation

    drawn = [v for c in panel.curves for part in (c.y, c.low, c.high) for v in finite(part)]
    xs = [x for curve in panel.curves for x in finite(curve.x)]
    # A symlog x-axis has powers at its ticks, and its threshold in the units of the values.
    x_exponent = 0 if panel.xscale == "symlog" else unit_exponent(xs, panel.xscale)
    y_exponent = unit_exponent(drawn, panel.yscale)
    x_unit, y_unit = 10.0**-x_exponent, 10.0**-y_exponent
    several = len({curve.color for curve in panel.curves if curve.measured}) > 1
    handles = []
    for order, curve in enumerate(panel.curves):
        x = [v * x_unit for v in finite(curve.x)]
        y, low, high = ([v * y_unit for v in finite(p)] for p in (curve.y, curve.low, curve.high))
        color = colors.palette[curve.color % len(colors.palette)]
        if not curve.measured:
            color = colors.muted
        # Past the end of the palette the colours come again, with another stroke.
        again = curve.color // len(colors.palette) % 2
        stroke = (_DASHED if curve.dashed else _SOLID)[again]
        if low:
            axes.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0, zorder=2)
            for edge in (low, high):  # where bands overlap, their edges tell them apart
                axes.plot(x, edge, color=color, alpha=0.55, linewidth=0.6, zorder=2.2)
        width = 1.7 if curve.measured else 1.1
        (line,) = axes.plot(x, y, color=color, linestyle=stroke, linewidth=width)
        line.set_zorder(3 + order / 100)
        marked: Sequence[int] = range(len(x)) if len(x) <= _FEW else _isolated(x, y)
        if several and len(x) > _FEW:
            marked = sorted({*marked, *_sparse(len(x), curve.color)})
        if marked and curve.measured:
            filling = colors.paper if curve.dashed else color
            marker = _MARKERS[curve.color % len(_MARKERS)] if several else "o"
            line.set(marker=marker, markersize=3.5 if several else 3, markevery=list(marked))
            line.set_markerfacecolor(filling)
        if curve.label:
            handles.append(line)
    set_scales(axes, panel, [v * x_unit for v in xs], [v * y_unit for v in drawn])
    axes.set_title(title)
    axes.set_xlabel(label_text(panel.xlabel + margin_unit(x_exponent)))
    axes.set_ylabel(label_text(panel.ylabel + margin_unit(y_exponent)))
    axes.grid(True, linewidth=0.7)
    axes.tick_params(length=3)
    if handles:
        # Under the axis label, where no curve is, whatever the height of the axes.
        under = ScaledTranslation(0, -0.45, axes.figure.dpi_scale_trans)
        axes.legend(
            handles,
            legend.labels,
            loc="upper left",
            bbox_to_anchor=(0, 0),
            bbox_transform=axes.transAxes + under,
            borderaxespad=0,
            borderpad=0,
            columnspacing=1.4,
            frameon=False,
            handlelength=2.2,
            ncols=legend.columns,
        )


def _sparse(count: int, color: int) -> list[int]:
    """A few places along a dense curve; each colour begins elsewhere, as curves often coincide."""
    stride = count / _SPARSE
    return [
        int((k + (color % len(_MARKERS) + 0.5) / len(_MARKERS)) * stride) for k in range(_SPARSE)
    ]


def _isolated(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Points with a gap on both sides, which a line without markers would not show."""
    there = [False, *(math.isfinite(a + b) for a, b in zip(x, y, strict=True)), False]
    return [
        k - 1 for k in range(1, len(there) - 1) if there[k] and not (there[k - 1] or there[k + 1])
    ]
