"""KKT points of "smallest norm with every adversarial margin at least 1" (Theorem 5, Definition 3)."""

from marginflow.kkt._certificate import Certificate, Curve, Residuals, kkt_certificate
from marginflow.kkt._nearest import NearestKKTPoint, nearest_kkt_point
from marginflow.kkt._run import RunCertificate, SavedCertificate, certify_run, read_certificate

__all__ = [
    "Certificate",
    "Curve",
    "NearestKKTPoint",
    "Residuals",
    "RunCertificate",
    "SavedCertificate",
    "certify_run",
    "kkt_certificate",
    "nearest_kkt_point",
    "read_certificate",
]
