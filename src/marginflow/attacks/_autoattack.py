"""AutoAttack: the yardstick of robust accuracy, by the parts that torchattacks has of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from marginflow._checks import whole
from marginflow.attacks._foreign import BOUNDS, ForeignAttack, library
from marginflow.attacks._logits import Layout
from marginflow.errors import SpecificationError
from marginflow.losses import margins_of
from marginflow.norms import as_exponent, norm_name

_NORMS = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True, eq=False, init=False)
class AutoAttack(ForeignAttack):
    """AutoAttack (Croce & Hein, ICML 2020), through torchattacks.

    Several attacks, of which the worst counts for each example. Each of the later ones is asked only
    about examples that are still classified rightly. :meth:`parts` says what is run:

    * ``apgd-margin``: APGD on the margin itself, on all examples. It is not in the original; here it makes
      the margins about as small as PGD's, also of examples that keep their class, and it takes the place of
      the DLR loss where there is none;
    * ``apgd-ce``: APGD on the cross-entropy;
    * ``apgd-t``: APGD on the targeted DLR loss ``−(z_y − z_t)/(z_1 − (z_3 + z_4)/2)``, for each other
      class t. Its divisor needs four classes. With three, z_y − z_t itself is taken, which has the same
      sign; with two, that is ``apgd-margin`` and is not run again;
    * ``fab-t``: the smallest perturbation towards each other class;
    * ``square``: random search with no gradient.

    With one output, so that there are two classes, that is APGD on margin and cross-entropy, FAB and
    Square. Steps and queries are by default those of the original; torchattacks' own AutoAttack
    takes 10 steps only. torchattacks 3.5 takes the step size of a batch's first example for all of
    them in ℓ2. Everything is computed in float32.

    Args:
        p: the norm, ``"linf"`` or ``"l2"``.
        eps: the budget ε ≥ 0, in the units of x.
        bounds: the range of x + δ, to [0, 1] of which torchattacks is bound, so that examples are mapped.
            None for unbounded inputs: then the range reaches ε beyond the examples given.
        steps: of APGD and FAB.
        queries: of Square.

    Raises:
        MissingDependencyError: torchattacks is not installed.
        SpecificationError: another norm.
        InputError: a number out of range.
    """

    steps: int = 100
    queries: int = 5000

    name: ClassVar[str] = "autoattack"

    def __init__(
        self,
        p: float | str,
        eps: float,
        *,
        bounds: tuple[float, float] | None = BOUNDS,
        steps: int = 100,
        queries: int = 5000,
    ) -> None:
        exponent = as_exponent(p)
        title = norm_name(exponent)
        if title not in _NORMS:
            raise SpecificationError(f"AutoAttack: expected the norm 'linf' or 'l2', got {p!r}")
        super().__init__(title, eps, exponent, bounds, {}, sayable=True, draws=True)
        object.__setattr__(self, "steps", whole("steps", steps, least=1))
        object.__setattr__(self, "queries", whole("queries", queries, least=1))
        library("torchattacks", "torchattacks")

    @staticmethod
    def parts(classes: int) -> tuple[str, ...]:
        """The attacks that are run on a network with so many classes, in their order.

        Args:
            classes: how many the network tells apart.
        """
        targeted = ("apgd-t",) if classes > 2 else ()
        return ("apgd-margin", "apgd-ce", *targeted, "fab-t", "square")

    @property
    def spec(self) -> str:
        """The specification string that builds this attack again."""
        low_high = "none" if self.bounds is None else f"{self.bounds[0]!r}..{self.bounds[1]!r}"
        said = f"eps={self.eps!r},steps={self.steps},queries={self.queries}"
        return f"{self.name}-{self.title}:{said},bounds={low_high}"

    def _adversarial(self, victim: nn.Module, x: Tensor, labels: Tensor, classes: int) -> Tensor:
        low, high = (
            self.bounds
            if self.bounds is not None
            else (float(x.min()) - self.eps, float(x.max()) + self.eps)
        )
        if self.eps == 0 or not x.numel():
            return x
        seen = Layout(victim, x.shape[1:], x, bounds=(low, high))
        clean = seen.to_image(x).float()
        best, lowest = clean.clone(), _margins(seen, clean, labels)
        for name in self.parts(classes):
            asked = torch.arange(len(x), device=x.device)
            if name != "apgd-margin":
                asked = asked[lowest > 0]
            if not len(asked):
                continue
            found = self._run(name, seen, clean[asked], labels[asked], classes, high - low)
            margins = _margins(seen, found, labels[asked])
            worse = margins < lowest[asked]
            best[asked[worse]], lowest[asked[worse]] = found[worse], margins[worse]
        return x + seen.difference(best - clean)

    def _run(
        self, name: str, seen: Layout, x: Tensor, labels: Tensor, classes: int, unit: float
    ) -> Tensor:
        module: Any = library("torchattacks", "torchattacks")
        common = {
            "norm": _NORMS[self.title],
            "eps": self.eps / unit,
            "seed": int(torch.randint(2**31 - 1, ())),
        }
        if name == "square":
            part = module.Square(seen, n_queries=self.queries, **common)
        elif name == "fab-t":
            part = module.FAB(
                seen, steps=self.steps, multi_targeted=True, n_classes=classes, **common
            )
        elif name == "apgd-t":
            part = module.APGDT(seen, steps=self.steps, n_classes=classes, **common)
            if classes < 4:
                part.dlr_loss_targeted = _targeted_margin
        else:
            loss = "dlr" if name == "apgd-margin" else "ce"
            part = module.APGD(seen, steps=self.steps, loss=loss, **common)
        part.set_device(x.device)
        if name != "apgd-margin":
            found: Tensor = part(x, labels).detach()
            return found
        part.dlr_loss = _negative_margin
        # Its `forward` gives x itself where no class changes; here the smallest margin is wanted.
        return part.perturb(x, labels, best_loss=True)[1].detach()  # type: ignore[no-any-return]


def _negative_margin(logits: Tensor, labels: Tensor) -> Tensor:
    return -margins_of(logits, labels, checked=True)


def _targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    true, target = (logits.gather(1, which.unsqueeze(1)) for which in (labels, targets))
    return (target - true).squeeze(1)


@torch.no_grad()
def _margins(seen: Layout, images: Tensor, labels: Tensor) -> Tensor:
    return margins_of(seen(images), labels, checked=True)
