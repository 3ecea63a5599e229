"""What the package is made of: its public names, and nothing of what it judges."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

import marginflow.references as references
from marginflow.errors import MissingDependencyError

ALLOWED = {"numpy", "scipy", "cvxpy", "clarabel", "sklearn", "marginflow"}
FILES = sorted(Path(references.__file__).parent.glob("*.py"))


def test_public_names():
    assert references.__all__ == sorted(references.__all__)
    assert references.__all__ == [
        "Kappa",
        "MaxMargin",
        "PredictorLimit",
        "ReducedFlow",
        "Residual",
        "RobustSVM",
        "convolutional_limit",
        "diagonal_limit",
        "kappa",
        "largest_feasible_eps",
        "limit_angle_times_log_time",
        "max_margin",
        "memory_exponent",
        "one_layer_norm",
        "predicted_angle",
        "reduced_flow",
        "robust_svm",
        "two_layer_norm",
        "w_perp",
    ]
    assert all(hasattr(references, name) for name in references.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_oracle_shares_no_code_with_what_it_judges(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            root = name.partition(".")[0]
            assert root in ALLOWED or root in sys.stdlib_module_names, name
            if root == "marginflow":
                inside = ("marginflow.references", "marginflow.errors", "marginflow._checks")
                assert name.startswith(inside), name


@pytest.mark.parametrize("missing", ["cvxpy", "clarabel"])
def test_a_missing_solver_names_its_install_command(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    x, y = np.eye(2), np.ones(2)
    for call in (
        lambda: references.max_margin(x, y, p=3),
        lambda: references.robust_svm(x, y, 0.1, p=2),
        lambda: references.diagonal_limit(x, y),
    ):
        with pytest.raises(
            MissingDependencyError, match=r"pip install 'marginflow\[oracles\]'"
        ) as e:
            call()
        assert e.value.package == missing
    for p in (1, 2, np.inf):  # these do without
        assert references.max_margin(x, y, p=p).separable
