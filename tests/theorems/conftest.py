"""Runs that several tests judge; each is trained once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from theorem_runs import trained

from marginflow.runs import Run


@pytest.fixture(scope="session")
def settled() -> Callable[[int], Run]:
    """Deep linear networks of L layers, trained far along by the loss-based rate."""
    known: dict[int, Run] = {}
    hidden = {2: (5,), 3: (5, 4), 4: (5, 4, 3)}

    def of(depth: int) -> Run:
        if depth not in known:
            epochs = 2500 if depth == 4 else 1500
            known[depth] = trained(*hidden[depth], lr="loss-based:fall=1", epochs=epochs)
        return known[depth]

    return of


@pytest.fixture(scope="session")
def by_lemma_2() -> Run:
    """Three layers at the step size of Lemma 2."""
    return trained(5, 4, epochs=800)
