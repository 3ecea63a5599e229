"""All statements of the paper on one run, in its order."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from torch import nn

from marginflow.attacks import Attack
from marginflow.datasets import Dataset
from marginflow.errors import InputError
from marginflow.runs import Run, load_run
from marginflow.theorems._damage import judged
from marginflow.theorems._evidence import Evidence
from marginflow.theorems._verdict import Verdict
from marginflow.theorems.appendix_b5 import appendix_b5
from marginflow.theorems.eq_20 import eq_20
from marginflow.theorems.eq_36 import eq_36
from marginflow.theorems.eq_68 import eq_68
from marginflow.theorems.eq_129 import eq_129
from marginflow.theorems.lemma_1 import lemma_1
from marginflow.theorems.lemma_2 import lemma_2
from marginflow.theorems.lemma_3 import lemma_3
from marginflow.theorems.lemma_4 import lemma_4
from marginflow.theorems.lemma_5 import lemma_5
from marginflow.theorems.lemma_6 import lemma_6
from marginflow.theorems.lemma_7 import lemma_7
from marginflow.theorems.lemma_8 import lemma_8
from marginflow.theorems.lemma_9 import lemma_9
from marginflow.theorems.lemma_10 import lemma_10
from marginflow.theorems.lemma_11 import lemma_11
from marginflow.theorems.lemma_12 import lemma_12
from marginflow.theorems.lemma_13 import lemma_13
from marginflow.theorems.theorem_2 import theorem_2
from marginflow.theorems.theorem_3 import theorem_3
from marginflow.theorems.theorem_4 import theorem_4
from marginflow.theorems.theorem_5 import theorem_5
from marginflow.theorems.theorem_6 import theorem_6

_STATEMENTS: tuple[Callable[[Evidence], Verdict | tuple[Verdict, ...]], ...] = (
    lemma_1,
    lemma_2,
    lemma_5,
    lemma_6,
    eq_36,
    lemma_7,
    lemma_8,
    eq_68,
    theorem_2,
    lemma_3,
    lemma_4,
    lemma_9,
    lemma_10,
    lemma_11,
    theorem_3,
    theorem_4,
    theorem_5,
    eq_20,
    eq_129,
    lemma_12,
    theorem_6,
    lemma_13,
    appendix_b5,
)


class HasRun(Protocol):
    """A result that carries its run, as a :class:`marginflow.Flow` does."""

    @property
    def run(self) -> Run:
        """The recorded run."""


def verify(
    run: Run | HasRun | str | os.PathLike[str],
    data: Dataset | None = None,
    *,
    attack: Attack | None = None,
    model: nn.Module | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> tuple[Verdict, ...]:
    """Judge every statement of the paper that the package knows on one run.

    Args:
        run: a training run or a gradient flow, its directory, or the :class:`Flow` itself.
        data: the data set it was trained on; by default loaded as the run names it.
        attack: its attack, needed where the name does not say it all (a finite set).
        model: a network of the same architecture, needed for the statements of Section 3.2 on
            a run from disk whose network is not one of :mod:`marginflow.models`.
        data_dir: folder of the MNIST files, if they are what is loaded.

    Returns:
        a :class:`Verdict` for each statement, in the order of the paper. Without the extra
        ``oracles`` Appendix B.5 is *not reached*, and its advice says what to install.

    Raises:
        RunError: no such run, or other data or another attack than those it was trained on.
        InputError: data or an attack that must be given.

    Examples:
        >>> import marginflow as mf
        >>> data = mf.load("separable:n=20,d=6,margin=0.3")
        >>> attack = "exact-linear:p=2,eps=0.1"
        >>> flow = mf.gradient_flow("deep-linear:4", data, attack=attack, log_time=20)
        >>> outcomes = {verdict.statement: verdict.outcome for verdict in mf.verify(flow)}
        >>> outcomes["Lemma 4"], "fails" in outcomes.values()
        ('holds', False)
    """
    return judge(Evidence(as_run(run), data, attack=attack, model=model, data_dir=data_dir))


def as_run(run: Run | HasRun | str | os.PathLike[str]) -> Run:
    """The run itself, of a directory or of a result that carries it.

    Raises:
        InputError: something else.
    """
    if isinstance(run, str | os.PathLike):
        return load_run(run)
    found = run if isinstance(run, Run) else getattr(run, "run", None)
    if not isinstance(found, Run):
        raise InputError(
            f"run: expected a run, a flow or the path of a run directory, got {type(run).__name__}"
        )
    return found


def judge(evidence: Evidence) -> tuple[Verdict, ...]:
    """A :class:`Verdict` for each statement, in the order of the paper."""
    verdicts: list[Verdict] = []
    with judged(evidence.run):
        for statement in _STATEMENTS:
            found = statement(evidence)
            verdicts.extend(found if isinstance(found, tuple) else (found,))
    return tuple(verdicts)
