"""What a tenant's role may do in its database: the one list that creation grants from and reconcile compares with.

The rights are the role's own and not a group's, so another tenant's role has none here even if it could connect. On a
table the role gets SELECT, INSERT, UPDATE and DELETE, but not TRUNCATE, REFERENCES and TRIGGER. On a sequence it gets
all rights, since loading rows sets it. It may read Alembic's version table and protected reference tables, and not
write them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import asyncpg

from ...config import TenancyConfig
from ...errors import ConfigurationError, ProvisioningError
from ...postgres.connections import Connection, version
from ...postgres.errors import describe
from ...postgres.quoting import quote_identifier
from ...protocols import GrantHook, GrantTarget
from ..server_objects import advisory_locks

_ROWS = ("SELECT", "INSERT", "UPDATE", "DELETE")
_COUNTERS = ("USAGE", "SELECT", "UPDATE")
_FIRST_WITH_MAINTAIN = 17

# statements that control the transaction, after any comments
_CONTROL = re.compile(
    r"(\s|--[^\n]*(\n|$)|/\*.*?\*/)*(BEGIN|START|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE|PREPARE)\b",
    re.IGNORECASE | re.DOTALL,
)

RECORD_SCHEMA = "tenancy_orm"
"""The schema, in a tenant's database, of the records of seeds and reference data."""

REFERENCE_RECORD = (RECORD_SCHEMA, "reference_data")

_PART = re.compile(r'"((?:[^"]|"")+)"|([^."]+)')

DEFAULTS = {"SCHEMAS": "n", "TABLES": "r", "SEQUENCES": "S"}
"""Kinds of objects with default privileges, as GRANT names them and as ``pg_default_acl`` does."""


@dataclass(frozen=True, slots=True)
class Contents:
    """The owner's schemas, tables, sequences and version tables in a database, quoted for a GRANT."""

    schemas: tuple[str, ...]
    tables: tuple[str, ...]
    sequences: tuple[str, ...]
    version_tables: tuple[str, ...]


class Right(NamedTuple):
    """One right on one object. ``kind`` is GRANT's word; a kind of ``DEFAULTS`` is a default privilege of the owner."""

    kind: str
    name: str
    privilege: str


@dataclass(frozen=True, slots=True)
class TenantRights:
    """What each tenant's role may do, by the configuration.

    Args:
        owner: The role that owns the database and grants these rights.
        privileges: ``provisioning.tenant_privileges``.
        advisory_locks: ``provisioning.tenant_advisory_locks``.
        hook: ``provisioning.grants``.
        read_only: Schemas and names of the tables that the role may only read, unquoted.
    """

    owner: str
    privileges: tuple[str, ...] = ()
    advisory_locks: bool = False
    hook: GrantHook | None = None
    read_only: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def of(cls, config: TenancyConfig, owner: str) -> TenantRights:
        """The rights that this configuration gives."""
        given = config.provisioning
        read_only = (table.place for table in config.reference.values() if table.protected)
        return cls(owner, given.tenant_privileges, given.tenant_advisory_locks, given.grants, frozenset(read_only))

    def check_version(self, server: str, server_version: int) -> None:
        """Refuse a privilege that the server does not have.

        Raises:
            ConfigurationError: it does not.
        """
        if "MAINTAIN" in self.privileges and server_version < _FIRST_WITH_MAINTAIN:
            raise ConfigurationError(
                f"provisioning.tenant_privileges: MAINTAIN needs PostgreSQL 17, and server {server!r} runs "
                f"{server_version}; let a SECURITY DEFINER function refresh materialized views there, "
                "as in Refresh a materialized view before PostgreSQL 17 in the documentation of provisioning"
            )

    def wanted(self, what: Contents, database: str) -> Iterator[Right]:
        """Every right that the role must have in a database with these contents, besides CONNECT.

        Args:
            what: The database's contents.
            database: Its name.
        """
        tables = (*_ROWS, *(name for name in self.privileges if name != "TEMPORARY"))
        if "TEMPORARY" in self.privileges:
            yield Right("DATABASE", quote_identifier(database), "TEMPORARY")
        yield from _each("SCHEMAS", ("",), ("USAGE",))
        yield from _each("TABLES", ("",), tables)
        yield from _each("SEQUENCES", ("",), _COUNTERS)
        yield from _each("SCHEMA", what.schemas, ("USAGE",))
        read_only = [table for table in what.tables if self.is_read_only(table)]
        yield from _each("TABLE", [table for table in what.tables if table not in read_only], tables)
        yield from _each("TABLE", read_only, ("SELECT",))
        yield from _each("SEQUENCE", what.sequences, _COUNTERS)
        yield from _each("TABLE", what.version_tables, ("SELECT",))
        if self.advisory_locks:
            yield from _each("FUNCTION", advisory_locks.FUNCTIONS, ("EXECUTE",))

    def is_read_only(self, quoted: str) -> bool:
        """Whether the role may only read this table, which is given as ``schema.table``, both quoted."""
        if not self.read_only and not quoted.startswith(RECORD_SCHEMA):
            return False
        schema, table = ((part[0] or part[1]).replace('""', '"') for part in _PART.findall(quoted))
        return (schema, table) == REFERENCE_RECORD or (schema, table) in self.read_only

    async def run_hook(self, connection: Connection, database: str, role: str) -> None:
        """Run the statements of the grant hook, if there is one, in the open transaction of ``connection``.

        Args:
            connection: To the tenant's database, as the owner.
            database: The tenant's database.
            role: The tenant's role.

        Raises:
            ProvisioningError: a statement failed, and the message has it; or the role is not the owner any more.
        """
        for statement in self.hook_statements(database, role, version(connection)):
            try:
                # prepared, so that it is one statement
                await connection.fetch(statement)
            except asyncpg.PostgresError as exc:
                raise ProvisioningError(
                    f"provisioning.grants: {statement!r} failed in database {database!r}: {describe(exc)}",
                    step="grants",
                ) from exc
        # the session is the administrator's: SET ROLE NONE gives its rights to the statements that follow
        if self.hook is not None and await connection.fetchval("SELECT current_user::text") != self.owner:
            raise ProvisioningError(
                "provisioning.grants changes the role that its statements run as, which is the owner: leave that out",
                step="grants",
            )

    def hook_statements(self, database: str, role: str, server_version: int) -> list[str]:
        """The statements of the grant hook for one tenant.

        Raises:
            ProvisioningError: the hook failed, or returned something else than text.
        """
        if self.hook is None:
            return []
        database, role, owner = (quote_identifier(name) for name in (database, role, self.owner))
        try:
            found = self.hook(GrantTarget(database, role, owner, server_version))
            statements = [found] if isinstance(found, str) else list(found)
        except Exception as exc:
            raise ProvisioningError(f"provisioning.grants failed: {describe(exc)}", step="grants") from exc
        if not all(isinstance(statement, str) for statement in statements):
            raise ProvisioningError("provisioning.grants must return SQL statements, each as text", step="grants")
        if refused := [statement for statement in statements if _CONTROL.match(statement)]:
            raise ProvisioningError(
                f"provisioning.grants: {refused[0]!r} would end the transaction of all statements; leave it out",
                step="grants",
            )
        return statements


def grant_statements(rights: Iterable[Right], role: str, *, owner: str | None = None) -> list[str]:
    """The statements that grant these rights to ``role``, few for many objects.

    Args:
        rights: The rights.
        role: Who gets them.
        owner: The owner of the objects, if the statements do not run as the owner.
    """
    privileges: dict[tuple[str, str], list[str]] = {}
    for right in rights:
        privileges.setdefault((right.kind, right.name), []).append(right.privilege)
    objects: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (kind, name), found in privileges.items():
        objects.setdefault((kind, tuple(found)), []).append(name)
    grantee = f"TO {quote_identifier(role)}"
    defaults = "ALTER DEFAULT PRIVILEGES " + (f"FOR ROLE {quote_identifier(owner)} " if owner else "")
    return [
        f"{defaults}GRANT {', '.join(found)} ON {kind} {grantee}"
        if kind in DEFAULTS
        else f"GRANT {', '.join(found)} ON {kind} {', '.join(names)} {grantee}"
        for (kind, found), names in objects.items()
    ]


def _each(kind: str, names: Sequence[str], privileges: Sequence[str]) -> Iterator[Right]:
    return (Right(kind, name, privilege) for name in names for privilege in privileges)
