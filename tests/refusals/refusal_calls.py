"""Calls of the Python API that are refused, by category."""

from __future__ import annotations

import refusal_jobs
import refusal_measures
import refusal_objects
from refusal_helpers import Call

CALLS: dict[str, list[Call]] = refusal_objects.CALLS | refusal_jobs.CALLS | refusal_measures.CALLS
