"""Backups: encrypted copies of tenants' databases, and of the control database, in a store."""

from .drill import DrillReport
from .keys import BackupKey, BackupKeys, ResealedKeys
from .making import BackupServices
from .manager import BackupManager, BackupReport
from .manifest import BackupExtension, BackupFile, Manifest
from .opening import OpenBackup
from .pruning import PruneReport
from .records import Backup, BackupState
from .recovering import PassedOver, RecoveredControl, recover_control
from .scanning import ScanReport
from .status import BackupStatus
from .stores import DirectoryStore, ObjectStore, Store, StoredObject, Stores, open_store
from .verification import Verification

__all__ = [
    "Backup",
    "BackupExtension",
    "BackupFile",
    "BackupKey",
    "BackupKeys",
    "BackupManager",
    "BackupReport",
    "BackupServices",
    "BackupState",
    "BackupStatus",
    "DirectoryStore",
    "DrillReport",
    "Manifest",
    "ObjectStore",
    "OpenBackup",
    "PassedOver",
    "PruneReport",
    "RecoveredControl",
    "ResealedKeys",
    "ScanReport",
    "Store",
    "StoredObject",
    "Stores",
    "Verification",
    "open_store",
    "recover_control",
]
