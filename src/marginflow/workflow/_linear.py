"""Margin maximisation of one linear layer, with a duality gap, as a recorded run."""

from __future__ import annotations

import os
from typing import Any

import torch

from marginflow._checks import real
from marginflow._specs import number, parse
from marginflow.ascent import exact_budget, maximize_linear
from marginflow.datasets import Dataset
from marginflow.errors import DataError, InputError, ModelError, SpecificationError
from marginflow.models import linear_layers
from marginflow.monitor import Monitor
from marginflow.runs import Run, RunDirectory, open_sinks, provenance, weights_digest
from marginflow.workflow._setup import Setup

LINEAR = ("dual", "normalized")
"""Methods for a linear predictor of one layer."""


def maximize_predictor(
    method: str,
    setup: Setup,
    data: Dataset,
    monitor: Monitor,
    *,
    steps: int,
    origin: dict[str, Any] | None,
    out: str | os.PathLike[str] | None,
    resume: bool,
    force: bool,
) -> Run:
    """Leave the direction of largest margin in the model, with the norm that its layer had.

    Args:
        method: ``dual`` or ``normalized``, with the option ``gap=…`` (default 1e-6, relative).
        setup: with a network of one linear layer and one output.
        data: the data set, placed.
        monitor: measures before and after.
        steps: at most so many.
        origin: the run whose weights the layer has, as :func:`begin_with` gave it; its norm is kept.
        out: run directory, or None.
        resume: not offered here.
        force: replace what is there.

    Raises:
        ModelError: another network.
        DataError: labels other than −1 and +1, data that no predictor separates under the attack.
        InputError: an attack that is not exact here.
    """
    spec = parse(method, "method")
    if spec.args:
        raise SpecificationError(f"method {method!r}: {spec.args[0]!r} has no name")
    gap = real("gap", spec.parsed({"gap": number}).get("gap", 1e-6), least=0.0)
    if resume:
        raise InputError(
            f"method {spec.name!r}: cannot be resumed; it takes seconds: begin anew, with force"
        )
    _check_predictor(setup, data)
    eps, p = exact_budget(setup.attack)
    x = data.x.reshape(data.n, -1)
    found = maximize_linear(x, data.y, eps=eps, p=p, method=spec.name, steps=steps, gap=gap)
    if found.margin <= 0:
        raise DataError(f"method {spec.name!r}: {found.advice}")
    layer = next(iter(setup.model.parameters()))
    config = setup.config(
        "maximize",
        {
            "method": f"{spec.name}:gap={gap!r}",
            "from": origin,
            "epochs": steps,
            "batch_size": data.n,
        },
        dtype=layer.dtype,
        device=layer.device,
        homogeneity=monitor.homogeneity,
    )
    directory = None
    if out is not None:
        origin_of = {**provenance(), "begun_with": weights_digest(setup.model.state_dict())}
        directory = RunDirectory.create(out, {**config, **origin_of}, force=force)
    try:
        # No epochs: what counts here are steps, of all the data.
        monitor.measure(0)
        with torch.no_grad():
            layer.copy_(found.direction.to(layer).reshape(layer.shape) * layer.norm())
        monitor.measure(
            found.steps,
            duality_bound=found.bound,
            duality_gap=found.relative_gap,
            gap_rate=found.rate,
            converged=found.converged,
        )
        if directory is not None:
            directory.append_metrics(*monitor.records)
            weights = {f"model.{n}": v.detach() for n, v in setup.model.state_dict().items()}
            directory.save_checkpoint(weights, {"step": found.steps, "epoch": found.steps})
            config = directory.read_config()
        path = None if directory is None else directory.path
        sinks = open_sinks(setup.log, path, config)
        sinks.write(monitor.records)
        sinks.close()
        return Run(config, monitor.records, path, setup.model)
    finally:
        if directory is not None:
            directory.close()


def _check_predictor(setup: Setup, data: Dataset) -> None:
    if not data.binary:
        raise DataError("expected labels −1 and +1: choose two classes")
    try:
        layers = linear_layers(setup.model)
    except ModelError as error:
        raise ModelError(f"{error}; method='spheres' takes any homogeneous network") from None
    if len(layers) != 1 or layers[0].shape[0] != 1:
        raise ModelError(
            f"expected one linear layer with one output, got {len(layers)} layers; use "
            "--model deep-linear (no widths), or method='spheres'"
        )
