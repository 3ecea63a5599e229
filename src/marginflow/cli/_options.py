"""What several commands share: help, and the sinks of ``--log``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marginflow._checks import whole

DATA = "Data set: digits:3,8, mnist:3,8, separable:n=60,d=20,margin=0.1, npz:PATH."
FLOW_DATA = DATA.replace(",margin=0.1", "")  # its column is too narrow for more
DATA_DIR = "Folder with the MNIST files (or set MARGINFLOW_DATA)."
MODEL = "Network: mlp:1024,64 (hidden widths), cnn, deep-linear:10,10."
ATTACK = "Trained against: none, fgsm:eps=16/255, fgm:eps=1.5, pgd-linf:eps=0.1,steps=5."
DEVICE = "Device: cpu, cuda."
LOG = "Also log to: tensorboard, mlflow (repeatable); none stops it on --resume."
THREADS = "CPU threads; results are the same bits only at the same number."


_MOST_THREADS = 4096


def use_threads(number: int | None) -> None:
    """Set the number of PyTorch's threads; None leaves it as it is.

    Raises:
        InputError: below 1, or more than any machine has.
    """
    if number is not None:
        import torch

        torch.set_num_threads(whole("--threads", number, least=1, most=_MOST_THREADS))


def take_log(options: dict[str, Any], resumed: Path | None = None) -> tuple[str, ...]:
    """Take ``log`` out of the options; a run that is resumed goes on with what it had.

    Args:
        options: of the command; ``log`` is a name, several, or ``none``.
        resumed: the directory of the run that is resumed.
    """
    given = options.pop("log", None)
    if not given:
        if resumed is None:
            return ()
        from marginflow.runs import sinks_of

        return sinks_of(resumed)
    names = [given] if isinstance(given, str) else list(given)
    return () if names == ["none"] else tuple(names)


OWN_MODEL = (
    "A model of your own, of a monitored loop: package.module:function (imported and called)."
)
OWN_DATA = "Its data, where the run cannot name them: npz:PATH."
