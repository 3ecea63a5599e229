"""Many runs of one kind, a trial for each choice of options: ``mf.sweep`` and ``marginflow sweep``."""

from marginflow.sweeps._jobs import JOBS, OptionTypes, take_options
from marginflow.sweeps._plan import Plan, Trial, read_plan
from marginflow.sweeps._result import Outcome, Sweep, load_sweep
from marginflow.sweeps._sweep import EXECUTORS, ExecutorName, check_trials, sweep

__all__ = [
    "EXECUTORS",
    "JOBS",
    "ExecutorName",
    "OptionTypes",
    "Outcome",
    "Plan",
    "Sweep",
    "Trial",
    "check_trials",
    "load_sweep",
    "read_plan",
    "sweep",
    "take_options",
]
