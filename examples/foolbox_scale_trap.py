"""foolbox side by side, and the scale trap: larger weights look more robust, and are not.

A network without biases is trained against FGSM on the ten digits. Then every layer is multiplied by
c = 1, 2, 4 …, which changes no decision. foolbox's own evaluation (its model, its PGD) reports more
and more robustness all the same, since the cross-entropy that it follows saturates; marginflow follows
the margin, and reports the same at every c. foolbox's attack is also taken over as one of marginflow's
(``from_foolbox``): the accuracy is then foolbox's own.

    pip install 'marginflow[attack-libraries]'
    python examples/foolbox_scale_trap.py [--out PICTURE.png]
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import marginflow as mf
from marginflow.experiments import Curve, FigureData, Panel
from marginflow.report import save_figure

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of scipy, about foolbox
        import foolbox
except ModuleNotFoundError:
    print("needs foolbox: pip install 'marginflow[attack-libraries]'", file=sys.stderr)
    sys.exit(2)

EPS, STEPS, EPOCHS, BATCH = 0.1, 10, 25, 64
SCALES = (1, 2, 4, 8, 16, 32)


def trained(data: mf.Dataset, attack: mf.attacks.Attack) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(EPOCHS):
        for rows in torch.randperm(data.n).split(BATCH):
            x, y = data.x[rows], data.y[rows]
            optimizer.zero_grad()
            cross_entropy(model(x + attack(model, x, y).delta), y).backward()
            optimizer.step()
    return model.eval()


def times(model: nn.Module, c: float) -> nn.Module:
    """A copy with every layer multiplied by c: the same decisions, the same normalised margins."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(c)
    return model


def main(picture: Path) -> int:
    torch.set_num_threads(1)
    data = mf.load("digits")
    test = data.test or data
    x, y = test.x, test.y
    network = trained(data, mf.attacks.FGSM(eps=EPS, bounds=(0, 1)))
    size = 2.5 / STEPS  # in units of ε
    ours = mf.attacks.PGD("linf", EPS, steps=STEPS, step_size=size * EPS, bounds=(0, 1))
    theirs = foolbox.attacks.LinfPGD(steps=STEPS, rel_stepsize=size, random_start=False)
    adapted = mf.attacks.from_foolbox(theirs, eps=EPS)

    print(f"Ten digits, {test.n} held-out images, ℓ∞-PGD, ε = {EPS}, {STEPS} steps, seed 0\n")
    print(f"{'c':>4} {'clean':>7} {'foolbox':>8} {'adapted':>8} {'marginflow':>11}  accuracy")
    rows = []
    for c in SCALES:
        model = times(network, c)
        fmodel = foolbox.PyTorchModel(model, bounds=(0, 1))
        clean = foolbox.accuracy(fmodel, x, y)
        fooled = theirs(fmodel, x, y, epsilons=EPS)[2]
        reported = 1 - float(fooled.double().mean())
        same = mf.adversarial_margins(model, x, y, adapted).accuracy
        true = mf.adversarial_margins(model, x, y, ours).accuracy
        rows.append((clean, reported, same, true))
        print(f"{c:4} {clean:7.3f} {reported:8.3f} {same:8.3f} {true:11.3f}")

    names = ("clean", "foolbox", "foolbox, measured by marginflow", "marginflow")
    curves = [
        Curve(name, SCALES, [100 * row[k] for row in rows], color=k, measured=k > 0, dashed=k == 2)
        for k, name in enumerate(names)
    ]
    accuracy = Panel(
        "Accuracy under ℓ∞-PGD", "every layer multiplied by c", "correct (%)", curves, xscale="log"
    )
    rise = 100 * (rows[-1][1] - rows[0][1])
    said = f"No decision changes with c, yet foolbox's accuracy rises by {rise:.1f} points."
    title = "The scale trap: reported robustness against the scale of the weights"
    note = f"{test.n} held-out digits, ε = {EPS}, {STEPS} steps, trained against FGSM; seed 0."
    save_figure(FigureData("scale-trap", title, said, (accuracy,), (note,)), picture)
    print(f"\n{said}\nThe picture lies in {picture}.")

    checks = {
        "the same decisions at every c": len({row[0] for row in rows}) == 1,
        "foolbox's accuracy rises with c": rise > 5,
        "marginflow's does not": len({row[3] for row in rows}) == 1,
        "the adapted attack counts as foolbox does": all(abs(r[1] - r[2]) < 0.005 for r in rows),
        "a picture": picture.stat().st_size > 1000,
    }
    for what, holds in checks.items():
        if not holds:
            print(f"\nexpected: {what}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the picture; a temporary file if missing")
    asked = parser.parse_args()
    if asked.out is not None:
        sys.exit(main(asked.out))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(Path(folder) / "scale-trap.png"))
