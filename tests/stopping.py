"""Callbacks that end a training in the middle."""

from __future__ import annotations

import signal

from marginflow.training import Callback, Trainer


class InterruptAt(Callback):
    """Ctrl-C at a step: a checkpoint is left, perhaps in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            signal.raise_signal(signal.SIGINT)


class CrashAt(Callback):
    """An exception at a step: nothing is written after it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            raise InterruptedError
