"""The gradient flow, followed in warped time and kept as ln t."""

from marginflow.flow._field import Field
from marginflow.flow._follow import DENSE_LIMIT, TOLERANCES, Follower
from marginflow.flow._jumps import Jumps, find_jumps, jumps_between
from marginflow.flow._state import Goal, Method, State, Tally

__all__ = [
    "DENSE_LIMIT",
    "TOLERANCES",
    "Field",
    "Follower",
    "Goal",
    "Jumps",
    "Method",
    "State",
    "Tally",
    "find_jumps",
    "jumps_between",
]
