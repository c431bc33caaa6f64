"""Restores of tenants: beside the database in use, inspected, swapped; the old one is kept for a time."""

from .manager import RestoreManager
from .rebuilding import FoundDatabase, RebuildReport, RegistryRebuilding
from .report import RestoreReport
from .sources import Archive, BackupSource, DumpSource, RestoreSource

__all__ = [
    "Archive",
    "BackupSource",
    "DumpSource",
    "FoundDatabase",
    "RebuildReport",
    "RegistryRebuilding",
    "RestoreManager",
    "RestoreReport",
    "RestoreSource",
]
