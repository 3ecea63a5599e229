"""``mf.train``: one adversarial training, measured and recorded."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from marginflow._checks import choice, whole
from marginflow.attacks import Attack, Derivative
from marginflow.datasets import Dataset
from marginflow.distributed import current
from marginflow.engine import Engine, EngineName, PerturbationPrecision, Products
from marginflow.engine import build as build_engine
from marginflow.errors import InputError, ModelError
from marginflow.homogeneity import measure_homogeneity
from marginflow.losses import Loss
from marginflow.models import linear_layers
from marginflow.monitor import Monitor
from marginflow.runs import Log, Run, RunDirectory
from marginflow.training import (
    BalanceDrift,
    Callback,
    Descent,
    Gauge,
    NormGrowth,
    Rate,
    Shrinking,
    Trainer,
    log_spaced,
)
from marginflow.workflow._callbacks import Measuring
from marginflow.workflow._setup import Setup, as_callbacks, as_schedule, prepare
from marginflow.workflow._train_job import TrainingJob

_KEPT_WEIGHTS = 20_000
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def train(
    model: nn.Module | str,
    data: Dataset | tuple[Tensor, Tensor] | str,
    *,
    attack: Attack | str | None = None,
    loss: str | Loss | None = None,
    lr: float | str | Rate = 0.1,
    batch_size: int | None = None,
    epochs: int = 100,
    momentum: float = 0.0,
    derivative: Derivative = "detached",
    measure: bool = True,
    measure_with: Attack | str | None = None,
    schedule: Collection[int] | None = None,
    keep_weights: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    engine: EngineName = "auto",
    perturbation_precision: PerturbationPrecision | None = None,
    shrink: bool = False,
    shards: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    log: Log = (),
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train ``model`` on adversarially perturbed data (Algorithm 1) and measure it on the way.

    The trained weights are left in ``model``. With ``out`` the run is recorded there and
    can be resumed after any interruption, to the very bits of an uninterrupted run (same
    machine, same number of threads).

    Args:
        model: a network, or a specification such as ``"mlp:1024,64"``.
        data: a data set, a pair (x, y), or a specification such as ``"digits:3,8"``.
        attack: the perturbation trained against; None is standard training.
        loss: ``exponential``, ``logistic`` or ``cross-entropy``; by default logistic for two
            classes −1/+1, cross-entropy otherwise.
        lr: learning rate: a constant η > 0, ``"lemma2"`` or ``"loss-based:a=0.1"``.
        batch_size: examples per step; None is full-batch gradient descent.
        epochs: number of passes over the data.
        momentum: heavy-ball momentum in [0, 1).
        derivative: ``detached`` (Algorithm 1) or ``total`` (through δ(W), Section 3.2).
        measure: whether to measure at all; needs a multi-homogeneous network.
        measure_with: the perturbation that is measured, by default ``attack``. Standard
            training is compared with adversarial training under the same perturbation.
        schedule: epochs at which to measure; by default :func:`marginflow.training.log_spaced`.
        keep_weights: keep the weights of every measurement, so that statements about the path
            can be checked later; by default for deep linear networks of at most 20 000 weights.
        seed: seed of the batch order, of random starts, and of a model given as a string.
        dtype: ``float32`` or ``float64``; by default the model's own.
        device: ``cpu``, ``cuda`` ….
        engine: ``fused`` (explicit products, dense networks only), ``autograd`` (any model), or
            ``auto``: fused where it applies. They differ by rounding; a run that is resumed goes
            on with its own.
        perturbation_precision: ``float32`` (the default: the model's own) or ``bf16``: the
            attack sees the network in bfloat16. Measurements never do. Its effect on the margins
            at the end is in ``run.config["perturbation_effect"]``.
        shrink: leave examples out of the epochs while their weights |ℓ′(z_i)| are so small that what
            they would move is below one rounding: see :class:`marginflow.training.Shrinking`.
            Measurements take all examples.
        shards: cut every batch into so many parts, a power of two, whose gradients are added in a fixed
            order: the bits then do not depend on how many processes share them, and all of a step is
            divided; see :mod:`marginflow.distributed`. None: one part; of several processes, the
            division that keeps to the trajectory of one process.
        out: run directory; None keeps the run in memory.
        resume: continue the run in ``out`` (which may lie finished; then nothing is done).
        force: replace a run that ``out`` already holds.
        progress: show a progress bar on standard error.
        log: where measurements go beside ``metrics.jsonl``: ``"tensorboard"``, ``"mlflow"``, an object with
            ``write(records)`` and ``close()``, or several. No sink changes or stops the training.
        callbacks: told of every step and epoch, before measuring and recording.

    Returns:
        the run: configuration, measurements, path.

    Raises:
        InputError: any argument that cannot be used (nothing is written then).
        MissingDependencyError: a library of ``log`` is not installed (nothing is written then).
        NotHomogeneousError: ``measure`` is True and the network is not homogeneous.
        RunError: ``out`` is taken, or does not fit when resuming.
        StorageError: the disk refuses.
        DivergedError: NaN or infinity; the last good checkpoint is kept.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.

    Examples:
        >>> import marginflow as mf
        >>> data = mf.load("separable:n=20,d=6,margin=0.3")
        >>> attack = "exact-linear:p=2,eps=0.1"
        >>> run = mf.train("deep-linear:4", data, attack=attack, lr=0.5, epochs=50)
        >>> run.metrics[-1]["epoch"], run.metrics[-1]["adversarial_accuracy"]
        (50, 1.0)
    """
    job = plan_training(
        model,
        data,
        attack=attack,
        loss=loss,
        lr=lr,
        batch_size=batch_size,
        epochs=epochs,
        momentum=momentum,
        derivative=derivative,
        measure=measure,
        measure_with=measure_with,
        schedule=schedule,
        keep_weights=keep_weights,
        seed=seed,
        dtype=dtype,
        device=device,
        engine=engine,
        perturbation_precision=perturbation_precision,
        shrink=shrink,
        shards=shards,
        out=out,
        resume=resume,
        force=force,
        log=log,
        callbacks=callbacks,
    )
    return job.run(out, resume=resume, force=force, progress=progress)


def plan_training(
    model: nn.Module | str,
    data: Dataset | tuple[Tensor, Tensor] | str,
    *,
    attack: Attack | str | None,
    loss: str | Loss | None,
    lr: float | str | Rate,
    batch_size: int | None,
    epochs: int,
    momentum: float,
    derivative: Derivative,
    measure: bool,
    measure_with: Attack | str | None,
    schedule: Collection[int] | None,
    keep_weights: bool | None,
    seed: int,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    engine: EngineName,
    perturbation_precision: PerturbationPrecision | None,
    shrink: bool,
    shards: int | None,
    out: str | os.PathLike[str] | None,
    resume: bool,
    force: bool,
    log: Log,
    callbacks: Sequence[Callback],
) -> TrainingJob:
    """What :func:`train` does before anything is written; arguments and errors are its own."""
    setup = prepare(
        model,
        data,
        attack=attack,
        measure_with=measure_with,
        loss=loss,
        binary_loss="logistic",
        derivative=derivative,
        seed=seed,
        out=out,
        resume=resume,
        force=force,
        log=log,
    )
    callbacks, schedule = as_callbacks(callbacks), as_schedule(schedule)
    network = setup.model
    dtype, device = as_dtype(dtype, network), as_device(device)
    if out is not None and not resume:
        RunDirectory.check_free(out, force=force)

    placed = setup.place(dtype, device)
    homogeneity = measure_homogeneity(network, placed.x) if measure else None
    monitor = None
    if homogeneity is not None:
        monitor = Monitor(
            network,
            placed,
            setup.measured,
            loss=setup.loss,
            homogeneity=homogeneity,
            schedule="every",
            strong=None,
        )

    if keep_weights is None:
        keep_weights = measure and _is_small_linear(network)
    user = list(callbacks)
    worker = _engine(
        setup,
        placed,
        batch_size=batch_size,
        engine=engine,
        precision=perturbation_precision,
        shards=shards,
        stored=RunDirectory(out).read_config() if resume and out is not None else None,
    )
    trainer = Trainer(
        worker,
        placed,
        lr=lr,
        batch_size=batch_size,
        epochs=epochs,
        momentum=momentum,
        seed=setup.seed,
        shrinking=Shrinking() if shrink else None,
    )
    own = {
        "lr": trainer.rate.spec,
        "batch_size": trainer.batch_size,
        "epochs": trainer.epochs,
        "momentum": trainer.momentum,
        "derivative": derivative,
        **worker.settings,
        "shrink": shrink,
        "shards": shards,
        "measure": measure,
        "schedule": schedule,
        "keep_weights": keep_weights,
    }
    config = setup.config("train", own, dtype=dtype, device=device, homogeneity=homogeneity)
    if monitor is not None and homogeneity is not None:
        gauges: list[Gauge] = []
        if BalanceDrift.fits(trainer):
            gauges.append(BalanceDrift(network))
        if NormGrowth.fits(trainer, homogeneity):
            gauges.append(NormGrowth(network, homogeneity))
        if Descent.fits(trainer):
            gauges.append(Descent())
        planned = log_spaced(trainer.epochs) if schedule is None else schedule
        user += [*gauges, Measuring(monitor, planned, trainer.epochs, gauges)]
    trainer.callbacks = tuple(user)
    return TrainingJob(trainer, monitor, config, keep_weights=keep_weights, log=setup.log)


def _engine(
    setup: Setup,
    data: Dataset,
    *,
    batch_size: int | None,
    engine: EngineName,
    precision: PerturbationPrecision | None,
    shards: int | None,
    stored: Mapping[str, Any] | None,
) -> Engine:
    """The engine asked for; where nothing is asked, that of the ``stored`` run, to the last bit."""
    products: Products | None = None
    if stored is not None:
        if engine == "auto":
            engine = stored.get("engine", "autograd")
        products = stored.get("products")
        precision = precision or stored.get("perturbation_precision")
    return build_engine(
        setup.model,
        setup.loss,
        setup.attack,
        setup.derivative,
        shape=data.shape,
        batch_size=data.n
        if batch_size is None
        else min(whole("batch_size", batch_size, least=1), data.n),
        engine=engine,
        products=products,
        perturbation_precision=precision or "float32",
        shards=shards if shards is None else whole("shards", shards, least=1),
    )


def as_dtype(dtype: torch.dtype | str | None, model: nn.Module) -> torch.dtype:
    """The dtype asked for, or the model's own."""
    if isinstance(dtype, str):
        return _DTYPES[choice("dtype", dtype, _DTYPES)]
    if dtype is None:
        parameter = next(model.parameters(), None)
        dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
    if dtype not in _DTYPES.values():
        raise InputError(f"dtype: expected float32 or float64, got {dtype}")
    return dtype


def as_device(device: torch.device | str) -> torch.device:
    """The device, tried; ``cuda`` is each process's own where several work together."""
    try:
        chosen = torch.device(device)
        team = current()
        if team is not None and chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", team.local_rank % max(1, torch.cuda.device_count()))
        torch.empty(0, device=chosen)
        if chosen.type == "meta":  # it holds shapes and no numbers
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device: expected cpu, or cuda where there is one, got {device!r}: {reason}"
        ) from None
    return chosen


def _is_small_linear(model: nn.Module) -> bool:
    try:
        return sum(w.numel() for w in linear_layers(model)) <= _KEPT_WEIGHTS
    except ModelError:
        return False
