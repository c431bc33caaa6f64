"""Drift: databases with a schema that is not what their revision says."""

from .catalogue import Catalogue, Ignored, Key
from .compare import Difference
from .detection import DriftDetector
from .report import DriftGroup, DriftProgress, DriftReport

__all__ = [
    "Catalogue",
    "Difference",
    "DriftDetector",
    "DriftGroup",
    "DriftProgress",
    "DriftReport",
    "Ignored",
    "Key",
]
