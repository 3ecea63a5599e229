"""What a job would refuse, found before anything is trained or written: the jobs' own checks.

Source: marginflow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from marginflow._checks import choice, whole
from marginflow.ascent import build_method
from marginflow.datasets import Dataset
from marginflow.runs import load_run
from marginflow.workflow._flow import check_flow, gradient_flow
from marginflow.workflow._flow_goals import Goals
from marginflow.workflow._linear import LINEAR
from marginflow.workflow._maximize import maximize
from marginflow.workflow._setup import prepare
from marginflow.workflow._train import as_device, as_dtype, plan_training, train


def check_job(job: str, model: str, data: Dataset, **options: Any) -> None:
    """Refuse what :func:`train`, :func:`maximize` or :func:`gradient_flow` would refuse.

    Seen is all that one evaluation on two examples shows: specifications, types and ranges, and
    whether model, data and perturbation fit each other. Nothing is written.

    Args:
        job: ``train``, ``maximize`` or ``flow``.
        model: the network's specification.
        data: the data set.
        options: of the job, but for what concerns its run directory.

    Raises:
        InputError: an argument that cannot be used.
        MissingDependencyError: a library that an option needs is not installed.
    """
    {"train": _training, "maximize": _maximization, "flow": _flow}[job](model, data, options)


def _training(model: str, data: Dataset, options: dict[str, Any]) -> None:
    asked = inspect.signature(plan_training).parameters
    given = _with_defaults(train, options)
    plan_training(model, data, **{name: v for name, v in given.items() if name in asked})


def _maximization(model: str, data: Dataset, options: dict[str, Any]) -> None:
    given = _with_defaults(maximize, options)
    method = str(given["method"])
    name = method.partition(":")[0].strip().lower()
    if name == "loss-based":
        rest = {k: v for k, v in options.items() if k not in ("method", "strict", "start")}
        return _training(model, data, {**rest, "lr": method})
    if name not in LINEAR:
        build_method(method)
    setup = prepare(
        model,
        data,
        attack=given["attack"],
        measure_with=given["measure_with"],
        loss=given["loss"],
        binary_loss="logistic",
        derivative="detached",
        seed=given["seed"],
        out=None,
        resume=False,
        force=False,
    )
    if given["start"] is not None:
        load_run(given["start"]).checkpoint()
    setup.place(as_dtype(given["dtype"], setup.model), as_device(given["device"]))
    whole("epochs", given["epochs"], least=1)
    if given["batch_size"] is not None:
        whole("batch_size", given["batch_size"], least=1)
    choice("engine", given["engine"], ("auto", "autograd", "fused"))


def _flow(model: str, data: Dataset, options: dict[str, Any]) -> None:
    given = _with_defaults(gradient_flow, options)
    setup = prepare(
        model,
        data,
        attack=given["attack"],
        loss=given["loss"],
        binary_loss="exponential",
        derivative=given["derivative"],
        seed=given["seed"],
        out=None,
        resume=False,
        force=False,
    )
    goals = Goals(given["log_time"], given["log_norm"], given["loss_below"])
    limits = (given["rtol"], given["patience"], given["max_evaluations"])
    check_flow(setup, given["method"], goals, *limits)
    setup.place(torch.float64, torch.device("cpu"))


def _with_defaults(job: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options, and the job's own defaults for those that are not given."""
    parameters = inspect.signature(job).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    return {**defaults, **options}
