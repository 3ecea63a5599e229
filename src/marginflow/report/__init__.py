"""Pictures and pages of runs: the only code that draws. Nothing but the command line imports it."""

from marginflow.report._curves import comparison
from marginflow.report._draw import draw, save_figure
from marginflow.report._statement import statement
from marginflow.report._text import comparison_table

__all__ = ["comparison", "comparison_table", "draw", "save_figure", "statement"]
