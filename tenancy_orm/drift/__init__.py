"""Drift: databases with a schema that is not what their revision says."""

from .catalogue import Catalogue, Ignored, Key
from .compare import Difference, compare

__all__ = ["Catalogue", "Difference", "Ignored", "Key", "compare"]
