"""The two logins of a copy: one that reads a tenant's database, and one that owns what is restored from it.

A dump is text that its source has influenced: restoring it runs functions of the tenant's choice, in CHECK constraints
and indexes for example. So neither login is the administrator, and neither can do more than its work:

- The *reader* is a member of the owner of tenants' databases, and of the tenant's role if that owns something. What it
  runs is one read-only transaction.
- The *restorer* may connect to the copy alone, and owns everything in it. It is a member of no role, and may neither
  grant others the right to connect, nor change another database.

Both have random passwords and an expiry. Their names are those of short-lived databases, so ``reconcile`` drops those
that a killed process leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from types import MappingProxyType

import asyncpg

from ...context import refuse_while_bound
from ...control.names import Names
from ...errors import ProvisioningError
from ...postgres import connections, login
from ...postgres.connections import Connection
from ...postgres.dsn import Dsn
from ...postgres.quoting import quote_identifier, quote_literal
from ...secrets.keyring import new_password
from ...tenant import Placement
from ..server_objects import roles
from ..server_objects.blockers import Blockers
from ..server_objects.scram import scram_verifier

# 'o' is SHARED_DEPENDENCY_OWNER
_OWNS = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_shdepend s JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
  WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass AND s.deptype = 'o' AND r.rolname = $1
    AND s.dbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = $2))
"""
UNBOUNDED = {"statement_timeout": "0", "idle_in_transaction_session_timeout": "0"}
"""Settings of a session for statements that may take long."""

HIDES_ROWS = (
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.relrowsecurity AND c.relforcerowsecurity "
    "AND c.relkind IN ('r', 'p') AND c.relpersistence <> 't')"
)
"""Whether row security of a table in the database holds for its owner as well: a reader needs ``see_all_rows``."""
_ATTRIBUTES = "LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE INHERIT NOREPLICATION NOBYPASSRLS"
_CONNECTIONS = 8
_EXPIRES_AT = "SELECT clock_timestamp() + make_interval(secs => $1)"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLogin:
    """A login to one database, for a limited time. Its password is stored nowhere else."""

    role: str
    database: str
    password: str = field(repr=False)
    dsn: Dsn = field(repr=False)

    async def connect(
        self, *, timeout: float, settings: Mapping[str, str] = MappingProxyType({}), purpose: str = "tenancy-copy"
    ) -> Connection:
        """Open a connection; the caller closes it.

        Raises:
            asyncpg.PostgresError, asyncpg.InterfaceError, OSError: the server refuses, or does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("logging in to a tenant's whole database")
        return await login.connect(
            self.dsn,
            purpose=purpose,
            timeout=timeout,
            settings=settings,
            password=self.password,
            user=self.role,
            database=self.database,
        )

    def environment(self) -> dict[str, str]:
        """Return libpq's variables for a program, the password included."""
        login.check(self.dsn, user=self.role, database=self.database)
        found = self.dsn.environment(user=self.role, database=self.database, purpose="tenancy-copy")
        return {**found, "PGPASSWORD": self.password}


async def create_login(
    connection: Connection, dsn: Dsn, role: str, database: str, *, seconds: float, member_of: Sequence[str] = ()
) -> CopyLogin:
    """Create a login.

    Args:
        connection: An administrative one.
        dsn: The administrator's, of the same server; the login's programs get none of its credentials.
        role: Its name, which is new.
        database: Where it connects to.
        seconds: For how long its password is valid.
        member_of: The roles that it has the rights of.
    """
    password = new_password()
    expires_at: datetime = await connection.fetchval(_EXPIRES_AT, float(seconds))
    options = " WITH INHERIT TRUE, SET FALSE, ADMIN FALSE" if connections.version(connection) >= 16 else ""
    name = quote_identifier(role)
    secret = quote_literal(scram_verifier(password))
    statements = [
        f"CREATE ROLE {name} {_ATTRIBUTES} CONNECTION LIMIT {_CONNECTIONS}",
        f"ALTER ROLE {name} PASSWORD {secret} VALID UNTIL {quote_literal(expires_at.isoformat())}",
        *(f"GRANT {quote_identifier(granted)} TO {name}{options}" for granted in member_of),
    ]
    await connection.execute("; ".join(statements))
    return CopyLogin(role=role, database=database, password=password, dsn=dsn.without_service())


async def extend_login(connection: Connection, role: str, *, seconds: float) -> None:
    """Let a login's password be valid for so many seconds from now.

    Args:
        connection: An administrative one.
        role: Its name.
        seconds: For how long.
    """
    expires_at: datetime = await connection.fetchval(_EXPIRES_AT, float(seconds))
    await connection.execute(f"ALTER ROLE {quote_identifier(role)} VALID UNTIL {quote_literal(expires_at.isoformat())}")


async def create_reader(
    connection: Connection, dsn: Dsn, names: Names, role: str, place: Placement, *, seconds: float
) -> CopyLogin:
    """Create the login that reads a tenant's database: as the owner, and as the tenant's role if that owns something.

    Args:
        connection: An administrative one.
        dsn: The administrator's, of the same server.
        names: Of this installation.
        role: The login's name, which is new.
        place: Where the tenant's data is.
        seconds: For how long its password is valid.
    """
    owns = await connection.fetchval(_OWNS, place.role, place.database)
    member_of = [names.owner, *([place.role] if owns else [])]
    return await create_login(connection, dsn, role, place.database, seconds=seconds, member_of=member_of)


async def see_all_rows(connection: Connection, role: str) -> None:
    """Let a login read rows that row security hides from owners as well (FORCE ROW LEVEL SECURITY).

    Args:
        connection: An administrative one.
        role: The login's name.

    Raises:
        ProvisioningError: the administrator may not do that.
    """
    try:
        await connection.execute(f"ALTER ROLE {quote_identifier(role)} BYPASSRLS")
    except asyncpg.InsufficientPrivilegeError as exc:
        raise ProvisioningError(
            "a table has FORCE ROW LEVEL SECURITY, and the administrator may let nobody read all of its rows; run "
            "as a superuser: ALTER ROLE the_administrator BYPASSRLS",
            step="reader",
        ) from exc


async def end_login(connection: Connection, blockers: Blockers, role: str) -> None:
    """End a login and its sessions; ``reconcile`` and whoever made it drop it then. Does nothing if there is none.

    Raises:
        TimeoutError: its sessions did not end in time.
    """
    if await roles.exists(connection, role):
        await blockers.run(connection, partial(roles.expire, connection, role))
        await roles.terminate(connection, role, timeout=connections.CLOSE_SECONDS)
