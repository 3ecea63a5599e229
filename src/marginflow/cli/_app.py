"""The commands and their options; everything heavy is imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from marginflow.cli._completion import complete_values
from marginflow.cli._export import export
from marginflow.cli._maximize_command import maximize
from marginflow.cli._options import (
    ATTACK,
    DATA,
    DATA_DIR,
    DEVICE,
    FLOW_DATA,
    LOG,
    MODEL,
    OWN_DATA,
    OWN_MODEL,
    THREADS,
)
from marginflow.cli._rerun import rerun
from marginflow.cli._sweep_command import sweep

app = typer.Typer(
    name="marginflow",
    help=(
        "Train homogeneous networks against adversarial perturbations and measure where "
        "training is going: normalised adversarial margins, growth, accuracies."
    ),
    epilog="Start here: marginflow demo --out runs/demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from marginflow import __version__

        print(f"marginflow {__version__}")
        raise typer.Exit


@app.callback()
def _marginflow(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Example: marginflow train --data digits:3,8 --model mlp:256,32 "
    "--attack fgsm:eps=0.1 --lr 0.1 --batch-size 32 --epochs 200 --out runs/fgsm"
)
def train(
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    attack: Annotated[str | None, typer.Option(help=ATTACK)] = None,
    measure_with: Annotated[
        str | None, typer.Option(help="Attack that is measured; by default the one trained with.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="exponential, logistic or cross-entropy.")
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(help="Learning rate: a number (default 0.1), lemma2, loss-based:a=0.1."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per step (default: all of them).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data (default 100).")] = None,
    momentum: Annotated[float | None, typer.Option(help="Heavy-ball momentum (default 0).")] = None,
    derivative: Annotated[
        str | None, typer.Option(help="detached (Algorithm 1) or total (through the attack).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of weights and batches (default 0).")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Several seeds at once, side by side: 8 (for 0 … 7) or 0,3,5. Runs: OUT/seed-0 …."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default) or float64.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="auto (default), autograd, or fused: dense networks by explicit products."
        ),
    ] = None,
    perturbation_precision: Annotated[
        str | None,
        typer.Option(help="float32 (default) or bf16: precision of the network the attack sees."),
    ] = None,
    shrink: Annotated[
        bool,
        typer.Option(
            "--shrink",
            help="Leave examples out of the epochs while they move weights by less than a rounding.",
        ),
    ] = False,
    shards: Annotated[
        int | None,
        typer.Option(
            help="Parts of a batch, a power of two: the same bits on any number of processes."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help=THREADS)] = None,
    data_dir: Annotated[Path | None, typer.Option(help=DATA_DIR)] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with any of these options; the command line goes before it."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory (default: a new one under runs/).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in --out.")] = False,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Train only; the network need not be homogeneous.")
    ] = False,
    keep_weights: Annotated[
        bool,
        typer.Option("--keep-weights", help="Keep the weights of every measurement, for verify."),
    ] = False,
    log: Annotated[list[str] | None, typer.Option(help=LOG, metavar="<str>")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a network (Algorithm 1), measuring and recording on the way."""
    from marginflow.cli._train import run_training

    given = {
        "data": data,
        "model": model,
        "attack": attack,
        "measure_with": measure_with,
        "loss": loss,
        "lr": lr,
        "batch_size": batch_size,
        "epochs": epochs,
        "momentum": momentum,
        "derivative": derivative,
        "seed": seed,
        "seeds": seeds,
        "dtype": dtype,
        "device": device,
        "engine": engine,
        "perturbation_precision": perturbation_precision,
        "shrink": shrink or None,
        "shards": shards,
        "threads": threads,
        "data_dir": data_dir,
        "out": out,
        "log": log or None,
    }
    run_training(
        {name: value for name, value in given.items() if value is not None},
        config=config,
        resume=resume,
        force=force,
        measure=not no_measure,
        keep_weights=keep_weights or None,
        progress=not quiet,
    )


@app.command(
    epilog="Example: marginflow flow --data separable:n=20,d=10,margin=0.22 --model deep-linear:16 "
    "--attack exact-linear:p=2,eps=0.05 --log-time 1e6 --out runs/flow"
)
def flow(
    data: Annotated[str | None, typer.Option(help=FLOW_DATA)] = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    attack: Annotated[
        str | None,
        typer.Option(help="Perturbation: none, fgm:eps=0.05, exact-linear:p=2,eps=0.05 …."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="exponential (default for two classes), logistic or cross-entropy."),
    ] = None,
    derivative: Annotated[
        str | None, typer.Option(help="total (default: through the attack) or detached.")
    ] = None,
    log_time: Annotated[
        float | None, typer.Option(help="Stop at this ln t (default 1000 if no goal is given).")
    ] = None,
    log_norm: Annotated[float | None, typer.Option(help="Stop at this ln ‖W‖.")] = None,
    loss_below: Annotated[float | None, typer.Option(help="Stop below this loss.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="auto (default: by the field's jumps), stiff, runge-kutta or steps."),
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(help="Tolerance of a step relative to ‖W‖ (default by method).")
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(help="Give up at this ln t if the data are not separated (default 30)."),
    ] = None,
    max_evaluations: Annotated[
        int | None, typer.Option(help="End after so many evaluations (default 2,000,000).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the weights (default 0).")] = None,
    threads: Annotated[int | None, typer.Option(help=THREADS)] = None,
    data_dir: Annotated[Path | None, typer.Option(help=DATA_DIR)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory (default: a new one under runs/).")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the flow in --out, perhaps to a farther goal."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in --out.")] = False,
    keep_weights: Annotated[
        bool | None,
        typer.Option(
            "--keep-weights/--drop-weights",
            help="Keep the weights of every measurement (default: up to 120,000 of them).",
        ),
    ] = None,
    log: Annotated[list[str] | None, typer.Option(help=LOG, metavar="<str>")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Follow the gradient flow in float64, to times that no training reaches.

    Exit code 1 if it ends before its goal, with advice.
    """
    from marginflow.cli._flow import run_flow

    given = {
        "data": data,
        "model": model,
        "attack": attack,
        "loss": loss,
        "derivative": derivative,
        "log_time": log_time,
        "log_norm": log_norm,
        "loss_below": loss_below,
        "method": method,
        "rtol": rtol,
        "patience": patience,
        "max_evaluations": max_evaluations,
        "seed": seed,
        "threads": threads,
        "data_dir": data_dir,
        "out": out,
        "log": log or None,
        "keep_weights": keep_weights,
    }
    given = {name: value for name, value in given.items() if value is not None}
    raise typer.Exit(run_flow(given, resume=resume, force=force, progress=not quiet))


app.command(
    epilog="Example: marginflow maximize --data digits:3,8 --model mlp:256,32 "
    "--attack fgsm:eps=0.1 --out runs/spheres"
)(maximize)


app.command(epilog="Example: marginflow sweep sweep.toml --out runs/eps-and-width --jobs 2")(sweep)


@app.command(
    epilog="Example: marginflow measure runs/fgsm --attack pgd-linf:eps=0.1,steps=20 "
    "--attack fgm:eps=0.5"
)
def measure(
    run: Annotated[
        Path, typer.Argument(help="A run directory, or weights: a .safetensors file, a state dict.")
    ],
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Attack to measure with (repeatable); by default the run's own."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Of weights or a model of your own: mlp:256,32, or package.module:function "
            "(imported and called)."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Other data than the run's own.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help=DATA_DIR)] = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    batch_size: Annotated[int, typer.Option(help="Examples per pass.")] = 1024,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or float64; by default the run's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random starts.")] = 0,
    threads: Annotated[int | None, typer.Option(help=THREADS)] = None,
    certified: Annotated[
        str | None,
        typer.Option(help="Also bound the margins from below: auto, crown, interval, norms."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a trained network's margins and accuracies under any attacks."""
    from marginflow.cli._read import run_measurement

    run_measurement(
        run,
        attacks=attack or [],
        model_spec=model,
        data_spec=data,
        data_dir=data_dir,
        split=split,
        batch_size=batch_size,
        dtype=dtype,
        seed=seed,
        threads=threads,
        as_json=json,
        certified=certified,
    )


@app.command(epilog="Example: marginflow report runs/fgsm runs/standard --out report.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="One or more run directories.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file (default: RUN/report.html).")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="Also write each figure, into figures/: pdf, svg or png."),
    ] = None,
) -> None:
    """Turn runs into one self-contained HTML page."""
    from marginflow.cli._read import run_report

    run_report(runs, out=out, title=title, form=form)


@app.command(epilog="Example: marginflow compare runs/fgsm runs/standard --out margins.pdf")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run directories.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Also draw them: .svg, .png, .pdf or .html; a folder with --format."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="Write each figure as a file into --out: pdf, svg or png."),
    ] = None,
) -> None:
    """Lay several runs beside each other: a table, and a figure if asked for."""
    from marginflow.cli._read import run_comparison

    run_comparison(runs, out=out, form=form)


app.command(epilog="Example: marginflow export runs/fgsm runs/standard --csv margins.csv")(export)


app.command(epilog="Example: marginflow rerun runs/fgsm")(rerun)


@app.command(epilog="Example: marginflow verify runs/linear")
def verify(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    attack: Annotated[
        str | None,
        typer.Option(help="The run's own attack, if it is a finite set: finite-set:FILE.npy."),
    ] = None,
    model: Annotated[str | None, typer.Option(help=OWN_MODEL)] = None,
    data: Annotated[str | None, typer.Option(help=OWN_DATA)] = None,
    data_dir: Annotated[Path | None, typer.Option(help=DATA_DIR)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge the paper's statements on a run: holds, fails, does not apply, not reached.

    Prints first which hypotheses the run meets, each measured. Writes
    verdicts.json and audit.json into the run. Exit code 1 if a statement fails.
    """
    from marginflow.cli._verify import run_verification

    raise typer.Exit(
        run_verification(
            run, attack=attack, model=model, data=data, data_dir=data_dir, as_json=json
        )
    )


@app.command(epilog="Example: marginflow certify runs/fgsm --attack fgsm:eps=0.1 --tau 2")
def certify(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    attack: Annotated[
        str | None,
        typer.Option(help="Perturbation, or none; by default the one trained against."),
    ] = None,
    tau: Annotated[
        float,
        typer.Option(help="Multipliers where m_i ≤ (1 + τ) m_min; inf for all examples."),
    ] = 2.0,
    derivative: Annotated[
        str, typer.Option(help="total (through the attack, Theorem 5) or detached.")
    ] = "total",
    loss: Annotated[
        str | None,
        typer.Option(
            help="exponential or logistic, in the paper's multipliers; by default the run's own."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    model: Annotated[str | None, typer.Option(help=OWN_MODEL)] = None,
    data: Annotated[str | None, typer.Option(help=OWN_DATA)] = None,
    data_dir: Annotated[Path | None, typer.Option(help=DATA_DIR)] = None,
    fitted_only: Annotated[
        bool,
        typer.Option("--fitted-only", help="Leave out the examples without a positive margin."),
    ] = False,
    nearest: Annotated[
        bool,
        typer.Option(
            "--nearest",
            help="Also solve for the KKT point beside the network (at most 2000 weights; minutes).",
        ),
    ] = False,
    max_support: Annotated[
        int | None, typer.Option(help="Most examples with multipliers (default: up to 4000).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per pass.")] = 1024,
    memory: Annotated[int, typer.Option(help="MiB for the data of single examples.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of a random start.")] = 0,
    threads: Annotated[int | None, typer.Option(help=THREADS)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how far a trained network is from a KKT point of the max-margin problem.

    All adversarial margins must be positive, or --fitted-only given. Writes
    certificate.json into the run, which marginflow report shows.
    """
    from marginflow.cli._certify import run_certification

    run_certification(
        run,
        {
            "attack": attack,
            "tau": tau,
            "derivative": derivative,
            "loss": loss,
            "split": split,
            "model": model,
            "data": data,
            "data_dir": data_dir,
            "fitted_only": fitted_only,
            "nearest": nearest,
            "max_support": max_support,
            "batch_size": batch_size,
            "seed": seed,
        },
        memory=memory,
        threads=threads,
        as_json=json,
    )


@app.command(
    epilog="Example: marginflow reproduce fig1 fig2 --scale mnist --data-dir DIR --out runs/mnist"
)
def reproduce(
    figures: Annotated[
        list[str],
        typer.Argument(
            help="fig1 … fig7 (the paper's), tradeoff, cross, overfitting, scale-trap (ours), "
            "paper, ours, or all."
        ),
    ],
    scale: Annotated[
        str,
        typer.Option(
            help="demo (bundled digits, minutes), mnist (the paper's networks, fewer epochs), "
            "paper (its epochs)."
        ),
    ] = "demo",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for runs and figures (default: runs/figures/SCALE)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="First seed of weights and batches.")] = 0,
    seeds: Annotated[int, typer.Option(help="How many seeds; bands show their range.")] = 1,
    form: Annotated[
        str, typer.Option("--format", help="Format of the figures: svg, png or pdf.")
    ] = "png",
    data_dir: Annotated[Path | None, typer.Option(help=DATA_DIR)] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Trainings at a time (default: one for each CPU core).")
    ] = None,
    threads: Annotated[
        int, typer.Option(help="CPU threads of each training; they change the last bits.")
    ] = 1,
    force: Annotated[bool, typer.Option("--force", help="Train again what is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for each training.")] = False,
) -> None:
    """Reproduce figures of the paper, each with what the paper claims of it checked.

    Every training is a run directory: called again, finished ones are read and
    interrupted ones go on. Writes each figure, its numbers (FIGURE.json) and one
    page of all figures of this scale in the folder, index.html.
    """
    from marginflow.cli._reproduce import run_reproduction

    run_reproduction(
        figures,
        scale=scale,
        out=out,
        seed=seed,
        seeds=seeds,
        form=form,
        data_dir=data_dir,
        jobs=jobs,
        threads=threads,
        force=force,
        progress=not quiet,
    )


@app.command(epilog="Example: marginflow demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the two runs and the report.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Train against FGSM and without it on handwritten digits; draw both margins (Figure 1)."""
    from marginflow.cli._demo import run_demo

    run_demo(out, seed=seed, force=force, progress=not quiet)


complete_values(app)
