"""Command lines that are refused, by category."""

from __future__ import annotations

import refusal_paths
import refusal_words
from refusal_words import Line

LINES: dict[str, list[Line]] = refusal_words.LINES | refusal_paths.LINES
