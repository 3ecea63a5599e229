"""The measurements in Lightning: ``Trainer(callbacks=[MarginCallback(data, attack)])``.

Importing this module needs Lightning: ``lightning`` or ``pytorch_lightning``, whichever the program has
imported already.
"""

from __future__ import annotations

import sys
from typing import Any

from marginflow._checks import optional
from marginflow.attacks import Attack
from marginflow.monitor import Monitor

_NAME = "lightning.pytorch"
if _NAME not in sys.modules and "pytorch_lightning" in sys.modules:
    _NAME = "pytorch_lightning"
_Callback: Any = optional(_NAME, "lightning", "the Lightning callback", "lightning").Callback


class MarginCallback(_Callback):  # type: ignore[misc]  # any of two classes
    """Measures a LightningModule at the end of its epochs, on the monitor's schedule.

    ::

        trainer = Trainer(callbacks=[MarginCallback((x, y), attack, out="runs/mine")])

    The module's ``forward`` must map examples to outputs. What was measured goes to the trainer's
    loggers too, as ``marginflow/adversarial_accuracy`` and so on. Steps count epochs; 0 is the start.

    Source: :class:`marginflow.Monitor`, on the callbacks of Lightning 2 (Section 3.2 for the
    margins).

    Args:
        data: as for :class:`marginflow.Monitor`; None takes the trainer's own training loader.
        attack: the perturbation, or its specification.
        options: any other argument of :class:`marginflow.Monitor`.

    Raises:
        MissingDependencyError: on importing this module, without Lightning.

    Attributes:
        monitor: the :class:`marginflow.Monitor`, from the start of training on.
        data, attack, options: as given.
    """

    def __init__(
        self, data: Any = None, attack: Attack | str | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.data = data
        self.attack = attack
        self.options = options
        self.monitor: Monitor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the monitor, and measure the weights that training begins with.

        Args:
            trainer: Lightning's trainer.
            pl_module: the module in training.
        """
        data = trainer.train_dataloader if self.data is None else self.data
        if self.monitor is None or self.monitor.model is not pl_module:
            self.monitor = Monitor(pl_module, data, self.attack, **self.options)
        elif self.options.get("out") is not None:
            # A second `fit`: the directory was released at the end of the first.
            again = {**self.options, "resume": True, "force": False}
            self.monitor = Monitor(pl_module, data, self.attack, **again)
        self._measure(trainer, int(trainer.current_epoch))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, if the epoch is due.

        Args:
            trainer: Lightning's trainer.
            pl_module: the module in training.
        """
        self._measure(trainer, int(trainer.current_epoch) + 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the last epoch, and release the run directory.

        Args:
            trainer: Lightning's trainer.
            pl_module: the module in training.
        """
        if self.monitor is not None:
            before = len(self.monitor.records)
            self.monitor.close()
            if len(self.monitor.records) > before:
                self._log(trainer, self.monitor.records[-1])

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Release the run directory; what was measured is there.

        Args:
            trainer: Lightning's trainer.
            pl_module: the module in training.
            exception: what ended the training.
        """
        if self.monitor is not None:
            self.monitor.__exit__(type(exception), exception, None)

    def _measure(self, trainer: Any, epoch: int) -> None:
        if self.monitor is None:
            return
        before = len(self.monitor.records)
        found = self.monitor.measure(epoch, epoch=epoch, global_step=int(trainer.global_step))
        if found.get("step") == epoch and len(self.monitor.records) != before:
            self._log(trainer, found)

    def _log(self, trainer: Any, record: dict[str, Any]) -> None:
        numbers = {
            f"marginflow/{name}": float(value)
            for name, value in record.items()
            if isinstance(value, bool | int | float) and name not in ("step", "global_step")
        }
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=int(record["global_step"]))
