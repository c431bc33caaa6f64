"""Rehearsal: a migration, tried on clones of tenants before it runs."""

from .rehearsal import Rehearsal
from .report import (
    CloneReport,
    DifferenceReport,
    Estimate,
    LockReport,
    PhaseReport,
    RehearsalReport,
    RevisionReport,
    RewriteReport,
    StatementReport,
)

__all__ = [
    "CloneReport",
    "DifferenceReport",
    "Estimate",
    "LockReport",
    "PhaseReport",
    "Rehearsal",
    "RehearsalReport",
    "RevisionReport",
    "RewriteReport",
    "StatementReport",
]
