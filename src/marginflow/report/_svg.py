"""A drawn figure as SVG inside a page: one drawing for light, dark and paper."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup, escape

from marginflow.experiments import Matrix, Panel
from marginflow.report._matrix import describe_matrix
from marginflow.report._text import format_count, format_number, format_short, unbroken
from marginflow.report._theme import theme_named

_DROPPED = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>"
    r"|\sxmlns(?::xlink)?=\"[^\"]*\"",
    re.DOTALL,
)
_ID = re.compile(r"\sid=\"([^\"]*)\"")
# Latin letters are only those that the paper's formulas use: names of runs are left alone.
_SUBSCRIPT = re.compile(
    r"(?P<letter>(?<![A-Za-z_])(?:[α-ωΑ-ΩLGPVWacfmuvxyδ∂][\u0302-\u0304]?|max|min)|‖)"
    r"_(?P<below>\{[^}]*\}|min|max|[A-Za-zΠ0-9])(?![a-z])"
)
_SUPERSCRIPT = re.compile(r"\^(?:\{(?P<braced>[^}]*)\}|\((?P<round>[^)]*)\)|(?P<plain>-?[\w/]+))")
_OPENING = re.compile(r"\A\s*<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>")
_USE = re.compile(r"(?:xlink:href=\"#|url\(#)([^\")]*)")


def inline_svg(content: bytes, prefix: str, description: str) -> Markup:
    """``content``, drawn in light colours, for embedding in a page.

    Its colours become the page's variables (``--fig-ink`` …), so the page decides between
    light and dark; its size is the page's business too. Names inside begin with ``prefix``,
    since several drawings share the page.
    """
    svg = _DROPPED.sub("", content.decode())
    used = set(_USE.findall(svg))
    svg = _ID.sub(lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    svg = svg.replace('xlink:href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for name, color in theme_named("light").variables().items():
        svg = svg.replace(color, f"var(--fig-{name})")
    label = escape(description)
    return Markup(_OPENING.sub(lambda m: f'<svg {m[1]} role="img" aria-label="{label}">', svg, 1))


def style_variables(theme: str) -> Markup:
    """The colours of ``theme`` as the page's variables."""
    variables = theme_named(theme).variables()
    return Markup(" ".join(f"--fig-{name}: {color};" for name, color in variables.items()))


def describe(panel: Panel | Matrix) -> str:
    """The panel in words, for those who cannot see it."""
    if isinstance(panel, Matrix):
        return describe_matrix(panel)
    parts = [f"{panel.title}. Line chart of {panel.ylabel} against {panel.xlabel}."]
    label = ""
    for curve in panel.curves:
        points = _points(curve.x, curve.y)
        if not points:
            continue
        (x0, y0), (x1, y1) = points[0], points[-1]
        label = curve.label or (f"{label}, dashed" if label else panel.title)
        end = f"{format_number(y1)} at {panel.xlabel} {_place(x1)}"
        if len(points) == 1:
            parts.append(f"{label}: {end}.")
        else:
            parts.append(
                f"{label}: from {format_number(y0)} at {panel.xlabel} {_place(x0)} to {end}."
            )
    return " ".join(parts)


def _points(x: Sequence[float], y: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(a, b) for a, b in zip(x, y, strict=True) if b is not None]


def _place(x: float) -> str:
    return format_count(x) if x == round(x) else format_short(x)


def symbols(text: str) -> Markup:
    """``text`` escaped, with γ̂_m, ρ_k and c_k set as symbols and ℓ∞-PGD kept on one line."""
    text = re.sub("(?<=ℓ[2∞])-", "\u2011", text)
    found = re.compile(r"(γ̂|ρ|c)_(m|k)\b|(?<!\w)(m|λ)_(i|min)\b")
    return Markup(
        found.sub(
            lambda m: f"<i>{m[1] or m[3]}</i><sub>{m[2] or m[4]}</sub>",
            str(escape(unbroken(text))),
        )
    )


def formula(text: str) -> Markup:
    """``text`` escaped, with all indices and powers of its formulas set: W_k, v_{k+1}, σ^-2."""
    markup = _SUBSCRIPT.sub(_below, str(escape(unbroken(text))))
    return Markup(_SUPERSCRIPT.sub(_above, markup))


def _below(match: re.Match[str]) -> str:
    letter, below = match["letter"], match["below"].strip("{}").replace("-", "−")
    upright = letter in ("max", "min", "‖")
    return f"{letter if upright else f'<i>{letter}</i>'}<sub>{below}</sub>"


def _above(match: re.Match[str]) -> str:
    power = next(part for part in match.groups() if part is not None)
    return f"<sup>{power.replace('-', '−')}</sup>"
