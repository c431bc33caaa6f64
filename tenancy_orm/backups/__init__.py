"""Backups: encrypted copies of tenants' databases, and of the control database, in a store."""

from .keys import BackupKey, BackupKeys
from .manager import BackupManager, BackupReport, BackupServices, OpenBackup
from .manifest import BackupExtension, BackupFile, Manifest
from .records import Backup, BackupState
from .stores import DirectoryStore, ObjectStore, Store, StoredObject, open_store

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
    "DirectoryStore",
    "Manifest",
    "ObjectStore",
    "OpenBackup",
    "Store",
    "StoredObject",
    "open_store",
]
