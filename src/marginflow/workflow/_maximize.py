"""``mf.maximize``: the adversarial margin made larger on purpose, measured and recorded."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from marginflow._checks import instance, whole
from marginflow.ascent import Ascent, Method, Tempered, build_method
from marginflow.attacks import Attack
from marginflow.datasets import Dataset
from marginflow.distributed import alone
from marginflow.engine import EngineName, Products, build
from marginflow.errors import InputError
from marginflow.homogeneity import Homogeneity, measure_homogeneity
from marginflow.losses import Loss
from marginflow.margins import adversarial_margins
from marginflow.monitor import Monitor
from marginflow.runs import Log, Run, RunDirectory
from marginflow.training import Callback, log_spaced
from marginflow.workflow._begin import begin_with
from marginflow.workflow._callbacks import MeasuringBest
from marginflow.workflow._linear import LINEAR, maximize_predictor
from marginflow.workflow._setup import Setup, as_callbacks, as_schedule, prepare
from marginflow.workflow._train import as_device, as_dtype, train
from marginflow.workflow._train_job import TrainingJob

_BATCHES = 20
_BATCH = 80
_LAST = 0.1

_log = logging.getLogger("marginflow")


def maximize(
    model: nn.Module | str,
    data: Dataset | tuple[Tensor, Tensor] | str,
    attack: Attack | str | None = None,
    *,
    method: str | Method = "spheres",
    epochs: int = 100,
    batch_size: int | None = None,
    seed: int = 0,
    loss: str | Loss | None = None,
    strict: bool = False,
    start: Run | str | os.PathLike[str] | None = None,
    measure_with: Attack | str | None = None,
    schedule: Collection[int] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    engine: EngineName = "auto",
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    log: Log = (),
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Seek the largest normalised adversarial margin γ̂_m itself, from the weights that ``model`` has.

    Constant-rate training gains margin as ln t only. The methods here take steps whose length does
    not depend on the loss, on a smooth minimum of the margins whose temperature rises:

    | method | what it is |
    |---|---|
    | ``spheres`` | annealed ascent on the product of unit spheres: the default, for any network |
    | ``polish`` | the same from a network that is trained already: smaller steps |
    | ``relative`` | ``η‖W‖ ∇ln L/‖∇ln L‖``, with the right weight for each batch |
    | ``loss-based`` | η = a/L with roll-back (Lyu & Li 2020): :func:`marginflow.train` at that rate |
    | ``steepest`` | reference: signs, spectral, Adam, each seeking the margin in a norm of its own |
    | ``dual``, ``normalized`` | one linear layer: proven, until a duality gap is reached |

    Options go behind the name: ``spheres:angle=0.01..1e-4,tau=0.5..150``. See docs/maximize.md.

    The best network measured is left in ``model``. With ``out`` the run is recorded there and can be
    resumed to the very bits, as :func:`marginflow.train` does it.

    Args:
        model: a multi-homogeneous network, trained or not, or a specification such as ``"mlp:1024,64"``.
        data: a data set, a pair (x, y), or a specification.
        attack: the perturbation whose margins are maximised; None for the clean ones.
        method: a name with options, or a :class:`marginflow.ascent.Method`.
        epochs: passes over the data, to whose end the schedules run; the steps of ``dual`` and
            ``normalized``, which end earlier once the gap is reached.
        batch_size: examples per step; by default 80, or fewer where an epoch would have less
            than 20 steps. ``relative`` and ``steepest`` as well; ``loss-based`` takes all.
        seed: of a model given as a string, the batches, the hard examples and random starts.
        loss: ``exponential``, ``logistic`` or ``cross-entropy``; by default as for training.
        strict: refuse data that are not separated at the start, where the method needs it;
            otherwise it is said, and a warm-up comes first.
        start: a run, or its directory, whose last weights ``model`` takes before the first step;
            ``run.json`` records which. A run that is resumed needs it no more.
        measure_with: the perturbation that is measured, by default ``attack``.
        schedule: epochs at which to measure; by default as for training, and oftener at the end.
        dtype: ``float32`` or ``float64``; by default the model's own.
        device: ``cpu``, ``cuda`` ….
        engine: ``auto``, ``autograd`` or ``fused``, as for training.
        out: run directory; None keeps the run in memory.
        resume: continue the run in ``out``.
        force: replace a run that ``out`` already holds.
        progress: show a progress bar on standard error.
        log: where measurements go beside ``metrics.jsonl``: ``"tensorboard"``, ``"mlflow"``, an object with
            ``write(records)`` and ``close()``, or several. No sink changes or stops the run.
        callbacks: told of every step and epoch, before measuring and recording.

    Returns:
        the run; ``run.final["normalized_margin"]`` is γ̂_m of the weights left in ``model``.

    Raises:
        InputError: any argument that cannot be used (nothing is written then).
        MissingDependencyError: a library of ``log`` is not installed (nothing is written then).
        NotHomogeneousError: the network has no normalised margin.
        ModelError: a layer is 0, or the network is dead; ``start`` is of another network.
        RunError: ``out`` is taken, or does not fit when resuming; ``start`` has no checkpoint.
        DivergedError: NaN, infinity, or τ·margin beyond the range of the dtype.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.

    Examples:
        >>> import marginflow as mf
        >>> data = mf.load("separable:n=20,d=6,margin=0.3")
        >>> best = mf.maximize("deep-linear", data, "exact-linear:p=2,eps=0.1", method="dual")
        >>> round(best.metrics[-1]["normalized_margin"], 2)  # at most the maximum margin less ε
        0.2
    """
    instance("method", method, str | Method, "a name such as 'spheres', or a Method")
    name = method.partition(":")[0].strip().lower() if isinstance(method, str) else method.name
    if isinstance(method, str) and name == "loss-based":
        if start is not None:
            raise InputError(
                "start: method 'loss-based' is an ordinary training, which begins with the weights of "
                "its model: give it those of the run"
            )
        return train(
            model, data, attack=attack, loss=loss, lr=method, batch_size=batch_size, epochs=epochs,
            measure_with=measure_with, schedule=schedule, seed=seed, dtype=dtype, device=device,
            engine=engine, out=out, resume=resume, force=force, progress=progress, log=log,
            callbacks=callbacks,
        )  # fmt: skip
    linear = isinstance(method, str) and name in LINEAR
    if linear:
        alone(f"method {name!r}", "it is solved in predictor space, and fast enough")
    chosen = None if linear else build_method(method)
    setup = prepare(
        model,
        data,
        attack=attack,
        measure_with=measure_with,
        loss=loss,
        binary_loss="logistic",
        derivative="detached",
        seed=seed,
        out=out,
        resume=resume,
        force=force,
        log=log,
    )
    callbacks, schedule = as_callbacks(callbacks), as_schedule(schedule)
    stored = RunDirectory(out).read_config() if resume and out is not None else {}
    origin = stored.get("from") if start is None else begin_with(setup.model, start)
    typed, placed_on = as_dtype(dtype, setup.model), as_device(device)
    if out is not None and not resume:
        RunDirectory.check_free(out, force=force)
    placed = setup.place(typed, placed_on)
    homogeneity = measure_homogeneity(setup.model, placed.x)
    monitor = Monitor(
        setup.model,
        placed,
        setup.measured,
        loss=setup.loss,
        homogeneity=homogeneity,
        schedule="every",
        strong=None,
    )
    if chosen is None:
        return maximize_predictor(
            str(method), setup, placed, monitor, steps=epochs, origin=origin, out=out,
            resume=resume, force=force,
        )  # fmt: skip
    whole("epochs", epochs, least=1)
    if not resume:
        chosen.check_layers(setup.model, homogeneity)
    warm = (
        not resume
        and chosen.separated
        and not _separated(setup, placed, homogeneity, chosen, strict=strict)
    )
    warm = bool(stored.get("warm_up", warm))
    if batch_size is None:
        batch_size = min(_BATCH, -(-placed.n // _BATCHES))
    products: Products | None = stored.get("products")
    worker = build(
        setup.model,
        Tempered(setup.loss),
        setup.attack,
        shape=placed.shape,
        batch_size=min(whole("batch_size", batch_size, least=1), placed.n),
        engine=stored.get("engine", engine) if engine == "auto" else engine,
        products=products,
    )
    ascent = Ascent(
        worker,
        placed,
        method=chosen.warmed() if warm else chosen,
        homogeneity=homogeneity,
        batch_size=batch_size,
        epochs=epochs,
        seed=setup.seed,
    )
    if not resume:
        ascent.method.check_margins(ascent)
    own = {
        "method": chosen.spec,
        "from": origin,
        "warm_up": warm,
        "batch_size": ascent.batch_size,
        "epochs": ascent.epochs,
        **worker.settings,
        "measure": True,
        "schedule": schedule,
        "keep_weights": False,
    }
    config = setup.config("maximize", own, dtype=typed, device=placed_on, homogeneity=homogeneity)
    planned = _schedule(epochs) if schedule is None else schedule
    ascent.callbacks = (*callbacks, MeasuringBest(monitor, planned, epochs))
    job = TrainingJob(ascent, monitor, config, keep_weights=False, free=(), log=setup.log)
    return job.run(out, resume=resume, force=force, progress=progress)


def _schedule(epochs: int) -> frozenset[int]:
    """As for training, and every epoch of the last tenth, among which the best is chosen."""
    return log_spaced(epochs) | set(range(round(epochs * (1 - _LAST)), epochs + 1))


def _separated(
    setup: Setup, data: Dataset, homogeneity: Homogeneity, method: Method, *, strict: bool
) -> bool:
    """Whether every adversarial margin is positive; says so where it is not."""
    found = adversarial_margins(
        setup.model, data.x, data.y, setup.attack, homogeneity=homogeneity, seed=setup.seed
    )
    wrong = int((found.values <= 0).sum())
    if wrong == 0:
        return True
    state = (
        f"{method.name}: {wrong} of {data.n} adversarial margins are not positive at the start "
        f"(γ̂_m = {found.normalized_min:.3g})"
    )
    if strict:
        raise InputError(f"{state}; train first, use method='spheres', or leave strict=True out")
    _log.warning("%s; a warm-up comes first: longer steps at a low temperature", state)
    return False
