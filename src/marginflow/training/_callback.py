"""How measuring, recording and progress reach the trainer, which knows none of them.

Source: marginflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from marginflow.training._trainer import Trainer


class Callback:
    """Told of what happens in a training; every method does nothing until overridden.

    The trainer's ``model``, ``epoch``, ``step``, ``epoch_loss`` and ``epoch_accuracy``
    can be read in each of them. A callback must not change the weights.
    """

    def state(self) -> dict[str, Tensor]:
        """What the callback needs to go on in another process; saved in every checkpoint.

        Returns:
            by name, of any shape.
        """
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state` gave.

        Args:
            state: what :meth:`state` gave, of the same shapes.
        """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process (epoch 0, or where a resumed run begins).

        Args:
            trainer: the training.
        """

    def on_step(self, trainer: Trainer) -> None:
        """After each update.

        Args:
            trainer: the training.
        """

    def on_epoch(self, trainer: Trainer) -> None:
        """After each completed epoch.

        Args:
            trainer: the training.
        """

    def on_interrupt(self, trainer: Trainer) -> None:
        """After the last completed step when the user interrupts.

        Args:
            trainer: the training.
        """

    def on_end(self, trainer: Trainer) -> None:
        """After the last epoch.

        Args:
            trainer: the training.
        """
