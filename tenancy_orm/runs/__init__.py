"""Runs: one migration of all tenants' databases."""

from .catch_up import CatchUpReport
from .migrator import FleetMigrator
from .report import FleetReport, Progress, TenantOutcome
from .status import TenantRevision
from .waves import Wave, Waves

__all__ = [
    "CatchUpReport",
    "FleetMigrator",
    "FleetReport",
    "Progress",
    "TenantOutcome",
    "TenantRevision",
    "Wave",
    "Waves",
]
