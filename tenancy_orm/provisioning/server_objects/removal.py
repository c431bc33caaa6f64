"""Removal of a tenant's database and role, which other tenants cannot prevent.

The data is removed first, then the role. A role that has rights elsewhere cannot be dropped (2BP01), and every tenant
can grant something in its own database to another tenant's role. So the role is retired: it gets a name that is no
tenant's, and loses its login, password and memberships. Then its rights are revoked in every database, and it is
dropped. If that fails, for example because of a database that the administrator cannot connect to, the retired role
stays for ``reconcile``; the tenant is purged all the same.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from functools import partial
from uuid import UUID

import asyncpg

from ...audit.actor import Actor
from ...control.names import Names, login_stem
from ...errors import ProvisioningError, TenancyError
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.failures import SERVER_FAILURES
from ...postgres.quoting import quote_identifier, quote_literal
from ...registry.registry import Registry
from ...tenant import Placement
from . import access, databases, roles
from .blockers import Blockers, PreparedTransaction

logger = logging.getLogger("tenancy_orm.provisioning")

_ATTEMPTS = 3
_RETIRED_SECONDS = 5.0  # how long a purge tries to drop a retired role
_MARGIN_SECONDS = 1.0  # ... and how long before its deadline it stops trying
_BATCH = 2000  # large objects in one transaction

_PREPARED = "SELECT gid, owner::text AS role, database::text AS database FROM pg_prepared_xacts WHERE database = $1"
_SUBSCRIPTIONS = """
SELECT subname::text FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid
 WHERE d.datname = $1 AND starts_with(subname::text, $2)
"""
_STREAMING = """
SELECT DISTINCT a.usename::text FROM pg_replication_slots s JOIN pg_stat_activity a ON a.pid = s.active_pid
 WHERE s.database = $1 AND starts_with(s.slot_name::text, $2) AND a.usename IS NOT NULL
"""
# The databases that name a role, and whether it owns something there. 'o' is SHARED_DEPENDENCY_OWNER. Rights on shared
# objects (to connect to a database, for example) can be revoked in any database; here they have no database.
_REFERENCES = """
SELECT d.datname::text AS database, bool_or(s.deptype = 'o') AS owns
FROM pg_shdepend s
JOIN pg_roles r ON s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid
LEFT JOIN pg_database d ON d.oid = s.dbid
WHERE r.rolname = $1
GROUP BY 1
ORDER BY 1 NULLS LAST
"""
# 'a' is SHARED_DEPENDENCY_ACL
_LARGE_OBJECTS = """
SELECT s.objid FROM pg_shdepend s
JOIN pg_roles r ON s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid
JOIN pg_database d ON d.oid = s.dbid
WHERE r.rolname = $1 AND d.datname = current_database() AND s.classid = 'pg_largeobject'::regclass
  AND s.deptype = 'a' AND s.objid > $2::oid
ORDER BY 1 LIMIT $3
"""
# of a database, those who own something in it
_OWNERS = """
SELECT DISTINCT r.rolname::text FROM pg_shdepend s
JOIN pg_roles r ON s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid
JOIN pg_database d ON d.oid = s.dbid WHERE s.deptype = 'o' AND d.datname = current_database()
"""
_MEMBERSHIPS = """
SELECT g.rolname::text AS granted, m.rolname::text AS member
FROM pg_auth_members a JOIN pg_roles g ON g.oid = a.roleid JOIN pg_roles m ON m.oid = a.member
WHERE m.rolname = $1 OR (g.rolname = $1 AND m.rolname <> current_user)
"""


async def remove_data(connection: Connection, blockers: Blockers, *, database: str, role: str, deadline: float) -> None:
    """Block the logins of a tenant's role, and drop its database. Does nothing if they are gone.

    Raises:
        TimeoutError: the logins could not be blocked by the deadline.
        ProvisioningError: the database cannot be dropped, see ``drop_database``.
    """
    if await roles.exists(connection, role):
        await access.block(connection, blockers, database=database, role=role, deadline=deadline)
    await drop_database(connection, blockers, database)


async def purge(
    connection: Connection,
    blockers: Blockers,
    names: Names,
    registry: Registry,
    tenant_id: UUID,
    placement: Placement,
    *,
    deadline: float,
    actor: Actor,
) -> None:
    """Purge a tenant for which the registry has begun a purge: data, secrets, role, and its row but for a tombstone.

    To finish an interrupted purge, repeat it.

    Raises:
        TimeoutError, ProvisioningError: see ``remove_data``.
    """
    database, role = placement.database, placement.role
    await remove_data(connection, blockers, database=database, role=role, deadline=deadline)
    await registry.erase_secrets(tenant_id)
    retired = await _drop_or_retire(connection, blockers, names, role)
    await registry.finish_purge(tenant_id, actor=actor)
    if retired is not None:
        # the purge is done: the rest must not pass the deadline, or the purge would look failed
        left = deadline - asyncio.get_running_loop().time() - _MARGIN_SECONDS
        await _try_to_drop(connection, blockers, names, retired, was=role, seconds=left)


async def remove(
    connection: Connection, blockers: Blockers, names: Names, *, database: str, role: str, deadline: float
) -> None:
    """Remove what is left of a tenant's database and role; logins are blocked first.

    Raises:
        TimeoutError, ProvisioningError: see ``remove_data``.
    """
    await remove_data(connection, blockers, database=database, role=role, deadline=deadline)
    await remove_role(connection, blockers, names, role)


async def is_foreign(connection: Connection, name: str, *markers: str) -> bool:
    """Whether a database has another marker than these, and so a tenant's data that must not be dropped.

    After an older backup of the control database was restored, the row of a warm database may name one that a creation
    has claimed since.

    Args:
        connection: An administrative one, to any database of the server.
        name: The database. One that does not exist, or has no marker, is nobody's.
        markers: Those of whoever would drop it.
    """
    state = await databases.state(connection, name)
    if state is None or state.comment is None or state.comment in markers:
        return False
    logger.error("database %s has the marker of another tenant than the control database says; it is kept", name)
    return True


# --- databases ------------------------------------------------------------------------------------------------------


async def drop_database(connection: Connection, blockers: Blockers, name: str) -> None:
    """Drop a database, end its blockers, and roll back the prepared transactions of tenants and the owner in it.

    Raises:
        ProvisioningError: it has somebody else's prepared transaction, an active replication slot or a subscription
            (55006); the message has the statements that remove them.
    """
    drop = partial(databases.drop, connection, name)
    try:
        await blockers.run(connection, drop)
    except asyncpg.ObjectInUseError:
        for found in await connection.fetch(_PREPARED, name):
            if blockers.may_end(found["role"]):
                await blockers.roll_back(PreparedTransaction(**found))
        await _end_streams(connection, blockers, name)
        try:
            await blockers.run(connection, drop)
        except asyncpg.ObjectInUseError as exc:
            remedies = "; ".join(await _remedies(connection, name))
            raise ProvisioningError(
                f"database {name!r} is in use and cannot be dropped" + (f"; run: {remedies}" if remedies else "")
            ) from exc


async def _end_streams(connection: Connection, blockers: Blockers, name: str) -> None:
    """End what replicates a database for a move: its subscriptions, and who uses its slots, which are dropped with it.

    The slots of its subscriptions, on other servers, are left to housekeeping.
    """
    for (subscription,) in await connection.fetch(_SUBSCRIPTIONS, name, blockers.stream_stem):
        quoted = quote_identifier(subscription)
        inside = await blockers.connect(name)
        try:
            for statement in ("DISABLE", "SET (slot_name = NONE)"):
                await inside.execute(f"ALTER SUBSCRIPTION {quoted} {statement}")
            await inside.execute(f"DROP SUBSCRIPTION {quoted}")
        finally:
            await connections.close(inside)
    for (login,) in await connection.fetch(_STREAMING, name, blockers.stream_stem):
        await roles.end_connections(connection, login)


async def _remedies(connection: Connection, name: str) -> list[str]:
    """The statements that remove what DROP DATABASE fails on, each with the database to run it in."""
    inside = f"(in database {quote_identifier(name)})"
    found = [
        f"ROLLBACK PREPARED {quote_literal(gid)} {inside}" for gid, _, _ in await connection.fetch(_PREPARED, name)
    ]
    slots = "SELECT slot_name FROM pg_replication_slots WHERE database = $1 AND active ORDER BY 1"
    for (slot,) in await connection.fetch(slots, name):
        found.append(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots "  # noqa: S608 - quoted
            f"WHERE slot_name = {quote_literal(slot)}"
        )
    subscriptions = (
        "SELECT subname FROM pg_subscription JOIN pg_database d ON d.oid = subdbid WHERE datname = $1 ORDER BY 1"
    )
    for (subscription,) in await connection.fetch(subscriptions, name):
        found.append(f"DROP SUBSCRIPTION {quote_identifier(subscription)} {inside}")
    return found


# --- roles ----------------------------------------------------------------------------------------------------------


async def remove_role(connection: Connection, blockers: Blockers, names: Names, role: str) -> None:
    """Drop a tenant's role, or retire it and leave it to ``reconcile``."""
    retired = await _drop_or_retire(connection, blockers, names, role)
    if retired is not None:
        await _try_to_drop(connection, blockers, names, retired, was=role, seconds=_RETIRED_SECONDS)


async def _drop_or_retire(connection: Connection, blockers: Blockers, names: Names, role: str) -> str | None:
    """Drop a tenant's role and its temporary logins; if it has rights elsewhere, retire it and return its new name."""
    for login in await roles.states(connection, login_stem(role)):
        await remove_role(connection, blockers, names, login)
    try:
        await blockers.run(connection, partial(roles.drop, connection, role))
    except asyncpg.DependentObjectsStillExistError:
        retired = names.retired(secrets.token_hex(8))
        await blockers.run(connection, partial(_retire, connection, role, retired))
        return retired
    return None


async def _try_to_drop(
    connection: Connection, blockers: Blockers, names: Names, retired: str, *, was: str, seconds: float
) -> None:
    """Try for a short time to drop a retired role: other tenants can delay that. ``reconcile`` has more time."""
    with suppress(TenancyError, *SERVER_FAILURES):
        async with asyncio.timeout(min(seconds, _RETIRED_SECONDS)):
            await drop_retired(connection, blockers, names, retired)
            return
    logger.warning("role %s was retired as %s, without login and memberships; reconcile will drop it", was, retired)


async def drop_retired(connection: Connection, blockers: Blockers, names: Names, role: str) -> None:
    """Revoke all rights of a retired role, in every database, and drop it.

    Raises:
        ProvisioningError: some cannot be revoked from here; the message names the databases.
    """
    for _ in range(_ATTEMPTS):
        for database, owns in await connection.fetch(_REFERENCES, role):
            # objects that it owns outside its own database may be somebody's data: they are not dropped
            if not owns:
                await _revoke_rights(blockers, names, role, database)
        with suppress(asyncpg.DependentObjectsStillExistError):
            await blockers.run(connection, partial(roles.drop, connection, role))
            return
    where = [
        f"database {name!r}" if name else "shared objects" for name, _ in await connection.fetch(_REFERENCES, role)
    ]
    raise ProvisioningError(
        f"role {role!r} cannot be dropped, it is still named by {', '.join(where)}; look at what it owns there, then "
        f"run there as a superuser: DROP OWNED BY {quote_identifier(role)}"
    )


async def _revoke_rights(blockers: Blockers, names: Names, role: str, database: str | None) -> None:
    """Revoke all rights of a role in a database, and on shared objects."""
    connection = await blockers.connect(database)
    try:
        # revoking needs the rights of the owner: of large objects and default privileges that is the tenant's role
        owners = [] if database is None else [row[0] for row in await connection.fetch(_OWNERS)]
        needed = dict.fromkeys([role, *(owner for owner in owners if names.parse(owner) is not None)])
        async with roles.joined(connection, *needed):
            await _revoke_large_objects(connection, blockers, role)
            await blockers.run(connection, partial(connection.execute, f"DROP OWNED BY {quote_identifier(role)}"))
    except asyncpg.UndefinedObjectError:
        return  # another process has dropped the role
    finally:
        await connections.close(connection)


async def _revoke_large_objects(connection: Connection, blockers: Blockers, role: str) -> None:
    """Revoke a role's rights on large objects, some thousands in a transaction: a tenant can grant any number.

    An interrupted call has made progress, which one DROP OWNED for all of them would not.
    """
    last = 0
    while found := [row["objid"] for row in await connection.fetch(_LARGE_OBJECTS, role, last, _BATCH)]:
        objects = ", ".join(map(str, found))
        revoke = f"REVOKE ALL ON LARGE OBJECT {objects} FROM {quote_identifier(role)} CASCADE"
        # one of them is dropped, or this administrator may not change it: DROP OWNED deals with the whole batch
        with suppress(asyncpg.UndefinedObjectError, asyncpg.InsufficientPrivilegeError):
            await blockers.run(connection, partial(connection.execute, revoke))
        last = found[-1]


async def _retire(connection: Connection, role: str, retired: str) -> None:
    """Rename a role and remove its login and password, in one transaction; then revoke its memberships and members."""
    old, new = quote_identifier(role), quote_identifier(retired)
    if await roles.exists(connection, role):
        await connection.execute(
            f"ALTER ROLE {old} RENAME TO {new}; ALTER ROLE {new} NOLOGIN CONNECTION LIMIT 0 PASSWORD NULL"
        )
    for granted, member in await connection.fetch(_MEMBERSHIPS, retired):
        try:
            await connection.execute(f"REVOKE {quote_identifier(granted)} FROM {quote_identifier(member)} CASCADE")
        except asyncpg.InsufficientPrivilegeError:
            logger.warning(
                "role %s is still a member of %s: the administrator may not revoke that; a superuser must",
                member,
                granted,
            )
