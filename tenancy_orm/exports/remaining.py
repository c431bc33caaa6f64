"""What remains of a purged tenant, as a certificate of its erasure says: where, until when, and who can read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from ..backups.keys import BackupKey
from ..config import TenancyConfig
from .certificates import Remaining

_USAGE_DAYS = 400  # after that long, housekeeping removes usage records that were sent
_MONTH = timedelta(days=31)  # audit entries are removed by months


def lost_database(database: Mapping[str, Any]) -> Remaining:
    """Return what is said of a database on a server that was lost for good."""
    return Remaining(
        what=f"database {database['database']} on server {database['server']}",
        is_readable=True,
        until=None,
        note="not dropped: an operator declared the server lost",
    )


def copy_of(row: Any) -> Remaining:
    """Return what is said of a tenant that was made of a copy."""
    return Remaining(
        what=f"tenant {row.slug!r}, which was made of a copy of its database",
        is_readable=True,
        until=row.expires_at,
        note="delete and purge it as well" + ("" if row.expires_at is None else "; it is purged once it has expired"),
    )


def interrupted_reading(row: Any) -> Remaining:
    """Return what is said of a process that was killed while it had a backup decrypted."""
    return Remaining(
        what=f"what a process on {row.host} may have left of backup {row.id}, decrypted, when it was killed",
        is_readable=True,
        until=None,
        note="housekeeping removes the files on that machine, and scratch databases on the servers",
    )


def copies_elsewhere(
    config: TenancyConfig, purged_at: datetime, keys: Sequence[BackupKey], *, backups: int
) -> Iterator[Remaining]:
    """Yield what is said of backups: its own, and those of servers and of the control database.

    Args:
        config: How long they are kept.
        purged_at: When its rows were gone.
        keys: The keys of its backups, which are destroyed.
        backups: How many of its backups are in stores still.
    """
    erasure = config.erasure
    if backups:
        yield Remaining(
            what=f"{backups} encrypted backups of its database in this installation's stores, and their copies",
            is_readable=False,
            until=None,
            note="their keys are destroyed in the control database and in the stores, and remain, sealed, where it is "
            "said below; those in the stores are removed when backups are pruned next",
        )
    yield Remaining(
        what="base backups and WAL of its whole server",
        is_readable=True,
        until=_after(purged_at, erasure.server_backup_seconds),
        note="they have the pages of all tenants' databases, as servers have that are recovered from them, and end "
        f"with their own retention{_own_bases(config)}"
        + _unknown(erasure.server_backup_seconds, "erasure.server_backup_seconds"),
    )
    destroyed_at = max((key.destroyed_at for key in keys if key.destroyed_at is not None), default=purged_at)
    sealed = (
        ", and its sealed keys: who has these and the installation's encryption keys can read copies of its encrypted "
        "backups"
    )
    yield Remaining(
        what="base backups and WAL of the control database's server, and dumps of it by other means",
        is_readable=True,
        until=_after(max(purged_at, destroyed_at), erasure.control_server_backup_seconds),
        note=f"they have its name, metadata and audit entries{sealed if keys else ''}"
        + _unknown(erasure.control_server_backup_seconds, "erasure.control_server_backup_seconds"),
    )
    yield Remaining(
        what="backups of the control database",
        is_readable=True,
        until=_after(purged_at, erasure.control_backup_seconds),
        note="those that this package makes have its name, metadata and audit entries, and neither rows of its "
        "database nor a key of its backups"
        + _unknown(erasure.control_backup_seconds, "erasure.control_backup_seconds"),
    )


def records(config: TenancyConfig, purged_at: datetime, usage: Any) -> Iterator[Remaining]:
    """Yield what is said of the control database's own records.

    Args:
        config: How long they are kept.
        purged_at: When it was purged.
        usage: The number of its usage records, of those that are not sent, and when the last one was sent.
    """
    audit_seconds = config.retention.audit_seconds
    yield Remaining(
        what="audit entries",
        is_readable=True,
        until=purged_at + timedelta(seconds=audit_seconds) + _MONTH if audit_seconds else None,
        note="who did what to the tenant, with the metadata of then, without rows of its database"
        + ("" if audit_seconds else "; they are kept for ever (retention.audit_seconds is 0)"),
    )
    yield Remaining(
        what="records of its operations, backups and migrations",
        is_readable=True,
        until=None,
        note="times, names of tables, numbers of rows, and messages of errors, which may quote a value",
    )
    yield Remaining(
        what="the tombstone: its id, slug and times",
        is_readable=True,
        until=None,
        note="kept for ever, so that no old backup brings the tenant back",
    )
    if usage.count:
        note = f"{usage.unsent} are not sent yet; each is kept {_USAGE_DAYS} days after that"
        yield Remaining(
            what=f"{usage.count} usage records for billing",
            is_readable=True,
            until=None if usage.unsent else usage.sent_at + timedelta(days=_USAGE_DAYS),
            note=note if usage.unsent else "amounts by period",
        )


def _own_bases(config: TenancyConfig) -> str:
    if config.recovery.base_directory is None:
        return ""
    return "; those that this package keeps go once a later one is as old as recovery.keep_seconds, and not before"


def _after(moment: datetime, seconds: float | None) -> datetime | None:
    return None if seconds is None else moment + timedelta(seconds=seconds)


def _unknown(seconds: float | None, setting: str) -> str:
    return "" if seconds is not None else f"; how long they are kept is not known here ({setting} is not set)"


__all__ = ["copies_elsewhere", "copy_of", "interrupted_reading", "lost_database", "records"]
