"""The section ``recovery`` of ``TenancyConfig``: how servers are recovered at a point in time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final

from pydantic import Field, PlainValidator, WithJsonSchema, field_validator

from .validation import Section
from .values import SETTING_NAME, Count, DirectoryPath, Pairs, Seconds, SecondsOrZero, load_object

_DIRECTORY: Final = "directory:"
_BARMAN: Final = re.compile(r"barman(:(?P<name>[^:]+))?")


def _read_provider(value: object) -> object:
    if isinstance(value, str):
        if value.startswith(_DIRECTORY):
            if not value.removeprefix(_DIRECTORY).startswith("/"):
                raise ValueError("must name an absolute directory: directory:/var/backups/recovery")
            return value
        if _BARMAN.fullmatch(value):
            return value
        value = load_object(value)
    if value is not None and not all(callable(getattr(value, name, None)) for name in ("recover", "check", "window")):
        raise ValueError("must be directory:/path, barman, barman:NAME, or an object with recover, check and window")
    return value


RecoveryProvider = Annotated[Any, PlainValidator(_read_provider), WithJsonSchema({"type": "string"})]


class RecoveryConfig(Section, frozen=True):
    """Servers that are recovered at a point in time, so that one tenant can be taken out of them."""

    provider: RecoveryProvider = Field(default=None, exclude=True)
    """Where servers are recovered from: ``directory:/var/backups/recovery``, which ``tenancy backup base`` and
    ``tenancy backup wal`` fill; ``barman``, or ``barman:main-{server}`` where Barman has other names for the servers;
    or an object with the methods of ``Recovery``, as text ``module:attribute``."""
    keep_seconds: Seconds = 7 * 86_400.0
    """For how long times can be recovered: ``tenancy backup base`` deletes the base backups and the WAL that no time of
    these last seconds needs."""
    base_seconds: SecondsOrZero = 0.0
    """How often ``tenancy worker`` takes a base backup of each server that ``tenancy backup wal`` receives, in seconds;
    0 is never. Set it where the worker runs on the machine that has the directory, as an account that may write
    there."""
    heartbeat_seconds: Seconds = 30.0
    """How often ``tenancy backup wal`` ends an empty transaction on the server, by which a recovery knows how far the
    WAL reaches, and looks whether any is missing, in seconds."""
    directory: DirectoryPath | None = None
    """Where the files of a recovered server are while one tenant is taken out of it: as much space as the whole server
    takes. The system's temporary directory where None."""
    max_bytes: Count = 200 * 1024**3
    """How much space one recovered server may take, in bytes."""
    account: str = "postgres"
    """The account that a recovered server runs as where this process is root's, as which PostgreSQL does not run."""
    settings: Pairs = Field(default_factory=lambda: MappingProxyType({}))
    """Settings of PostgreSQL for recovered servers, ``shared_buffers`` or ``shared_preload_libraries`` for example. As
    text: ``name=value``, separated by semicolons."""
    barman_command: str = "barman"
    """The program of Barman, with arguments that come first: ``sudo -u barman barman``."""

    @field_validator("settings", mode="after")
    @classmethod
    def _check_settings(cls, settings: Mapping[str, str]) -> Mapping[str, str]:
        for name, value in settings.items():
            if not SETTING_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a setting of PostgreSQL")
            if type(value) is not str or any(sign in value for sign in "\x00\n\r"):
                raise ValueError(f"the value of {name!r} must be text of one line")
            if name.lower() in _FIXED or name.lower().startswith(("recovery_", "archive_", "ssl")):
                raise ValueError(f"{name!r} is not a setting that a recovered server can have another value of")
        return settings

    @property
    def base_directory(self) -> str | None:
        """The directory of base backups and WAL; None where another provider has them."""
        given = self.provider
        return given.removeprefix(_DIRECTORY) if isinstance(given, str) and given.startswith(_DIRECTORY) else None

    @property
    def barman_name(self) -> str | None:
        """Barman's name of a server, where ``{server}`` stands for the server's own; None with another provider."""
        found = _BARMAN.fullmatch(self.provider) if isinstance(self.provider, str) else None
        return None if found is None else found["name"] or "{server}"


# what keeps a recovered server to itself, and its logins to one database each
_FIXED: Final = frozenset(
    {
        *("config_file", "data_directory", "external_pid_file", "hba_file", "ident_file", "include", "include_dir"),
        *("include_if_exists", "listen_addresses", "port", "restore_command", "unix_socket_directories"),
        *("unix_socket_permissions", "max_logical_replication_workers", "primary_conninfo", "hot_standby"),
    }
)

__all__ = ["RecoveryConfig", "RecoveryProvider"]
