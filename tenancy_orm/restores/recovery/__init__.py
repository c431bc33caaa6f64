"""Servers as they were at a point in time, recovered beside the real ones so that one tenant can be taken out of them.

A provider (``Recovery``) recovers a server from base backups and WAL, ours (``DirectoryRecovery``) or those of
Barman (``BarmanRecovery``). It runs as a ``ScratchServer``, a PostgreSQL process that can be reached in a private
directory alone, and there the tenant's own database alone.
"""

from .barman import BarmanRecovery
from .base_backups import BaseBackup
from .manager import BaseReport, DueBases, RecoveryManager
from .point_in_time import PointInTime
from .providers import DirectoryRecovery, Recovery, RecoveryRequest, RecoveryWindow
from .scratch import RecoveredDatabase
from .wal_receiver import WalEvent

__all__ = [
    "BarmanRecovery",
    "BaseBackup",
    "BaseReport",
    "DirectoryRecovery",
    "DueBases",
    "PointInTime",
    "RecoveredDatabase",
    "Recovery",
    "RecoveryManager",
    "RecoveryRequest",
    "RecoveryWindow",
    "WalEvent",
]
