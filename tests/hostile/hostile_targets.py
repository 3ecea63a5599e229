"""Everything that is parsed, as a target: a valid file, how it is damaged, and who reads it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hostile_mutations import (
    Mutation,
    any_text,
    mutated_bytes,
    mutated_json,
    mutated_lines,
    mutated_tensors,
    mutated_text,
    mutated_toml,
    of_text,
)
from hostile_runs import check, commands, quiet, read_sections, read_sweep, signed

import marginflow as mf
from marginflow.errors import MarginflowError
from marginflow.training import build_rate

SECONDS = 10.0
"""That one example may take, on a machine that does other things too."""

SPECS: dict[str, tuple[tuple[str, ...], Callable[[str], object]]] = {
    "attack": (
        (
            "fgsm:eps=16/255",
            "pgd-linf:eps=16/255,steps=5,step=6/255,random=true,bounds=0..1",
            "exact-linear:p=2,eps=0.05",
            "fgm:eps=0.1",
            "none",
        ),
        mf.attacks.build,
    ),
    "data": (("separable:n=8,d=4,margin=0.5", "digits:3,8,n=20"), mf.load),
    "loss": (("exponential", "logistic", "cross-entropy"), mf.losses.get_loss),
    "model": (
        ("mlp:4,3,activation=squared-relu", "deep-linear:3", "diagonal-linear:depth=2", "cnn:2,3"),
        lambda text: mf.models.build(text, input_shape=(1, 8, 8), outputs=1, seed=0),
    ),
    "schedule": (("lemma2", "loss-based:a=0.1", "0.1"), build_rate),
}


@dataclass(frozen=True)
class Target:
    """A file of a run or beside it.

    Attributes:
        place: within the folder of ``make_all``.
        mutate: how it is damaged.
        readers: the names of the commands that read it.
    """

    place: str
    mutate: Mutation
    readers: tuple[str, ...]

    @property
    def quick(self) -> tuple[str, ...]:
        """Those that draw no page and judge no run, which takes a second."""
        return tuple(r for r in self.readers if r not in _SLOW) or ("sections",)


_QUICK = ("export", "export two", "measure", "certify", "train", "compare")
_SLOW = ("report", "sweep page", "verify")
JSON, LINES = of_text(mutated_json), of_text(mutated_lines)
TARGETS = {
    "run.json": Target("train/run.json", JSON, (*_QUICK, "report", "verify")),
    "run.json (flow)": Target("flow/run.json", JSON, ("export", "compare", "report", "verify")),
    "run.json (maximize)": Target("maximize/run.json", JSON, ("export", "measure", "report")),
    "run.json (monitor)": Target(
        "monitor/run.json", JSON, ("export", "measure", "report", "verify")
    ),
    "metrics.jsonl": Target(
        "train/metrics.jsonl", LINES, ("export", "compare", "train", "report", "verify")
    ),
    "checkpoint": Target(
        "train/checkpoints/step-00000040.safetensors",
        mutated_tensors,
        ("measure", "certify", "train", "verify"),
    ),
    "checkpoint's side": Target(
        "train/checkpoints/step-00000040.json", JSON, ("measure", "certify", "train", "verify")
    ),
    "trajectory": Target(
        "train/trajectory/step-00000003.safetensors", mutated_tensors, ("report", "verify")
    ),
    "certificate.json": Target("train/certificate.json", JSON, ("report",)),
    "certificate's support": Target("train/certificate/*", mutated_tensors, ("report",)),
    "bounds.json": Target("train/bounds.json", JSON, ("report",)),
    "verdicts.json": Target("train/verdicts.json", JSON, ("report",)),
    "audit.json": Target("train/audit.json", JSON, ("report",)),
    "mlflow.json": Target("train/mlflow.json", JSON, ("train",)),
    "sweep.json": Target("sweep/sweep.json", JSON, ("sweep", "sweep page")),
    "attempts.jsonl": Target("sweep/attempts.jsonl", LINES, ("sweep", "sweep page")),
    "plan (TOML)": Target("plan.toml", of_text(mutated_toml), ("plan",)),
    "configuration (TOML)": Target("train.toml", of_text(mutated_toml), ("configuration",)),
    "weights (.safetensors)": Target("weights.safetensors", mutated_tensors, ("weights",)),
    "weights (.pt)": Target("weights.pt", mutated_bytes, ("weights",)),
    "perturbations (.npy)": Target("deltas.npy", mutated_bytes, ("deltas",)),
    "data (.npz)": Target("data.npz", mutated_bytes, ("data",)),
    "data (.npz, deflated)": Target("packed.npz", mutated_bytes, ("data",)),
    "data (IDX)": Target("images.idx", mutated_bytes, ("idx",)),
    "data (IDX, gzip)": Target("images.idx.gz", mutated_bytes, ("idx",)),
}


def _data(path: Path) -> None:
    mf.load(f"npz:{path}")


def _idx(path: Path) -> None:
    from marginflow.datasets import _idx

    _idx.read(path, 3)


def _deltas(path: Path) -> None:
    mf.attacks.build(f"finite-set:{path}")


def _weights(path: Path) -> None:
    from marginflow.models import read_weights

    read_weights(path)


_FILES = {"data": _data, "idx": _idx, "deltas": _deltas, "weights": _weights}


def spec_example(kind: str, random: Random) -> None:
    """One damaged specification: built, or refused."""
    valid, build = SPECS[kind]
    text = (
        any_text(random) if random.randrange(4) == 0 else mutated_text(random, random.choice(valid))
    )
    with contextlib.suppress(MarginflowError):
        build(text)


def file_example(
    target: Target, valid: Path, scratch: Path, random: Random, *, quick: bool = False
) -> None:
    """One damaged file, and a command that reads it.

    Args:
        target: which.
        valid: the folder of ``make_all``.
        scratch: an empty folder.
        random: where the damage comes from.
        quick: only by readers that take milliseconds.
    """
    folder, _, _ = target.place.partition("/")
    inside = "/" in target.place
    place = scratch / target.place
    if inside:
        shutil.copytree(valid / folder, scratch / folder, symlinks=True)
        if "*" in target.place:
            (place,) = scratch.glob(target.place)
        if target.place.endswith("mlflow.json"):
            place.write_text(json.dumps({"run_id": "0" * 32, "experiment_id": "0"}))
        content = place.read_bytes()
    else:
        content = (valid / target.place).read_bytes()
    place.write_bytes(target.mutate(random, content))
    if "checkpoints/" in target.place and random.random() < 0.8:
        signed(place.with_suffix(".json"), place.with_suffix(".safetensors"))
    if target.place.startswith("train/certificate/"):
        _vouch(scratch / "train", place)
    reader = random.choice(target.quick if quick else target.readers)
    if reader in _FILES:
        with contextlib.suppress(MarginflowError):
            _FILES[reader](place)
    elif reader.startswith("sweep"):
        read_sweep(scratch / "sweep", drawn=reader == "sweep page")
    elif reader == "sections":
        read_sections(scratch / folder)
    elif reader == "plan":
        check(quiet("sweep", place, "--dry-run"))
    elif reader == "configuration":
        check(quiet("train", "--config", place, "--out", scratch / "new", "--quiet", "--epochs", 1))
    else:
        check(quiet(*commands(scratch / folder, valid / "flow", scratch)[reader]))


def _vouch(run: Path, examples: Path) -> None:
    """Make the certificate carry the hash of whatever its examples are now."""
    import hashlib

    digest = hashlib.sha256(examples.read_bytes()).hexdigest()
    examples.rename(examples.with_name(f"support-{digest[:16]}.safetensors"))
    path = run / "certificate.json"
    content = json.loads(path.read_text())
    content["examples_file"]["sha256"] = digest
    path.write_text(json.dumps(content))


@dataclass
class Tally:
    """What came of the examples of one target."""

    count: int = 0
    slowest: float = 0.0
    grown: int = 0
    failures: int = 0


def measured(tally: Tally, example: Callable[[], None]) -> None:
    """Carry out one example; keep how long it took and by how much the process's peak has grown."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    try:
        example()
    finally:
        tally.count += 1
        tally.slowest = max(tally.slowest, time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tally.grown = max(tally.grown, (after - before) * 1024)


@contextlib.contextmanager
def inside_folder(folder: Path) -> Iterator[None]:
    """Inside, ``folder`` is the working folder: what is drawn by default lands there."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
