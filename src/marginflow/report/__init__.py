"""Pictures and pages of runs: the only code that draws. Nothing but the command line imports it."""

from marginflow.report._curves import comparison
from marginflow.report._draw import draw
from marginflow.report._figures_page import write_figures
from marginflow.report._html import write_report
from marginflow.report._panel_files import write_panels
from marginflow.report._save import save_figure
from marginflow.report._statement import statement
from marginflow.report._sweep_page import sweep_statement, sweep_table, write_sweep
from marginflow.report._tables import comparison_table

__all__ = [
    "comparison",
    "comparison_table",
    "draw",
    "save_figure",
    "statement",
    "sweep_statement",
    "sweep_table",
    "write_figures",
    "write_panels",
    "write_report",
    "write_sweep",
]
