"""What a server's shared catalogues tell of tenants' databases and roles; one look for all tenants of the server.

A database that was dropped and restored by hand shows here: it has another owner, PUBLIC may connect to it, and its
contents name other roles. ``contents_check`` looks inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...control.names import Names
from ...postgres.connections import Connection
from ...postgres.quoting import quote_identifier, quote_literal
from ...routing.marker import replaced_by
from ...tenant import Placement
from ..server_objects import roles
from .differences import Deviation, enumeration

PUBLIC = ""

HALF_DROPPED = -2
"""``pg_database.datconnlimit`` of a database of which DROP DATABASE has begun to delete the files."""

_DATABASES = """
WITH named AS (
    SELECT dbid, array_agg(DISTINCT r.rolname::text) AS roles FROM pg_shdepend
      JOIN pg_roles r ON refclassid = 'pg_authid'::regclass AND refobjid = r.oid
     WHERE NOT r.rolsuper AND r.rolname <> current_user GROUP BY dbid)
SELECT d.datname::text AS name, o.rolname::text AS owner, d.datallowconn AS open, d.datistemplate AS is_template,
       d.datconnlimit AS connection_limit, shobj_description(d.oid, 'pg_database') AS marker,
       ARRAY(SELECT DISTINCT CASE WHEN a.grantee = 0 THEN '' ELSE coalesce(g.rolname::text, a.grantee::text) END
               FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
               LEFT JOIN pg_roles g ON g.oid = a.grantee
              WHERE a.grantee <> d.datdba AND NOT coalesce(g.rolsuper, false) ORDER BY 1) AS grantees,
       coalesce(named.roles, '{}') AS roles
  FROM pg_database d JOIN pg_roles o ON o.oid = d.datdba LEFT JOIN named ON named.dbid = d.oid
 WHERE starts_with(d.datname::text, $1)
"""
_ATTRIBUTES = ", ".join(f"CASE WHEN {column} THEN '{name}' END" for name, column in roles.REFUSED_ATTRIBUTES.items())
_ROLES = f"""
WITH elsewhere AS (
    SELECT a.grantee, array_agg(DISTINCT d.datname::text) AS databases FROM pg_database d, aclexplode(d.datacl) a
     WHERE NOT starts_with(d.datname::text, $2) GROUP BY 1)
SELECT r.rolname::text AS name, array_remove(ARRAY[{_ATTRIBUTES}], NULL) AS attributes,
       coalesce(r.rolvaliduntil < 'infinity', false) AS expires, coalesce(elsewhere.databases, '{{}}') AS elsewhere
  FROM pg_roles r LEFT JOIN elsewhere ON elsewhere.grantee = r.oid WHERE starts_with(r.rolname::text, $1)
"""  # noqa: S608 - constants


@dataclass(frozen=True, slots=True)
class DatabaseFacts:
    """A tenant's database in the shared catalogues.

    ``grantees`` have rights on the database, without its owner and superusers; "" is PUBLIC. ``roles`` are named by its
    contents, as owners or grantees.
    """

    name: str
    owner: str
    open: bool
    is_template: bool
    connection_limit: int
    marker: str | None
    grantees: tuple[str, ...]
    roles: frozenset[str]


@dataclass(frozen=True, slots=True)
class RoleFacts:
    """A tenant's role: which refused attributes it has, whether it expires, which other databases grant it rights."""

    name: str
    attributes: tuple[str, ...]
    expires: bool
    elsewhere: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServerState:
    """Tenants' databases and roles on one server, by name."""

    databases: Mapping[str, DatabaseFacts]
    roles: Mapping[str, RoleFacts]


async def read(connection: Connection, names: Names, *, only: Placement | None = None) -> ServerState:
    """Read the state of every tenant's database and role.

    Args:
        connection: An administrative one, to any database of the server.
        names: Tells tenants' databases from others.
        only: Of this tenant alone.
    """
    databases = [
        DatabaseFacts(**{**row, "grantees": tuple(row["grantees"]), "roles": frozenset(row["roles"])})
        for row in await connection.fetch(_DATABASES, only.database if only else names.tenant_stem)
    ]
    found = [
        RoleFacts(row["name"], tuple(row["attributes"]), row["expires"], tuple(row["elsewhere"]))
        for row in await connection.fetch(_ROLES, only.role if only else names.tenant_stem, names.stem)
    ]
    return ServerState({one.name: one for one in databases}, {one.name: one for one in found})


async def sealed(connection: Connection, marker: str) -> list[str]:
    """Return the names of the warm databases that are as they were made: sealed, with a role that cannot log in.

    Args:
        connection: An administrative one, to any database of the server.
        marker: The comment of warm databases.
    """
    rows = await connection.fetch(
        "SELECT d.datname::text FROM pg_database d JOIN pg_roles r ON r.rolname = d.datname "
        "WHERE NOT d.datallowconn AND NOT r.rolcanlogin AND shobj_description(d.oid, 'pg_database') = $1",
        marker,
    )
    return [row[0] for row in rows]


def deviations(state: ServerState, names: Names, placement: Placement, *, marker: str) -> Iterator[Deviation]:
    """What differs for one tenant. The first one tells whether the database may be touched at all.

    Args:
        state: The server's state.
        names: Of this installation.
        placement: Where the tenant is.
        marker: Its database's marker.
    """
    facts, role = state.databases.get(placement.database), state.roles.get(placement.role)
    if facts is None:
        detail = (
            "its database does not exist; if another one has replaced it, tenancy rebuild finds that; else restore it, "
            "or purge the tenant"
        )
        yield Deviation("database.missing", detail, False)
    elif (by := replaced_by(facts.marker)) is not None and (facts.marker or "").startswith(f"{marker}:"):
        # nothing that is there is mended: it would be opened
        detail = (
            f"its database is not in use any more: {by!r} has replaced it, and the control database is older than "
            "that; nothing in it is changed; run: tenancy rebuild"
        )
        yield Deviation("database.replaced", detail, False)
    else:
        yield from _marker(facts, marker)
        yield from _database(facts, names, placement)
    if role is None:
        yield Deviation("role.missing", "its role does not exist", False)
    else:
        yield from _role(role)


def is_suspicious(state: ServerState, names: Names, placement: Placement) -> bool:
    """Whether the shared catalogues give a reason to look into the database: it names other roles, or not its own."""
    facts = state.databases.get(placement.database)
    if facts is None:
        return False
    expected = {names.owner, placement.role, PUBLIC}
    return placement.role not in facts.roles or not expected.issuperset({*facts.roles, *facts.grantees})


def _marker(facts: DatabaseFacts, marker: str) -> Iterator[Deviation]:
    statement = f"COMMENT ON DATABASE {quote_identifier(facts.name)} IS {quote_literal(marker)}"
    if facts.marker is None:
        yield Deviation(
            "marker.missing",
            "its database has no marker; if the database is this tenant's, run: tenancy reconcile --adopt-marker SLUG",
            False,
            (statement,),
        )
    elif facts.marker != marker:
        # what it says may come from a backup of anything, so it is shown as it is
        yield Deviation(
            "marker.other", f"its database has another marker, {facts.marker[:200]!r}; nothing in it is changed", True
        )


def _database(facts: DatabaseFacts, names: Names, placement: Placement) -> Iterator[Deviation]:
    name = quote_identifier(facts.name)
    alter = f"ALTER DATABASE {name}"
    if facts.owner != names.owner:
        yield Deviation(
            "database.owner",
            f"its database is owned by {facts.owner}",
            True,
            (f"{alter} OWNER TO {quote_identifier(names.owner)}",),
        )
    if PUBLIC in facts.grantees:
        yield Deviation(
            "database.public",
            "PUBLIC, and so every other tenant's role, has rights on its database",
            True,
            (f"REVOKE ALL ON DATABASE {name} FROM PUBLIC",),
        )
    expected = (placement.role, names.owner)
    others = [
        role
        for role in facts.grantees
        # housekeeping drops the logins of moves that are over
        if role.startswith(names.stem) and role not in expected and not role.startswith(names.replicator_stem)
    ]
    if others:
        yield Deviation(
            "database.grant",
            f"other roles have rights on its database: {enumeration(others)}",
            True,
            tuple(f"REVOKE ALL ON DATABASE {name} FROM {quote_identifier(other)} CASCADE" for other in others),
        )
    if facts.connection_limit == HALF_DROPPED:
        yield Deviation("database.invalid", "an interrupted DROP DATABASE has left it unusable; restore it", False)
    elif facts.connection_limit != -1:
        detail = f"its database has a connection limit of {facts.connection_limit}"
        yield Deviation("database.connection_limit", detail, False, (f"{alter} CONNECTION LIMIT -1",))
    if facts.is_template:
        detail = "its database is a template, which every role with CREATEDB may copy"
        yield Deviation("database.template", detail, True, (f"{alter} IS_TEMPLATE false",))
    if not facts.open:
        detail = "nobody can connect to its database (ALLOW_CONNECTIONS false)"
        yield Deviation("database.closed", detail, False, (f"{alter} ALLOW_CONNECTIONS true",))


def _role(role: RoleFacts) -> Iterator[Deviation]:
    name = quote_identifier(role.name)
    if role.attributes:
        removed = " ".join(f"NO{attribute}" for attribute in role.attributes)
        yield Deviation(
            "role.attributes",
            f"its role has {', '.join(role.attributes)}",
            role.attributes != ("INHERIT",),
            (f"ALTER ROLE {name} {removed}",),
        )
    if role.expires:
        yield Deviation(
            "role.expires", "its role's password expires", False, (f"ALTER ROLE {name} VALID UNTIL 'infinity'",)
        )
    if role.elsewhere:
        yield Deviation(
            "role.grant",
            f"its role has rights on other databases: {enumeration(role.elsewhere)}",
            True,
            tuple(f"REVOKE ALL ON DATABASE {quote_identifier(d)} FROM {name} CASCADE" for d in role.elsewhere),
        )
