"""Exports of a tenant's data that need no PostgreSQL, and certificates of its erasure."""

from .certificates import ErasureCertificate, Remaining
from .erasure import ErasureManager, ErasureReport
from .manager import ExportManager, ExportStream
from .plan import LeftOut
from .running import ExportProgress, ExportReport
from .values import ExportFormat

__all__ = [
    "ErasureCertificate",
    "ErasureManager",
    "ErasureReport",
    "ExportFormat",
    "ExportManager",
    "ExportProgress",
    "ExportReport",
    "ExportStream",
    "LeftOut",
    "Remaining",
]
