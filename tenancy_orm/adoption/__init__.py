"""Adoption: an existing database, schema, or set of rows becomes a tenant."""

from .manager import AdoptionManager
from .report import AdoptedTable, AdoptionReport

__all__ = ["AdoptedTable", "AdoptionManager", "AdoptionReport"]
