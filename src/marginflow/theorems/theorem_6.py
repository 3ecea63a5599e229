"""Theorem 6: the limit of approximate KKT points is a KKT point (Dutta et al. 2013)."""

from __future__ import annotations

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import along_the_flow
from marginflow.theorems._verdict import Claim, Verdict
from marginflow.theorems.eq_129 import mfcq_error
from marginflow.theorems.theorem_5 import SLIDES, sliding

_MFCQ = 1e-10


def theorem_6(evidence: Evidence) -> Verdict:
    """The limit of (χ_t, ξ_t)-approximate KKT points with χ_t, ξ_t → 0 is a KKT point under MFCQ.

    The conclusion is about a limit; what a run can show are the premises: that both sequences of
    Theorem 5 fall over the kept points, and that (129) holds there.
    """
    claim = Claim(
        "Theorem 6",
        "χ_t, ξ_t → 0 and MFCQ: the limit of W/m_min^{1/K} is a KKT point",
        along_the_flow(evidence),
        "the last four of at most eight points above ln(1/L) = 10: exponents of χ and ξ in ln(1/L); "
        "largest |⟨W, ∂m_i⟩/(K m_i) − 1|",
        "both negative; 0",
        f"none from ln(1/L) = 100 on; {_MFCQ:g} as for Eq. 129",
    )
    found = evidence.certificates
    text = ""
    if found.found:
        last = found.found[-1]
        text = f"χ = {last.stationarity:.3g}, ξ = {last.complementarity:.3g} at the end"
    unmet = claim.set_aside(text)
    if unmet or not found.found:
        return unmet or claim.judge(None, "no kept point has L < 1/n", evidence.further)
    if sliding(evidence):
        return claim.judge(None, text, SLIDES)
    if not found.reaches:
        return claim.judge(None, text, f"ln(1/L) must span a decade above 10: {evidence.further}")
    exponents = found.exponent(found.stationarity), found.exponent(found.complementarity)
    error, _ = mfcq_error(evidence)
    off = max(map(abs, error))
    text = f"{exponents[0]:.4g}, {exponents[1]:.4g}; {off:.1e}; {text}"
    return claim.judge(max(exponents) < 0 and off <= _MFCQ, text)
