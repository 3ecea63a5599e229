"""The certificate of a recorded run: its network, data and attack put together, and kept on disk.

Source: Theorem 5 and Definition 3, for a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from marginflow._checks import choice
from marginflow._reading import read_file, read_versioned
from marginflow.attacks import Attack, Derivative, build, check_budget
from marginflow.datasets import Dataset
from marginflow.distributed import first
from marginflow.errors import InputError, RunError, SpecificationError
from marginflow.homogeneity import measure_homogeneity
from marginflow.kkt._certificate import Certificate, kkt_certificate
from marginflow.kkt._nearest import NearestKKTPoint, check_nearest, nearest_kkt_point
from marginflow.runs import Run, alone_in, load_run, own_folder, write_atomically

SHOWN = 64
"""Support examples whose inputs are kept beside the certificate: those with the largest multipliers."""

_FILE, _FOLDER = "certificate.json", "certificate"
_FORMAT = 1
_HASH = re.compile("[0-9a-f]{64}")
_LOSSES = ("exponential", "logistic")


@dataclass(frozen=True, eq=False)
class RunCertificate:
    """The certificate of a run at its last checkpoint.

    Attributes:
        certificate: what was measured; indices are those of ``data``.
        nearest: the KKT point beside the network, if it was asked for.
        data: the examples, training or test.
        split: ``train`` or ``test``.
        step: the step of the checkpoint; None for a run in memory without measurements.
        seed: of a random start.
    """

    certificate: Certificate
    nearest: NearestKKTPoint | None
    data: Dataset
    split: str
    step: int | None
    seed: int

    @property
    def shown(self) -> Tensor:
        """Places in the support of the at most 64 largest positive multipliers, largest first.

        Returns:
            (k,), int64, k ≤ 64.
        """
        multipliers = self.certificate.multipliers
        order = torch.argsort(multipliers, descending=True, stable=True)[:SHOWN]
        return order[multipliers[order] > 0]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: :meth:`Certificate.as_dict` with the labels of the support and the settings."""
        found = self.certificate.as_dict()
        labels = self.data.y[self.certificate.support.to(self.data.y.device)]
        found["support"]["labels"] = labels.tolist()
        return {
            "format_version": _FORMAT,
            "data": self.data.name,
            "split": self.split,
            "classes": list(self.data.classes),
            "bounds": None if self.data.bounds is None else list(self.data.bounds),
            "step": self.step,
            "seed": self.seed,
            **found,
            "nearest": None if self.nearest is None else self.nearest.as_dict(),
        }

    @first
    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``certificate.json`` into ``folder``, and the inputs of :attr:`shown` beside it.

        The inputs go first, under a name made of their hash, which the JSON file carries: whenever
        this is interrupted, the earlier certificate is still there, whole.

        Args:
            folder: the run directory.

        Returns:
            the path of ``certificate.json``.

        Raises:
            StorageError: the file system refuses.
        """
        root = Path(folder)
        places = self.shown
        indices = self.certificate.support[places]
        tensors = {
            "index": indices,
            "clean": self.data.x[indices.to(self.data.x.device)].cpu().double().contiguous(),
            "adversarial": self.certificate.adversarial_examples[places].contiguous(),
        }
        content = save_tensors(tensors)
        digest = hashlib.sha256(content).hexdigest()
        examples = root / _FOLDER / f"support-{digest[:16]}.safetensors"
        own_folder(examples.parent, make=True)
        entry = {"file": f"{_FOLDER}/{examples.name}", "sha256": digest, "shown": len(indices)}
        text = json.dumps(
            self.as_dict() | {"examples_file": entry}, indent=2, ensure_ascii=False, allow_nan=False
        )
        # Another certificate of the run, written meanwhile, would take these inputs for old ones.
        with alone_in(examples.parent):
            write_atomically(examples, content)
            write_atomically(root / _FILE, text + "\n")
            for old in examples.parent.glob("support-*.safetensors"):
                if old != examples:
                    with contextlib.suppress(OSError):
                        old.unlink()
        return root / _FILE


@dataclass(frozen=True, eq=False)
class SavedCertificate:
    """What :meth:`RunCertificate.save` wrote.

    Attributes:
        content: ``certificate.json``.
        clean: inputs x_i by example, each of its shape, of the largest multipliers, largest first;
            empty where the file with them is gone.
        adversarial: ``x_i + δ_i`` likewise, of the same shapes.
    """

    content: Mapping[str, Any]
    clean: Mapping[int, Tensor]
    adversarial: Mapping[int, Tensor]


def read_certificate(folder: str | os.PathLike[str]) -> SavedCertificate | None:
    """The certificate in a run directory, or None where there is none.

    Args:
        folder: the run directory.

    Raises:
        RunError: a damaged file, or one of a newer format.
    """
    path = Path(folder) / _FILE
    again = "make it again with marginflow certify"
    content = read_versioned(path, _FORMAT, again=again)
    if content is None:
        return None
    try:
        # The name follows from the hash: no path that a file gives is ever opened.
        digest = str(content["examples_file"]["sha256"])
        if not _HASH.fullmatch(digest):
            return SavedCertificate(content, {}, {})
        data = read_file(path.parent / _FOLDER / f"support-{digest[:16]}.safetensors")
        if hashlib.sha256(data).hexdigest() != digest:
            return SavedCertificate(content, {}, {})
        tensors = load_tensors(data)
        indices = tensors["index"].tolist()
        clean, adversarial = (
            dict(zip(indices, tensors[name], strict=True)) for name in ("clean", "adversarial")
        )
    except FileNotFoundError:
        return SavedCertificate(content, {}, {})
    except KeyError as error:
        raise RunError(f"{str(path)!r} is damaged: it has no {error.args[0]}; {again}") from None
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise RunError(f"{str(path)!r} is damaged: {error}; {again}") from None
    return SavedCertificate(content, clean, adversarial)


def certify_run(
    run: Run | str | os.PathLike[str],
    data: Dataset | None = None,
    *,
    attack: Attack | str | None = None,
    model: nn.Module | None = None,
    loss: str | None = None,
    tau: float = 2.0,
    derivative: Derivative = "total",
    split: str = "train",
    fitted_only: bool = False,
    nearest: bool = False,
    max_support: int | None = None,
    batch_size: int = 1024,
    memory: int = 2**30,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
) -> RunCertificate:
    """The :func:`kkt_certificate` of a run's last checkpoint, on the run's own data.

    Args:
        run: a training run or a gradient flow, or its directory.
        data: its data set; by default loaded as the run names it.
        attack: the perturbation, an attack or its specification, ``none`` for the clean margins; by
            default the one trained against.
        model: a network of the same architecture, where the run's is not one of
            :mod:`marginflow.models`. Frozen parameters count as constants, shared ones once.
        loss: ``exponential`` or ``logistic``, in the paper's multipliers; by default the run's own, and
            the exponential one where that was cross-entropy.
        tau: multipliers are allowed where ``m_i ≤ (1 + τ) m_min``.
        derivative: ``total`` or ``detached``.
        split: ``train`` or ``test``.
        fitted_only: leave out the examples whose margin is not positive.
        nearest: solve for the KKT point beside the network too, without the examples left out.
        max_support: the most examples that may have multipliers.
        batch_size: examples per pass.
        memory: bytes for the data of single examples.
        seed: of a random start.
        data_dir: folder of the MNIST files, if they are what is loaded.

    Raises:
        RunError: no such run, no checkpoint, other data than the run's.
        InputError: as for :func:`kkt_certificate` and :func:`nearest_kkt_point`; no test examples.
    """
    choice("split", split, ("train", "test"))
    if not isinstance(run, Run):
        run = load_run(run)
    used = _attack_of(run, attack)
    data = run.load_data(data, data_dir=data_dir)
    if split == "test":
        if data.test is None:
            raise InputError(
                f"the data set {data.name!r} has no test split; measure the split 'train'"
            )
        data = data.test
    check_budget(used, data.shape, data.bounds)
    checkpoint = None if run.path is None else run.checkpoint()
    network = run.load_model(model, checkpoint=checkpoint)
    if nearest:
        check_nearest(network, used)
    own = str(run.config.get("loss"))
    homogeneity = measure_homogeneity(network, data.x)
    found = kkt_certificate(
        network,
        data.x,
        data.y,
        used,
        loss=loss or (own if own in _LOSSES else "exponential"),
        tau=tau,
        derivative=derivative,
        fitted_only=fitted_only,
        max_support=max_support,
        batch_size=batch_size,
        memory=memory,
        homogeneity=homogeneity,
        seed=seed,
    )
    beside = None
    if nearest:
        kept = found.fitted.to(data.x.device)
        beside = nearest_kkt_point(
            network, data.x[kept], data.y[kept], used, homogeneity=homogeneity
        )
    step = run.metrics[-1].get("step") if run.metrics else None
    if checkpoint is not None:
        step = checkpoint.info.get("step")
    return RunCertificate(found, beside, data, split, step, seed)


def _attack_of(run: Run, asked: Attack | str | None) -> Attack | None:
    if asked is not None:
        return build(asked)
    told = run.config.get("attack", "none")
    if run.config.get("kind") == "monitor" and "attack" not in (run.config.get("declared") or ()):
        told = run.config["measure_with"]
    try:
        return build(str(told))
    except SpecificationError:
        raise InputError(
            f"the run's attack {told!r} cannot be built from its name; give it: attack=…"
        ) from None
