"""The account that a recovered server runs as: PostgreSQL refuses to run as root."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Account:
    """An account of this machine; ``uid`` 0 stands for the one that this process has."""

    uid: int = 0
    gid: int = 0

    def take(self, path: Path) -> None:
        """Give a file or a directory, with all that is in it, to the account; links are not followed."""
        if not self.uid:
            return
        os.lchown(path, self.uid, self.gid)
        for directory, names, files in os.walk(path):
            for name in (*names, *files):
                os.lchown(Path(directory, name), self.uid, self.gid)


def choose_account(name: str) -> Account:
    """Return the account for a recovered server: this process's own, or the named one where this process is root's.

    Raises:
        ConfigurationError: this process is root's, and there is no such account.
    """
    if os.geteuid() != 0:
        return Account()
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        entry = None
    if entry is None or entry.pw_uid == 0:
        raise ConfigurationError(
            f"PostgreSQL does not run as root, and there is no account {name!r} for a recovered server: run this as "
            "another account, or name one in recovery.account"
        )
    return Account(entry.pw_uid, entry.pw_gid)


__all__ = ["Account", "choose_account"]
