"""The end of a tenant's database and role, whatever other tenants do against it.

The data goes first, then the role. A role that is still named elsewhere cannot be dropped (2BP01), and every tenant can
write another's role into its own catalogue. So the role gets a name that is no tenant's and loses all that it could do;
then its mentions are removed where they are, and it is dropped. If even that fails, because of something in a database
that cannot be entered, say, the powerless role stays for ``reconcile``: the tenant is gone all the same.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from functools import partial
from uuid import UUID

import asyncpg

from ..audit.actor import Actor
from ..control.names import Names
from ..errors import ProvisioningError, TenancyError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.failures import SERVER_FAILURES
from ..postgres.quoting import quote_identifier, quote_literal
from ..registry.registry import Registry
from ..tenant import Placement
from . import access, databases, roles
from .blockers import Blockers, PreparedTransaction

logger = logging.getLogger("tenancy_orm.provisioning")

_ATTEMPTS = 3
_RETIRED_SECONDS = 5.0  # how long a purge tries to drop a role that is powerless already
_MARGIN_SECONDS = 1.0  # ... and how long before its deadline it gives that up
_BATCH = 2000  # large objects in one transaction

_PREPARED = "SELECT gid, owner::text AS role, database::text AS database FROM pg_prepared_xacts WHERE database = $1"
# Where a role is named: in which database, and whether it owns something there. 'o' is SHARED_DEPENDENCY_OWNER. What
# every database shares (the right to connect to one, say) can be taken from it anywhere: that is in no database here.
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
_MEMBERSHIPS = """
SELECT g.rolname::text AS granted, m.rolname::text AS member
FROM pg_auth_members a JOIN pg_roles g ON g.oid = a.roleid JOIN pg_roles m ON m.oid = a.member
WHERE m.rolname = $1 OR (g.rolname = $1 AND m.rolname <> current_user)
"""


async def remove_data(connection: Connection, blockers: Blockers, *, database: str, role: str, deadline: float) -> None:
    """Keep a tenant's role out, and drop its database. Does nothing where they are gone.

    Raises:
        TimeoutError: the role could not be kept out by the deadline.
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
    """Purge a tenant that the registry has marked for it: its data, its secrets, its role, and all but its tombstone.

    Interrupted anywhere, it is finished by repeating it.

    Raises:
        TimeoutError, ProvisioningError: see ``remove_data``.
    """
    database, role = placement.database, placement.role
    await remove_data(connection, blockers, database=database, role=role, deadline=deadline)
    await registry.erase_secrets(tenant_id)
    retired = await _drop_or_retire(connection, blockers, names, role)
    await registry.finish_purge(tenant_id, actor=actor)
    if retired is not None:
        # it is done: what is left must not pass the deadline, and so make it look failed
        left = deadline - asyncio.get_running_loop().time() - _MARGIN_SECONDS
        await _try_to_drop(connection, blockers, names, retired, was=role, seconds=left)


async def remove(
    connection: Connection, blockers: Blockers, names: Names, *, database: str, role: str, deadline: float
) -> None:
    """Remove a tenant's database and role, whatever is left of them, in the order that leaves no way in.

    Raises:
        TimeoutError, ProvisioningError: see ``remove_data``.
    """
    await remove_data(connection, blockers, database=database, role=role, deadline=deadline)
    await remove_role(connection, blockers, names, role)


# --- databases ------------------------------------------------------------------------------------------------------


async def drop_database(connection: Connection, blockers: Blockers, name: str) -> None:
    """Drop a database, end what delays that, and roll back what tenants or the owner have prepared in it.

    Raises:
        ProvisioningError: somebody else's prepared transaction, an active replication slot or a subscription holds it
            (55006); the message has the statements that remove them.
    """
    drop = partial(databases.drop, connection, name)
    try:
        await blockers.run(connection, drop)
    except asyncpg.ObjectInUseError:
        for found in await connection.fetch(_PREPARED, name):
            if blockers.may_end(found["role"]):
                await blockers.roll_back(PreparedTransaction(**found))
        try:
            await blockers.run(connection, drop)
        except asyncpg.ObjectInUseError as exc:
            remedies = "; ".join(await _remedies(connection, name))
            raise ProvisioningError(
                f"database {name!r} is in use and cannot be dropped" + (f"; run: {remedies}" if remedies else "")
            ) from exc


async def _remedies(connection: Connection, name: str) -> list[str]:
    """The statements that make room for DROP DATABASE, each with where to run it."""
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
    """Drop a tenant's role, or leave it under a name of no tenant and without any power, for ``reconcile`` to drop."""
    retired = await _drop_or_retire(connection, blockers, names, role)
    if retired is not None:
        await _try_to_drop(connection, blockers, names, retired, was=role, seconds=_RETIRED_SECONDS)


async def _drop_or_retire(connection: Connection, blockers: Blockers, names: Names, role: str) -> str | None:
    """Drop a tenant's role; where it is named elsewhere, make it powerless, and return the name that it has then."""
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
    """Drop a powerless role if that can be done at once: others can have it take long. ``reconcile`` has more time."""
    with suppress(TenancyError, *SERVER_FAILURES):
        async with asyncio.timeout(min(seconds, _RETIRED_SECONDS)):
            await drop_retired(connection, blockers, names, retired)
            return
    logger.warning("role %s is now %s and powerless; reconcile will drop it", was, retired)


async def drop_retired(connection: Connection, blockers: Blockers, names: Names, role: str) -> None:
    """Drop a powerless role, wherever it is still named.

    Raises:
        ProvisioningError: something names it that cannot be changed from here; the message says where.
    """
    for _ in range(_ATTEMPTS):
        for database, owns in await connection.fetch(_REFERENCES, role):
            # what it owns outside its own database is somebody's data, and not ours to drop
            if not owns:
                await _revoke_rights(blockers, names, role, database)
        with suppress(asyncpg.DependentObjectsStillExistError):
            await blockers.run(connection, partial(roles.drop, connection, role))
            return
    where = [
        f"database {name!r}" if name else "shared objects" for name, _ in await connection.fetch(_REFERENCES, role)
    ]
    raise ProvisioningError(
        f"role {role!r} cannot be dropped, it is still named by {', '.join(where)}; look at what that is, then run "
        f"there as a superuser: DROP OWNED BY {quote_identifier(role)}"
    )


async def _revoke_rights(blockers: Blockers, names: Names, role: str, database: str | None) -> None:
    """Take from a role all rights that it has in a database, and those in what all databases share."""
    connection = await blockers.connect(database)
    try:
        # A right is taken away by whoever has the rights of the object's owner. That of a large object is the role of
        # the tenant whose database it is, which is called like it.
        needed = [role] if database is None or names.parse(database) is None else [role, database]
        async with roles.joined(connection, *needed):
            await _revoke_large_objects(connection, blockers, role)
            await blockers.run(connection, partial(connection.execute, f"DROP OWNED BY {quote_identifier(role)}"))
    except asyncpg.UndefinedObjectError:
        return  # dropped by somebody else
    finally:
        await connections.close(connection)


async def _revoke_large_objects(connection: Connection, blockers: Blockers, role: str) -> None:
    """Take a role's rights on large objects away, some thousands in a transaction: anybody can grant any number.

    What is interrupted goes on from there the next time, which one DROP OWNED for all of them would not.
    """
    last = 0
    while found := [row["objid"] for row in await connection.fetch(_LARGE_OBJECTS, role, last, _BATCH)]:
        objects = ", ".join(map(str, found))
        revoke = f"REVOKE ALL ON LARGE OBJECT {objects} FROM {quote_identifier(role)} CASCADE"
        # one of them is gone by now, or not ours to change: left to DROP OWNED, as are the others of its batch
        with suppress(asyncpg.UndefinedObjectError, asyncpg.InsufficientPrivilegeError):
            await blockers.run(connection, partial(connection.execute, revoke))
        last = found[-1]


async def _retire(connection: Connection, role: str, retired: str) -> None:
    """Rename a role and make it powerless, in one transaction; memberships that are not the administrator's last."""
    old, new = quote_identifier(role), quote_identifier(retired)
    if await roles.exists(connection, role):
        await connection.execute(
            f"ALTER ROLE {old} RENAME TO {new}; ALTER ROLE {new} NOLOGIN CONNECTION LIMIT 0 PASSWORD NULL"
        )
    for granted, member in await connection.fetch(_MEMBERSHIPS, retired):
        try:
            await connection.execute(f"REVOKE {quote_identifier(granted)} FROM {quote_identifier(member)} CASCADE")
        except asyncpg.InsufficientPrivilegeError:
            logger.warning("role %s is still a member of %s: the administrator may not change that", member, granted)
