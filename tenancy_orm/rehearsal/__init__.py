"""Rehearsal: a migration, tried on clones of tenants before it runs."""

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
    "RehearsalReport",
    "RevisionReport",
    "RewriteReport",
    "StatementReport",
]
