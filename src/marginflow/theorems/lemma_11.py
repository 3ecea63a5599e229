"""Lemma 11: the layers' squared norms, divided by their degrees, grow alike."""

from __future__ import annotations

import numpy as np

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import path_of, scale_invariant
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

_STEPS = 1e-11
_FLOW = 1e-9


def lemma_11(evidence: Evidence) -> Verdict:
    """``‖W_k‖_F²/c_k − ‖W_j‖_F²/c_j`` is constant along the gradient flow (Eq. 96).

    Along gradient descent and SGD, with any step and loss, ``[‖W_k‖_F² − Σ η²‖G_k‖_F²]/c_k`` differs between
    layers by a constant exactly; that is followed at every step. The paper asks for a scale
    invariant attack, which is not needed, though Lemma 4 needs it: multiplying W_k by a is
    multiplying f by a^{c_k}, so ``⟨W_k, G_k⟩/c_k`` is one number for every δ(W) that sees W through f.
    """
    invariant = scale_invariant(evidence)
    layers = evidence.homogeneity.layers if evidence.homogeneity is not None else ()
    hypotheses = [
        Hypothesis("a multi-homogeneous network of two layers or more", len(layers) > 1),
        Hypothesis(invariant.name, invariant.met, invariant.detail, needed=False),
    ]
    if evidence.is_flow:
        tolerance = conserved_to(evidence)
        why = f"{tolerance:g}: 1e-9, or 100 times the rtol of Runge–Kutta steps"
        quantity = (
            "largest change of ‖W_k‖_F²/c_k − ‖W_j‖_F²/c_j on the path, less what finite explicit "
            "steps add, over the largest ‖W_k‖²"
        )
    else:
        hypotheses += [evidence.without_momentum(), evidence.is_float64()]
        tolerance = _STEPS
        why = f"{tolerance:g}: rounding of the weights at each step, observed below 1e-13"
        quantity = (
            "largest change of [‖W_k‖² − Σ η²‖G_k‖²]/c_k − [‖W_j‖² − Σ η²‖G_j‖²]/c_j, "
            "over the largest ‖W_k‖²"
        )
    claim = Claim(
        "Lemma 11",
        "‖W_k‖_F²/c_k grows at the same rate in all layers",
        tuple(hypotheses),
        quantity,
        "0",
        why,
    )
    drift = _flow_drift(evidence) if evidence.is_flow else _recorded_drift(evidence)
    unmet = claim.set_aside("" if drift is None else f"drift {drift:.2e}")
    if unmet:
        return unmet
    if drift is None:
        return claim.judge(None, "no drift was recorded", "measure along the way")
    return claim.judge(drift <= tolerance, f"{drift:.2e}")


def conserved_to(evidence: Evidence) -> float:
    """To what the integrator conserves quadratic invariants: explicit pairs to their tolerance only."""
    kept = ("stiff", "steps")
    explicit = any(record.get("method") not in kept for record in evidence.run.metrics)
    return max(_FLOW, 100 * evidence.rtol) if explicit else _FLOW


def _recorded_drift(evidence: Evidence) -> float | None:
    drifts = [r["norm_drift"] for r in evidence.run.metrics if r.get("norm_drift") is not None]
    return max(drifts) if drifts else None


def _flow_drift(evidence: Evidence) -> float | None:
    path = path_of(evidence)
    if path is None or len(path) < 2:
        return None
    # Explicit steps add to ‖W_k‖² of the second order in their length; known, and taken off.
    added = np.array(
        [record.get("step_corrections") or [0.0] * path.norms.shape[1] for record in path.records]
    )
    balances = path.balances - added / path.degrees
    changes = balances - balances[0]
    apart = changes.max(axis=1) - changes.min(axis=1)
    return float(apart.max() / np.square(path.norms).max())
