"""Clones: a copy of a tenant becomes another tenant for a time, with its values replaced where rules say so."""

from .manager import CloneManager, CloneReport
from .records import Clone
from .rules import AnonymisationRules, ColumnRule

__all__ = ["AnonymisationRules", "Clone", "CloneManager", "CloneReport", "ColumnRule"]
