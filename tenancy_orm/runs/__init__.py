"""Runs: one migration of all tenants' databases."""

from .catch_up import CatchUpReport
from .checks import WaveReport
from .migrator import FleetMigrator
from .notices import NoticeReport
from .records import ProcessRecord, RunRecord, TenantRecord
from .report import FleetReport, Progress, TenantOutcome
from .served import CompatibilityReport, RevisionCount
from .status import TenantRevision
from .waves import Wave, Waves

__all__ = [
    "CatchUpReport",
    "CompatibilityReport",
    "FleetMigrator",
    "FleetReport",
    "NoticeReport",
    "ProcessRecord",
    "Progress",
    "RevisionCount",
    "RunRecord",
    "TenantOutcome",
    "TenantRecord",
    "TenantRevision",
    "Wave",
    "WaveReport",
    "Waves",
]
