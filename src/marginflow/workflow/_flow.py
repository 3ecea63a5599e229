"""``mf.gradient_flow``: the gradient flow, measured and recorded like a training."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn

from marginflow._checks import choice, instance, real, whole
from marginflow._memory import memory_watched
from marginflow.attacks import Attack, Derivative
from marginflow.datasets import Dataset
from marginflow.distributed import alone
from marginflow.errors import DivergedError, InputError, ModelError
from marginflow.flow import DENSE_LIMIT, Field, Follower, Method
from marginflow.homogeneity import measure_homogeneity
from marginflow.losses import Loss
from marginflow.models import load_weights
from marginflow.monitor import Monitor
from marginflow.runs import Log, Run, RunDirectory
from marginflow.training import deferred_interrupt
from marginflow.workflow._flow_goals import Goals
from marginflow.workflow._flow_job import Job
from marginflow.workflow._flow_progress import FlowProgress
from marginflow.workflow._flow_result import Flow
from marginflow.workflow._setup import Setup, prepare

_KEPT_NUMBERS = 10_000_000  # weights times points kept by default: 80 MB
_POINTS = 80  # of a flow to ln t = 10⁶, about

_log = logging.getLogger("marginflow")


def gradient_flow(
    model: nn.Module | str,
    data: Dataset | tuple[Tensor, Tensor] | str,
    *,
    attack: Attack | str | None = None,
    loss: str | Loss | None = None,
    derivative: Derivative = "total",
    log_time: float | None = None,
    log_norm: float | None = None,
    loss_below: float | None = None,
    method: Method | Literal["auto"] = "auto",
    rtol: float | None = None,
    schedule: Collection[float] | None = None,
    patience: float = 30.0,
    max_evaluations: int = 2_000_000,
    keep_weights: bool | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    log: Log = (),
) -> Flow:
    """Follow ``dW/dt = −∇L(W)`` (Section 3.2) as far as ln t = 10⁶ and beyond.

    Integrated is ``dW/ds = −∇ ln L``, the same curve, with the clock ``dt = ds/L`` carried as
    ln t and never exponentiated; once the data are separated, ln‖W‖ is the independent
    variable. The weights at the end are left in ``model``, which is converted to float64.

    Args:
        model: a multi-homogeneous network, or a specification such as ``"deep-linear:16"``.
        data: a data set, a pair (x, y), or a specification.
        attack: the perturbation of the objective; None is standard training.
        loss: by default ``exponential`` for two classes −1/+1, ``cross-entropy`` otherwise.
        derivative: ``total`` (through δ(W), what the theory speaks of) or ``detached``
            (Algorithm 1). They agree where the inner maximum is exact.
        log_time: stop at this ln t. By default 1000, if no other goal is given.
        log_norm: stop at this ln ‖W‖.
        loss_below: stop when L is below this number, in (0, 1).
        method: ``auto`` searches the field for jumps and chooses; or ``stiff`` (scipy's Radau with
            the exact Jacobian), ``runge-kutta`` (scipy's RK45), ``steps`` (explicit steps of
            relative length, for fields that jump).
        rtol: tolerance of a step relative to ‖W‖; by default :data:`marginflow.flow.TOLERANCES`.
        schedule: values of ln t at which to measure; by default −3 … 1 and ten a decade beyond.
        patience: ln t after which a flow that does not separate the data is given up (half of it, if
            ln L has all but stopped).
        max_evaluations: evaluations of the field after which the flow ends.
        keep_weights: keep the weights of every measurement, for statements about the path;
            by default for up to about 120 000 weights.
        seed: of a model given as a string and of a random start, which is drawn once.
        out: run directory; None keeps the run in memory.
        resume: continue the flow in ``out``, to the very bits of a flow that was not interrupted,
            perhaps to a farther goal (the same bits, if the earlier goal was a point of measurement).
        force: replace a run that ``out`` already holds.
        progress: show ln t, ρ and γ̂_m on standard error.
        log: where measurements go beside ``metrics.jsonl``: ``"tensorboard"``, ``"mlflow"``, an object with
            ``write(records)`` and ``close()``, or several. No sink changes or stops the flow.

    Returns:
        the :class:`Flow`. One that reaches no goal is a value too, with a reason and advice.

    Raises:
        InputError: an argument that cannot be used; an attack on the loss, which is not scale
            invariant and fades as the margins grow.
        MissingDependencyError: a library of ``log`` is not installed (nothing is written then).
        NotHomogeneousError: the network is not multi-homogeneous.
        ModelError: a random network (dropout), or one with a layer that is 0.
        RunError: ``out`` is taken, or does not fit when resuming.
        DivergedError: NaN or infinity.
        OutOfMemoryError: with what to do.
        KeyboardInterrupt: after Ctrl-C; the flow resumes from its last measurement.

    Examples:
        >>> import marginflow as mf
        >>> data = mf.load("separable:n=20,d=6,margin=0.3")
        >>> attack = "exact-linear:p=2,eps=0.1"
        >>> flow = mf.gradient_flow("deep-linear:4", data, attack=attack, log_time=20)
        >>> flow.reached, round(flow.log_time)
        (True, 20)
    """
    alone("the gradient flow", "call it outside of mf.distributed.join, without torchrun")
    setup = prepare(
        model,
        data,
        attack=attack,
        loss=loss,
        binary_loss="exponential",
        derivative=derivative,
        seed=seed,
        out=out,
        resume=resume,
        force=force,
        log=log,
    )
    goals = check_flow(
        setup, method, Goals(log_time, log_norm, loss_below), rtol, patience, max_evaluations
    )
    if schedule is not None:
        instance("schedule", schedule, Collection, "values of ln t")
    planned = None if schedule is None else sorted({real("schedule", t) for t in schedule})
    if out is not None and not resume:
        RunDirectory.check_free(out, force=force)

    network = setup.model
    converted = not setup.built and any(p.dtype != torch.float64 for p in network.parameters())
    placed = setup.place(torch.float64, torch.device("cpu"))
    homogeneity = measure_homogeneity(network, placed.x)
    for layer, norm in zip(homogeneity.layers, homogeneity.norms(network).tolist(), strict=True):
        if norm == 0:
            raise ModelError(
                f"the layer {layer.name!r} is 0, where every gradient of the other layers "
                "vanishes; initialise it"
            )
    size = sum(p.numel() for p in network.parameters() if p.requires_grad)
    if method == "stiff" and size > 4 * DENSE_LIMIT:
        raise InputError(
            f"method 'stiff' forms a Jacobian of {size}² numbers; expected at most "
            f"{4 * DENSE_LIMIT} weights; use 'auto'"
        )
    if keep_weights is None:
        keep_weights = size * _POINTS <= _KEPT_NUMBERS
    monitor = Monitor(
        network,
        placed,
        setup.attack,
        loss=setup.loss,
        homogeneity=homogeneity,
        schedule="every",
        strong=None,
    )
    own = {
        "derivative": derivative,
        "log_time": goals.log_time,
        "log_norm": goals.log_norm,
        "loss_below": goals.loss_below,
        "method": method,
        "rtol": rtol,
        "schedule": planned,
        "patience": patience,
        "max_evaluations": max_evaluations,
        "lr": None,
        "batch_size": placed.n,
        "epochs": None,
        "momentum": 0.0,
        "keep_weights": keep_weights,
    }
    config = setup.config(
        "flow", own, dtype=torch.float64, device=torch.device("cpu"), homogeneity=homogeneity
    )
    config |= {"ended": None, "notes": [], "advice": ""}
    field = Field(
        network,
        placed.x,
        placed.y,
        loss=setup.loss,
        attack=setup.attack,
        derivative=derivative,
        seed=setup.seed,
    )
    start = copy.deepcopy(network.state_dict())
    follower = Follower(
        field,
        network,
        homogeneity,
        method=method,
        rtol=rtol,
        patience=patience,
        max_evaluations=max_evaluations,
    )
    load_weights(network, start)
    if converted:
        text = "the float32 weights were converted to float64"
        _log.info(text)
        follower.notes.insert(0, text)
    job = Job(follower, monitor, goals, planned, config, keep_weights, setup.log)
    bar = FlowProgress(goals.log_time) if progress else None
    path = None
    try:
        with job:
            if out is not None:
                directory = job.open(out, resume=resume, force=force)
                path = directory.path
            advice = "use fewer examples (every step of a flow takes them all), or method='steps'"
            with (
                deferred_interrupt() as interrupted,
                memory_watched("following the flow", None, advice=advice),
            ):
                job.run(bar, interrupted)
            if out is not None:
                config = directory.read_config()
    except DivergedError as error:
        kept = f"; the last good point is in {out}" if out is not None else ""
        raise DivergedError(f"{error}{kept}", error.step, error.epoch) from None
    finally:
        if bar is not None:
            bar.stop()
    return job.result(Run(config, monitor.records, path, network, job.kept))


def check_flow(
    setup: Setup,
    method: str,
    goals: Goals,
    rtol: float | None,
    patience: float,
    max_evaluations: int,
) -> Goals:
    """The goals, once what :func:`gradient_flow` was given is seen to be in range.

    Raises:
        InputError: as :func:`gradient_flow`.
    """
    if setup.attack is not None and not setup.attack.scale_invariant:
        raise InputError(
            "the flow needs a scale invariant perturbation (Definition 1): expected "
            "objective='margin', got objective='loss', whose gradient fades as the margins grow"
        )
    choice("method", method, ("auto", "stiff", "runge-kutta", "steps"))
    if rtol is not None and real("rtol", rtol, above=0.0) > 0.01:
        raise InputError(f"rtol: expected at most 0.01, got {rtol:g}")
    real("patience", patience)
    whole("max_evaluations", max_evaluations, least=1)
    return goals
