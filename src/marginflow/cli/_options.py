"""What several commands share: help, and the sinks of ``--log``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DATA = "Data set: digits:3,8, mnist:3,8, separable:n=60,d=20,margin=0.1, npz:PATH."
FLOW_DATA = DATA.replace(",margin=0.1", "")  # its column is too narrow for more
DATA_DIR = "Folder with the MNIST files (or set MARGINFLOW_DATA)."
MODEL = "Network: mlp:1024,64 (hidden widths), cnn, deep-linear:10,10."
ATTACK = "Trained against: none, fgsm:eps=16/255, fgm:eps=1.5, pgd-linf:eps=0.1,steps=5."
DEVICE = "Device: cpu, cuda."
LOG = "Also log to: tensorboard, mlflow (repeatable); none stops it on --resume."
THREADS = "CPU threads; results are the same bits only at the same number."


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


OWN_MODEL = "A model of your own, of a monitored loop: package.module:function."
OWN_DATA = "Its data, where the run cannot name them: npz:PATH."
