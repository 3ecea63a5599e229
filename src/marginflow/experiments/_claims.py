"""What is claimed of a path of margins, judged: fitted, growing, above another, different.

A path is a list of measurements at log-spaced epochs. All judgements count measured
points; what happens between two of them is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from marginflow.experiments._curves import ACCURACY, MARGIN, Records, path_of
from marginflow.experiments._experiment import Trained
from marginflow.theorems import Verdict
from marginflow.theorems._verdict import Claim

LEVEL = 0.01
"""Level of the rank test for growth."""

LEAST_POINTS = 5
"""Points that the rank test needs: with four even a rising path has p = 1/24."""

DECISIVE_POINTS = 10
"""Points from which on a test that does not find growth counts against it."""

_DIFFERENT = 0.05


@dataclass(frozen=True)
class Finding:
    """What one path says of a claim: whether it holds (None: not reached), and its numbers."""

    ok: bool | None
    text: str


def judge(claim: Claim, findings: Mapping[str, Finding], advice: str = "") -> Verdict:
    """The verdict of all findings: fails if one fails, else is reached only if all are."""
    answers = [finding.ok for finding in findings.values()]
    ok = False if False in answers else None if None in answers or not answers else True
    alone = len(findings) == 1
    text = "; ".join(f.text if alone else f"{name}: {f.text}" for name, f in findings.items())
    return claim.judge(ok, text, advice if ok is None else "")


def each_seed(
    trained: Mapping[str, Sequence[Trained]], finding: Callable[[Trained], Finding]
) -> dict[str, Finding]:
    """One finding for every training and seed, under a name that tells them apart."""
    found = {}
    for label, seeds in trained.items():
        for t in seeds:
            parts = [label] if len(trained) > 1 else []
            parts += [f"seed {t.seed}"] if len(seeds) > 1 else []
            found[", ".join(parts)] = finding(t)
    return found


def separation(records: Records) -> float | None:
    """The first measured epoch at which every perturbed training example is classified right."""
    fitted = [epoch for epoch, accuracy in path_of(records, ACCURACY).items() if accuracy == 1]
    return min(fitted, default=None)


def fitted_claim(figure: str) -> Claim:
    """The training accuracy under the perturbation reaches 100 % (Assumption 4)."""
    return Claim(
        figure,
        "every perturbed training example gets classified right (Assumption 4)",
        (),
        "first measured epoch with 100 % adversarial training accuracy",
        "there is one",
        "none: every example counts",
    )


def fitted(records: Records) -> Finding:
    """The epoch of 100 %, or how near the run came."""
    epoch = separation(records)
    if epoch is not None:
        return Finding(True, f"epoch {epoch:,.0f}")
    path = path_of(records, ACCURACY)
    best = max(path, key=lambda e: path[e], default=0.0)
    share = path.get(best, 0.0)
    # Rounded down: 99.996 % is not 100 %.
    return Finding(
        None,
        f"{int(share * 1e4) / 100:.2f} % at best (epoch {best:,.0f} of {max(path, default=0):,.0f})",
    )


def growth_claim(
    figure: str,
    claim: str = "γ̂_m keeps growing once every perturbed example is fitted",
    when: str = "after separation",
) -> Claim:
    """γ̂_m keeps growing, by default once all adversarial examples are fitted."""
    return Claim(
        figure,
        claim,
        (),
        f"Kendall's τ of γ̂_m with the epoch, over the measured points {when}",
        f"τ > 0 with p < {LEVEL:g} (one-sided), and the last point above the first",
        f"level {LEVEL:g}: net growth, for SGD steps and flips of δ let single points fall; the points of "
        "one path are not independent, so p is a yardstick and no error rate",
    )


def growth(records: Records, since: float | None = None) -> Finding:
    """The rank test (Mann and Kendall's) over the points from ``since`` on, by default separation.

    The points are log-spaced, since margins grow like ln t; ranks do not see how far. Fewer than
    :data:`DECISIVE_POINTS` that neither rise nor fall for certain leave the claim undecided.
    """
    from scipy.stats import kendalltau

    start = separation(records) if since is None else since
    path = path_of(records, MARGIN)
    if start is None:
        last = path[max(path)] if path else float("nan")
        return Finding(
            None, f"never separated; γ̂_m = {milli(last)} at epoch {max(path, default=0):,.0f}"
        )
    points = sorted((epoch, margin) for epoch, margin in path.items() if epoch >= start)
    n = len(points)
    span = f"{milli(points[0][1])} → {milli(points[-1][1])}, epochs {start:,.0f} … {points[-1][0]:,.0f}"
    if n < LEAST_POINTS:
        return Finding(None, f"{span}: only {n} measured point{'s' if n > 1 else ''}")
    epochs, margins = zip(*points, strict=True)
    test = kendalltau(epochs, margins, alternative="greater")
    # A path that stands still has no ranks (nan), and does not grow.
    p = float(test.pvalue) if test.pvalue == test.pvalue else 1.0
    tau = float(test.statistic) if test.statistic == test.statistic else 0.0
    falling = float(kendalltau(epochs, margins, alternative="less").pvalue) < LEVEL
    ok: bool | None = p < LEVEL and margins[-1] > margins[0]
    if not ok and n < DECISIVE_POINTS and not falling:
        ok = None  # a few points rise too little to tell, or too little to deny it
    return Finding(ok, f"{span}: τ = {tau:.2f}, p = {p:.1g}, n = {n}".replace("= -", "= −"))


def above_claim(figure: str, other: str = "the standard net's") -> Claim:
    """γ̂_m of adversarial training lies above that of standard training."""
    return Claim(
        figure,
        f"γ̂_m of the adversarially trained net lies above {other}",
        (),
        "smallest difference of the two γ̂_m over the measured epochs after separation",
        "above 0 at every one of them",
        "none: both are measured to rounding",
    )


def above(records: Records, other: Records) -> Finding:
    """The smallest difference over the epochs at which both were measured, after separation."""
    start = separation(records)
    upper, lower = path_of(records, MARGIN), path_of(other, MARGIN)
    common = sorted(set(upper) & set(lower))
    after = [e for e in common if start is not None and e >= start]
    if not after:
        if not common:
            return Finding(None, "no common epoch")
        last = common[-1]
        return Finding(
            None,
            f"never separated while both were measured; at epoch {last:,.0f} {milli(upper[last])} "
            f"against {milli(lower[last])}",
        )
    worst = min(after, key=lambda e: upper[e] - lower[e])
    ok = upper[worst] > lower[worst]
    return Finding(
        ok,
        f"{milli(upper[worst])} against {milli(lower[worst])} where they are closest (epoch {worst:,.0f}, "
        f"of {len(after)} points)",
    )


def difference_claim(figure: str, between: str) -> Claim:
    """The margins differ between the sizes of a perturbation, or between perturbations of a size."""
    return Claim(
        figure,
        f"γ̂_m differs between {between}",
        (),
        "smallest relative difference between the final γ̂_m of two of them",
        "not 0",
        f"twice the range over the seeds; of a single seed {_DIFFERENT:.0%} of the larger, else undecided",
    )


def difference(finals: Mapping[str, Sequence[float]]) -> Finding:
    """The two settings whose means are closest; ``finals`` has one number a seed."""
    if len(finals) < 2:
        return Finding(None, "only one setting")
    mean = {name: sum(values) / len(values) for name, values in finals.items()}
    spread = max(max(values) - min(values) for values in finals.values())

    def relative(pair: tuple[str, str]) -> float:
        a, b = (mean[name] for name in pair)
        return abs(a - b) / max(abs(a), abs(b), 1e-300)

    closest = min(combinations(mean, 2), key=relative)
    a, b = closest
    apart = abs(mean[a] - mean[b])
    alone = all(len(values) == 1 for values in finals.values())
    ok: bool | None = apart > 2 * spread
    if alone and relative(closest) <= _DIFFERENT:
        ok = None  # one seed does not tell what another would change
    text = f"{relative(closest):.0%} between {a} ({milli(mean[a])}) and {b} ({milli(mean[b])})"
    if spread:
        text += f"; range over the seeds {milli(spread)}"
    return Finding(ok, text)


def two_standard_errors(a: float, b: float, count: int) -> float:
    """Two standard errors of the difference of the shares a and b of ``count`` examples each."""
    return math.inf if count == 0 else 2 * math.sqrt((a * (1 - a) + b * (1 - b)) / count)


def milli(value: float, *, unit: bool = True) -> str:
    """A normalised margin in units of 10⁻³, for the paper's networks have margins of that order."""
    text = f"{1e3 * value:.3g}" if abs(value) < 1 else f"{1e3 * value:,.0f}"
    return text.replace("-", "−") + (" × 10⁻³" if unit else "")
