"""PostgreSQL's settings of tenants' roles, and the removal of those that a role has given itself.

A role may store settings of its own, ``ALTER ROLE CURRENT_USER SET ...``, also for one database; they stay after the
session. Before PostgreSQL 15 it may also make other roles its members. So whenever provisioning changes a role, it
compares the role's settings and members with the wanted ones, and replaces those that differ.

These settings bound well-behaved sessions: a tenant's own SQL may SET most of them to another value in its session. It
may not change ``temp_file_limit``; the watchdog bounds what the others do not.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import asyncpg

from ...cancellation import run_to_completion
from ...config.sections import ROLE_SETTINGS
from ...control.names import is_scratch, login_stem
from ...errors import ConfigurationError, TenancyError
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.failures import SERVER_FAILURES
from ...postgres.quoting import quote_identifier, quote_literal
from ..server_objects.blockers import Blockers
from ..server_objects.deadlines import timeout_before

logger = logging.getLogger("tenancy_orm.provisioning")

_BATCH = 100  # databases in one transaction
# the value of these is a list of names, which PostgreSQL stores quoted where necessary
_LISTS = frozenset({"search_path", "temp_tablespaces", "local_preload_libraries", "session_preload_libraries"})
_PART = re.compile(r'\s*"(?:[^"]|"")*"|[^,]+')
# the sources, in pg_settings, of values that apply to the whole server and not only to this session
_SERVER_WIDE = ("default", "configuration file", "command line", "environment variable")


@dataclass(frozen=True, slots=True)
class RoleSettings:
    """The settings that each tenant's role on one server must have.

    Args:
        values: Values by name, in lower case.
        refused: Names of configured settings that the administrator may not set.
        unknown: Names of configured settings that the server does not know.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def statements(self, role: str) -> list[str]:
        """The statements that set these for ``role``, which has no settings."""
        quoted = quote_identifier(role)
        return [f"ALTER ROLE {quoted} SET {assignment(name, value)}" for name, value in self.values.items()]

    def differs_from(self, found: CurrentSettings) -> bool:
        """Whether a role has other settings than these, settings for a database, or members."""
        own = {name: _plain(name, value) for name, value in found.settings.items() if name not in self.refused}
        wanted = {name: _plain(name, value) for name, value in self.values.items()}
        return own != wanted or bool(found.databases) or bool(found.memberships)

    def describe(self, found: CurrentSettings) -> tuple[str, bool]:
        """What of a role's settings and memberships differs from these, for people; and whether it is dangerous.

        Values are left out: a role may have written anything.
        """
        own = {name: _plain(name, value) for name, value in found.settings.items() if name not in self.refused}
        wanted = {name: _plain(name, value) for name, value in self.values.items()}
        names = sorted(name for name in own.keys() | wanted.keys() if own.get(name) != wanted.get(name))
        told = [f"settings of its role differ: {', '.join(names)}"] if names else []
        if found.databases:
            told.append(f"its role has settings for {len(found.databases)} databases")
        told += [f"role {member} is a member of role {granted}" for granted, member, _ in found.memberships]
        return "; ".join(told), bool(found.memberships)


@dataclass(slots=True)
class CurrentSettings:
    """One role's settings by name, the databases for which it has further settings, and its memberships.

    ``memberships`` are (role, member, grantor), without those of administrators.
    """

    settings: dict[str, str] = field(default_factory=dict)
    databases: list[str] = field(default_factory=list)
    memberships: list[tuple[str, str, str | None]] = field(default_factory=list)


_ASK = """
SELECT n AS name, s.name IS NOT NULL AS known, s.reset_val || coalesce(s.unit, '') AS value,
       s.source = ANY($2) AS server_wide, coalesce(s.context = 'user', false) OR r.rolsuper{granted} AS allowed
  FROM unnest($1::text[]) n LEFT JOIN pg_settings s ON lower(s.name) = n JOIN pg_roles r ON r.rolname = current_user
"""


async def resolve(connection: Connection, configured: Mapping[str, str | None]) -> RoleSettings:
    """Return the settings that roles on this server must have, by the defaults and the configuration.

    Args:
        connection: An administrative one.
        configured: ``TenancyConfig.provisioning.role_settings``.
    """
    given = {name.lower(): value for name, value in {**ROLE_SETTINGS, "work_mem": None, **configured}.items()}
    granted = " OR has_parameter_privilege(r.oid, n, 'SET')" if connections.version(connection) >= 15 else ""
    rows = await connection.fetch(_ASK.format(granted=granted), list(given), list(_SERVER_WIDE))
    about = {row["name"]: row for row in rows}
    own = {name.lower() for name in configured}
    if "work_mem" not in own and about["work_mem"]["server_wide"]:
        given["work_mem"] = about["work_mem"]["value"]
    # a name with a dot belongs to an extension, which need not be loaded in this session
    values = {name: value for name, value in given.items() if value and (about[name]["known"] or "." in name)}
    refused = tuple(name for name in values if not about[name]["allowed"])
    unknown = tuple(name for name in own if name not in values and given[name])
    return RoleSettings({name: values[name] for name in values if name not in refused}, refused, unknown)


async def warn(connection: Connection, server: str, settings: RoleSettings) -> None:
    """Log which settings tenants' roles on ``server`` do not get, and what a superuser can run."""
    for name in settings.unknown:
        logger.warning("server %s does not know the setting %s of provisioning.role_settings", server, name)
    if not settings.refused:
        return
    if connections.version(connection) < 15:
        logger.warning(
            "the administrator of server %s may not set %s for tenants' roles; before PostgreSQL 15 a superuser must",
            server,
            ", ".join(settings.refused),
        )
        return
    administrator = quote_identifier(await connection.fetchval("SELECT current_user::text"))
    logger.warning(
        "the administrator of server %s may not set %s for tenants' roles; run as a superuser: %s",
        server,
        ", ".join(settings.refused),
        "; ".join(f"GRANT SET ON PARAMETER {_name(name)} TO {administrator}" for name in settings.refused),
    )


_SETTINGS = """
SELECT r.rolname, d.datname, s.setdatabase, s.setconfig FROM pg_roles r
  LEFT JOIN pg_db_role_setting s ON s.setrole = r.oid LEFT JOIN pg_database d ON d.oid = s.setdatabase
 WHERE starts_with(r.rolname::text, $1)
"""
# From PostgreSQL 16 on, an administrator is a member of the roles that it created; it also joins a role to end sessions
_MEMBERSHIPS = """
SELECT r.rolname AS role, m.rolname AS member, g.rolname AS grantor
  FROM pg_auth_members a JOIN pg_roles r ON r.oid = a.roleid JOIN pg_roles m ON m.oid = a.member
  LEFT JOIN pg_roles g ON g.oid = a.grantor
 WHERE (starts_with(r.rolname::text, $1) OR starts_with(m.rolname::text, $1))
   AND NOT (m.rolsuper OR m.rolcreaterole OR m.rolname = current_user)
"""


async def read(connection: Connection, stem: str) -> dict[str, CurrentSettings]:
    """Return the current settings of every role with a name that begins with ``stem``, by name."""
    found: dict[str, CurrentSettings] = {}
    for name, database, database_id, config in await connection.fetch(_SETTINGS, stem):
        one = found.setdefault(name, CurrentSettings())
        if database is not None:
            one.databases.append(database)
        elif database_id == 0:
            one.settings.update((entry.partition("=")[0].lower(), entry.partition("=")[2]) for entry in config)
    for role, member, grantor in await connection.fetch(_MEMBERSHIPS, stem):
        if member.startswith(login_stem(role)) or is_scratch(member):
            continue  # a temporary login for this role, or what copies it: only administrators can create roles
        found[role if role in found else member].memberships.append((role, member, grantor))
    return found


async def restore(connection: Connection, blockers: Blockers, role: str, configured: Mapping[str, str | None]) -> bool:
    """Give a role the wanted settings and no others. Returns whether that changed anything.

    Open sessions keep their settings. If a transaction of the role blocks the change, its session is ended. A warning
    names a member that this administrator may not remove. The caller sets the deadline.

    Args:
        connection: An administrative one, which holds the tenant's lock.
        blockers: Of its server.
        role: The tenant's role.
        configured: ``TenancyConfig.provisioning.role_settings``.
    """
    settings = await resolve(connection, configured)
    found = (await read(connection, role)).get(role)
    if found is None or not settings.differs_from(found):
        return False
    await blockers.run(connection, partial(_correct, connection, role, found, settings), role=role)
    if (await read(connection, role)).get(role) == found:
        logger.info("role %s has settings or members from a superuser, which this administrator cannot remove", role)
        return False
    logger.warning("role %s had changed its own settings or members; they were restored", role)
    return True


async def try_restore(
    connection: Connection, blockers: Blockers, role: str, configured: Mapping[str, str | None], *, deadline: float
) -> None:
    """Call ``restore`` after another change has succeeded: a failure is logged and left to ``reconcile``.

    Args:
        connection: An administrative one, which holds the tenant's lock.
        blockers: Of its server.
        role: The tenant's role.
        configured: ``TenancyConfig.provisioning.role_settings``.
        deadline: When the caller must be done, by the clock of the event loop.
    """
    try:
        async with timeout_before(deadline):
            await restore(connection, blockers, role, configured)
    except (TenancyError, *SERVER_FAILURES) as exc:
        # class and SQLSTATE only: PostgreSQL's message would quote what the role has written
        logger.error(
            "the settings of role %s could not be restored (%s, %s); reconcile will repeat it",
            role,
            type(exc).__name__,
            getattr(exc, "sqlstate", None),
        )


async def verify(connection: Connection, server: str, settings: RoleSettings) -> None:
    """Try the settings on a role in a transaction that is rolled back.

    Raises:
        ConfigurationError: PostgreSQL refuses a value; the message names the setting.
    """
    role = f"tenancy_try_{secrets.token_hex(8)}"
    trial = connection.transaction()
    await trial.start()
    try:
        await connection.execute(f"CREATE ROLE {quote_identifier(role)}")
        for name, statement in zip(settings.values, settings.statements(role), strict=True):
            try:
                await connection.execute(statement)
            except (asyncpg.DataError, asyncpg.SyntaxOrAccessError) as exc:
                raise ConfigurationError(
                    f"provisioning.role_settings: server {server!r} refuses {settings.values[name]!r} for {name!r} "
                    f"(SQLSTATE {exc.sqlstate})"
                ) from exc
    finally:
        await run_to_completion(connections.finish(connection, trial.rollback))


async def _correct(connection: Connection, role: str, found: CurrentSettings, settings: RoleSettings) -> None:
    """Replace a role's settings and remove its members. RESET ALL keeps settings that only a superuser may set."""
    quoted = quote_identifier(role)
    names = sorted(found.databases)
    # One message is one transaction. A role can have settings for every existing database: batches make progress even
    # if this is interrupted.
    for first in range(0, len(names), _BATCH):
        own = (
            f"ALTER ROLE {quoted} IN DATABASE {quote_identifier(n)} RESET ALL" for n in names[first : first + _BATCH]
        )
        await connection.execute("; ".join(own))
    await connection.execute("; ".join([f"ALTER ROLE {quoted} RESET ALL", *settings.statements(role)]))
    revocations = _revocations(connection, found)
    for statement, (granted, member, _) in zip(revocations, found.memberships, strict=True):
        try:
            await connection.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            logger.warning("role %s is a member of role %s; run as a superuser: %s", member, granted, statement)


def corrections(connection: Connection, role: str, found: CurrentSettings, settings: RoleSettings) -> Iterator[str]:
    """The statements with which a superuser gives a role the wanted settings and removes its memberships."""
    quoted = quote_identifier(role)
    for name in found.databases:
        yield f"ALTER ROLE {quoted} IN DATABASE {quote_identifier(name)} RESET ALL"
    own, wanted = (
        {name: _plain(name, value) for name, value in values.items()} for values in (found.settings, settings.values)
    )
    if any(own.get(name) != wanted.get(name) for name in own.keys() | wanted.keys() if name not in settings.refused):
        yield f"ALTER ROLE {quoted} RESET ALL"
        yield from settings.statements(role)
    yield from _revocations(connection, found)


def _revocations(connection: Connection, found: CurrentSettings) -> list[str]:
    statements = []
    for granted, member, grantor in found.memberships:
        statement = f"REVOKE {quote_identifier(granted)} FROM {quote_identifier(member)}"
        if grantor is not None and connections.version(connection) >= 16:
            # from 16 on, a membership exists once for each grantor
            statement += f" GRANTED BY {quote_identifier(grantor)} CASCADE"
        statements.append(statement)
    return statements


def assignment(name: str, value: str) -> str:
    """Return what follows SET in ALTER ROLE and ALTER DATABASE.

    Args:
        name: The setting's name.
        value: Its value, as configured or as PostgreSQL stores it.
    """
    return f"{_name(name)} TO {_value(name, value)}"


def _name(name: str) -> str:
    return ".".join(quote_identifier(part) for part in name.split("."))


def _value(name: str, value: str) -> str:
    return ", ".join(quote_literal(part) for part in _plain(name, value))


def _plain(name: str, value: str) -> tuple[str, ...]:
    """The value in a form to compare: in a list, PostgreSQL stores names quoted where necessary."""
    if name not in _LISTS:
        return (value,)
    parts = [part.strip() for part in _PART.findall(value)] or [""]
    return tuple(part[1:-1].replace('""', '"') if part.startswith('"') else part for part in parts)
