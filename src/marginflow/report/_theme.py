"""Colours of the figures, on light and on dark paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from marginflow._checks import choice

ThemeName = Literal["light", "dark"]


@dataclass(frozen=True)
class Theme:
    """The colours of one figure; no two of them are the same.

    Attributes:
        paper: background.
        ink: text and axes.
        muted: the zero line and the smaller text.
        grid: the grid.
        palette: curves, by :attr:`Curve.color`.
    """

    paper: str
    ink: str
    muted: str
    grid: str
    palette: tuple[str, ...]

    def variables(self) -> dict[str, str]:
        """The colours by name, as the report's style sheet calls them."""
        named = {"paper": self.paper, "ink": self.ink, "muted": self.muted, "grid": self.grid}
        return named | {f"curve-{k}": color for k, color in enumerate(self.palette)}


# Okabe and Ito's colours for all kinds of colour vision, without their yellow, which is hard to
# see on white, and with Tol's wine in place of their black, which is the ink's. On dark paper they
# are lighter. As people without red, green or blue cones see them, no two of either palette are
# closer than 15 in CIELAB: a test simulates that.
_THEMES: dict[str, Theme] = {
    "light": Theme(
        paper="#ffffff",
        ink="#1f2328",
        muted="#59636e",
        grid="#e3e6ea",
        palette=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255"),
    ),
    "dark": Theme(
        paper="#161b22",
        ink="#e6edf3",
        muted="#9aa5b1",
        grid="#2d343d",
        palette=("#6da1f4", "#d27633", "#2ac98b", "#e99edb", "#dece3b", "#7675f6", "#e3f3cf"),
    ),
}


def theme_named(name: str) -> Theme:
    """The theme ``light`` or ``dark``.

    Raises:
        SpecificationError: another name.
    """
    return _THEMES[choice("theme", name, _THEMES)]
