"""The measurements of one set of weights, as a record that any training loop can take."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from marginflow.attacks import Attack
from marginflow.datasets import Dataset
from marginflow.errors import InputError
from marginflow.homogeneity import Homogeneity, measure_homogeneity
from marginflow.losses import Loss
from marginflow.margins import Margins, clean_and_adversarial
from marginflow.runs import QUANTILES, Metrics


class Monitor:
    """Measures margins, accuracies and norms of ``model`` whenever it is asked to.

    ``monitor = mf.Monitor(model, (x, y), attack)``, then ``monitor.measure(step)`` in the
    loop. The model's mode, gradients and the random state stay as they are.

    Args:
        model: a multi-homogeneous network, in training anywhere.
        data: the examples whose margins count: a :class:`Dataset` or a pair (x, y). The
            test split of a data set is measured too.
        attack: the perturbation of the adversarial margins; None measures clean ones only.
        loss: the loss whose logarithm is recorded; None records none.
        batch_size: examples per pass.
        homogeneity: the measured layers, if at hand.

    Raises:
        NotHomogeneousError: the network has no normalised margins.
        DataError: data that cannot be used.

    Attributes:
        records: all measurements so far, oldest first; a frame by ``records.to_pandas()``.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset | tuple[Tensor, Tensor],
        attack: Attack | None = None,
        *,
        loss: str | Loss | None = None,
        batch_size: int = 1024,
        homogeneity: Homogeneity | None = None,
    ) -> None:
        if not isinstance(data, Dataset):
            if not isinstance(data, tuple) or len(data) != 2:
                raise InputError(
                    f"data: expected a Dataset or a pair (x, y), got {type(data).__name__}"
                )
            data = Dataset(*data)
        self.model = model
        self.data = data
        self.attack = attack
        self.loss = loss
        self.batch_size = batch_size
        if homogeneity is None:
            homogeneity = measure_homogeneity(model, data.x)
        self.homogeneity = homogeneity
        self.records = Metrics(layers=[layer.name for layer in homogeneity.layers])

    def measure(self, step: int, **context: Any) -> dict[str, Any]:
        """Measure now; append the record to :attr:`records` and return it.

        Every number is a Python float, so the record can be stored as JSON. Margins are
        normalised by ρ unless their name says otherwise.

        Args:
            step: what the caller counts.
            context: further entries of the record (epoch, training loss …).
        """
        clean, hit = self._margins(self.data)
        levels = hit.quantiles(QUANTILES).tolist()
        record: dict[str, Any] = {
            "step": step,
            **context,
            "normalized_margin": hit.normalized_min,
            "normalized_margin_quantiles": levels,
            "normalized_margin_by_total": float(hit.normalized_by_total.min()),
            "margin": hit.min,
            "smoothed_margin": hit.smoothed_normalized,
            "adversarial_accuracy": hit.accuracy,
            "dead_inputs": int(hit.dead_inputs.sum()),
            "log_loss": hit.log_loss,
            "clean_normalized_margin": clean.normalized_min,
            "clean_accuracy": clean.accuracy,
            "layer_norms": self.homogeneity.norms(self.model).tolist(),
            "norm_product": hit.rho,
            "total_norm": hit.total_norm,
        }
        if self.data.test is not None:
            unseen = self._margins(self.data.test)
            record["test_clean_accuracy"] = unseen[0].accuracy
            record["test_adversarial_accuracy"] = unseen[1].accuracy
        self.records.append({key: _json(value) for key, value in record.items()})
        return self.records[-1]

    def _margins(self, data: Dataset) -> tuple[Margins, Margins]:
        return clean_and_adversarial(
            self.model,
            data.x,
            data.y,
            self.attack,
            batch_size=self.batch_size,
            loss=self.loss,
            homogeneity=self.homogeneity,
        )


def _json(value: Any) -> Any:
    """None in place of NaN and infinity, which JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_json(entry) for entry in value]
    return value
