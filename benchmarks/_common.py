"""What the benchmarks on MNIST's digits 3 and 8 share: arguments, the network, the lines above a table."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import marginflow as mf

SHORT_EPOCHS = 2


def parser(description: str | None, *, epochs: int) -> argparse.ArgumentParser:
    """The arguments that say which network, by default one trained for ``epochs`` epochs."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--run", type=Path, help="a run on two classes instead of a training")
    found.add_argument("--data", default="mnist:3,8", help="of the training; mnist: ten digits")
    found.add_argument("--data-dir", type=Path, help="instead of $MARGINFLOW_DATA")
    found.add_argument("--epochs", type=int, default=epochs, help="of the training")
    found.add_argument("--seed", type=int, default=0, help="of the training")
    found.add_argument("--threads", type=int, default=2, help="of PyTorch")
    found.add_argument("--short", action="store_true", help="a few examples and epochs only")
    return found


def network(asked: argparse.Namespace, attack: str) -> tuple[mf.Run, mf.Dataset, float]:
    """The run asked for, or the paper's network trained with ``attack``; its data; the seconds it took."""
    torch.set_num_threads(asked.threads)
    began = time.perf_counter()
    if asked.run is not None:
        run = mf.load_run(asked.run)
        data = mf.load(run.config["data"], data_dir=asked.data_dir)
    else:
        data = mf.load(asked.data, data_dir=asked.data_dir)
        run = mf.train(
            "mlp:1024,64",
            data,
            attack=attack,
            lr=0.1,
            batch_size=80,
            epochs=SHORT_EPOCHS if asked.short else asked.epochs,
            measure=False,
            seed=asked.seed,
        )
    return run, data, time.perf_counter() - began


def training(run: mf.Run) -> str:
    """How the network was trained, on one line."""
    c = run.config
    return (
        f"{c['model_spec']}, {c['attack']}, {c['loss']}, lr {c['lr']:g}, "
        f"batch {c['batch_size']}, {c['epochs']} epochs, seed {c['seed']}"
    )


def versions(packages: Sequence[str], threads: int) -> str:
    """Versions and threads on one line."""
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{found}, Python {platform.python_version()}, {threads} threads"
