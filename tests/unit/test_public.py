"""The public face: what there is, in which order, and what importing it costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import subprocess
import sys

import pytest

import marginflow as mf
from marginflow import errors

# A literal, for the code that subprocesses run.
HEAVY = "{'cvxpy', 'jinja2', 'matplotlib', 'numpy', 'pooch', 'rich', 'scipy', 'sklearn', 'torch', 'typer'}"
PUBLIC = [
    "Alignment",
    "Audit",
    "Certificate",
    "CertifiedMargins",
    "Dataset",
    "Flow",
    "Homogeneity",
    "Layer",
    "Margins",
    "Monitor",
    "NearestKKTPoint",
    "Overfitting",
    "Rerun",
    "Run",
    "Sweep",
    "Verdict",
    "adversarial_margins",
    "ascent",
    "attacks",
    "audit",
    "certified",
    "certified_margins",
    "datasets",
    "detect_overfitting",
    "distributed",
    "errors",
    "gradient_flow",
    "kkt_certificate",
    "load",
    "load_run",
    "losses",
    "maximize",
    "measure_alignment",
    "measure_homogeneity",
    "models",
    "nearest_kkt_point",
    "normalized_network",
    "references",
    "rerun",
    "sweep",
    "train",
    "train_seeds",
    "verify",
]
PACKAGES = {
    "ascent": [
        *("Adam", "Ascent", "Falls", "Geometry", "LinearMaximum", "LinearPoint", "Method"),
        *("Polish", "Relative", "RelativeSGD", "RunningSize", "SphereSGD", "Spheres"),
        *("Steepest", "SteepestFlow", "SteepestPath", "Tempered", "build_method"),
        *("exact_budget", "get_geometry", "maximize_linear", "relative_step", "sphere_step"),
        "steepest_step",
    ],
    "attacks": [
        *("FGM", "FGSM", "PGD", "Attack", "AutoAttack", "Derivative", "ExactLinear", "FiniteSet"),
        *("Perturbation", "Query", "TwoLogits", "build", "check_budget", "from_art"),
        *("from_foolbox", "from_torchattacks", "to_art", "to_art_attack", "to_foolbox"),
        *("to_foolbox_model", "to_torchattacks"),
    ],
    "certified": [
        *("INSTALL", "METHODS", "CertifiedMargins", "Method", "certified_margins", "check_attack"),
        *("fingerprint", "read_bounds", "save_bounds"),
    ],
    "datasets": ["ClassDistance", "Dataset", "class_distance", "load", "separable"],
    "engine": [
        "AttackedOutputs",
        "AutogradEngine",
        "DenseNetwork",
        "Engine",
        "EngineName",
        "FusedEngine",
        "LossGradient",
        "ParallelEngine",
        "PerturbationPrecision",
        "Perturber",
        "Products",
        "StackPlace",
        "StackedEngine",
        "auto_engine",
        "build",
        "choose_products",
        "independent",
        "multiplying",
        "repeating",
        "stacking_gains",
        "stacking_refusal",
    ],
    "flow": [
        *("DENSE_LIMIT", "TOLERANCES", "Field", "Follower", "Goal", "Jumps", "Method", "State"),
        *("Tally", "find_jumps", "jumps_between"),
    ],
    "kkt": [
        *("Certificate", "Curve", "NearestKKTPoint", "Residuals", "RunCertificate"),
        *("SavedCertificate", "certify_run", "kkt_certificate", "nearest_kkt_point"),
        "read_certificate",
    ],
    "sweeps": [
        *("EXECUTORS", "JOBS", "ExecutorName", "OptionTypes", "Outcome", "Plan", "Sweep", "Trial"),
        *("check_trials", "load_sweep", "read_plan", "sweep", "take_options"),
    ],
    "models": [
        *("ACTIVATIONS", "Network", "SquaredReLU", "build", "cnn", "conv_linear", "deep_linear"),
        *("diagonal_linear", "linear_layers", "load_weights", "mlp", "predictor", "read_weights"),
    ],
}


def run(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_public_names_are_pinned_and_sorted() -> None:
    assert mf.__all__ == PUBLIC
    assert sorted(mf.__all__) == mf.__all__


@pytest.mark.parametrize("package", PACKAGES)
def test_the_names_of_the_packages_are_pinned(package: str) -> None:
    module = importlib.import_module(f"marginflow.{package}")
    assert module.__all__ == PACKAGES[package]
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(mf, name)
    assert getattr(mf, name) is value
    assert inspect.getdoc(value)


def test_star_import_gives_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from marginflow import *", namespace)
    assert set(PUBLIC) <= set(namespace)


def test_dir_has_every_name_once() -> None:
    for name in PUBLIC:
        getattr(mf, name)  # loading a module puts it among the globals as well
    names = dir(mf)
    assert set(PUBLIC) <= set(names)
    assert "__version__" in names
    assert len(names) == len(set(names))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'marginflow' has no attribute 'trian'"):
        mf.trian  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(mf, "Trainer")


def test_importing_loads_nothing_heavy() -> None:
    code = f"import sys, marginflow; print({HEAVY} & set(sys.modules))"
    assert run(code) == "set()"


def test_listing_names_loads_nothing_either() -> None:
    code = "import sys, marginflow as mf; dir(mf); mf.__all__; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_using_the_library_loads_torch_and_numpy_only() -> None:
    """Every public name but the oracles, and a training; then these; without a warning."""
    code = (
        "import sys, marginflow as mf\n"
        "[getattr(mf, name) for name in mf.__all__ if name != 'references']\n"
        "mf.train('mlp:4', 'separable:n=8,d=2', attack='fgsm:eps=0.01', epochs=2, momentum=0.5)\n"
        f"print(*sorted(({HEAVY} | {{'sympy', 'torch._dynamo'}}) & set(sys.modules)))\n"
        "mf.references\n"
        "print(*sorted({'matplotlib', 'typer', 'jinja2', 'sklearn', 'cvxpy'} & set(sys.modules)))"
    )
    assert run(code) == "numpy torch"


def test_type_checkers_see_what_is_loaded() -> None:
    """The imports under TYPE_CHECKING are those that take place on first use."""
    tree = ast.parse(inspect.getsource(mf))
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    seen = {
        alias.name: getattr(importlib.import_module(str(node.module)), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == PUBLIC
    assert all(getattr(mf, name) is value for name, value in seen.items())


@pytest.mark.parametrize("name", [n for n in PUBLIC if not inspect.ismodule(getattr(mf, n))])
def test_public_names_are_pickled_by_reference(name: str) -> None:
    value = getattr(mf, name)
    assert pickle.loads(pickle.dumps(value)) is value


def test_the_error_tree() -> None:
    """As drawn at the top of errors.py, each also the builtin that a caller may expect."""
    tree = {
        errors.InputError: (errors.MarginflowError, ValueError),
        errors.SpecificationError: (errors.InputError,),
        errors.DataError: (errors.InputError,),
        errors.ModelError: (errors.InputError,),
        errors.NotHomogeneousError: (errors.ModelError,),
        errors.RunError: (errors.InputError,),
        errors.StorageError: (errors.MarginflowError, OSError),
        errors.MissingDependencyError: (errors.MarginflowError, ImportError),
        errors.DivergedError: (errors.MarginflowError, ArithmeticError),
        errors.OutOfMemoryError: (errors.MarginflowError, MemoryError),
        errors.ProcessLostError: (errors.MarginflowError, ConnectionError),
    }
    for kind, bases in tree.items():
        assert all(issubclass(kind, base) for base in bases)
    defined = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.MarginflowError)
    }
    assert defined == {*tree, errors.MarginflowError}


def test_what_errors_carry() -> None:
    assert errors.NotHomogeneousError("no", "w").offender == "w"
    missing = errors.MissingDependencyError("foolbox", "this", extra="attack-libraries")
    assert (
        str(missing)
        == "this needs the package 'foolbox': pip install 'marginflow[attack-libraries]'"
    )
    assert str(errors.MissingDependencyError("ray", "that")).endswith("pip install ray")
    assert (errors.DivergedError("x", 5, 2).step, errors.DivergedError("x", 5, 2).epoch) == (5, 2)


@pytest.mark.parametrize(
    "error",
    [
        errors.InputError("expected a, got b"),
        errors.NotHomogeneousError("no", "w"),
        errors.MissingDependencyError("ray", "that"),
        errors.DivergedError("x", 5, 2),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes(error: errors.MarginflowError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))
