"""What is inside a tenant's database, compared with what provisioning makes there, and mended.

Everything in the database belongs to the owner role, nobody but the tenant's role has rights, and the tenant's role has
those of ``TenantRights``. Objects of extensions are left alone. So is code that the tenant's role has made where it may
create nothing any more: as the owner's it would run with the rights of the owner, which has every tenant's database.
Further rights that a migration has given to the tenant's own role stay, and are not reported, but for those to write
what it may only read. The grant hook has the last word on grants: what it gives, or takes, is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import asyncpg

from ...control.names import Names, is_installations
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.quoting import quote_identifier
from ..rights import event_trigger, grants
from ..rights.tenant_rights import DEFAULTS, Contents, Right, TenantRights, grant_statements
from ..server_objects import advisory_locks, roles
from ..server_objects.blockers import Blockers
from .differences import Deviation, enumeration
from .server_state import PUBLIC

# no name in what this administrator runs may be resolved to a tenant's object
_SEARCH_PATH = "SET search_path = pg_catalog, pg_temp"
_LOCK_TIMEOUT = "SET LOCAL lock_timeout = '10s'"
# a check that waits for a table's lock keeps everybody waiting who wants that table afterwards
_CHECK_LOCK_TIMEOUT = "SET LOCAL lock_timeout = '1s'"

# ALTER ... OWNER and REVOKE take locks, and the server's lock table has room for some thousands
_BATCH = 500
_ALL = 10_000_000
_ROUNDS = 3  # objects that get their owner in one round get their rights in the next

_OWNERS = """
WITH extension AS (SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
expected AS (SELECT oid FROM pg_roles WHERE rolname = $1),
tenant AS (SELECT oid FROM pg_roles WHERE rolname = $2),
listed AS (
  SELECT 'pg_namespace'::regclass AS class, oid, nspowner AS owner, oid AS space FROM pg_namespace
  UNION ALL
  SELECT 'pg_class'::regclass, oid, relowner, relnamespace FROM pg_class c
   WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND NOT (relkind = 'S' AND EXISTS (SELECT FROM pg_depend d WHERE
         d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = d.classid AND d.deptype IN ('a', 'i')))
  UNION ALL
  SELECT 'pg_type'::regclass, t.oid, typowner, typnamespace FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
   WHERE typtype IN ('d', 'e', 'r') OR c.relkind = 'c'
  UNION ALL SELECT 'pg_proc'::regclass, oid, proowner, pronamespace FROM pg_proc
  UNION ALL SELECT 'pg_collation'::regclass, oid, collowner, collnamespace FROM pg_collation
  UNION ALL SELECT 'pg_conversion'::regclass, oid, conowner, connamespace FROM pg_conversion
  UNION ALL SELECT 'pg_operator'::regclass, oid, oprowner, oprnamespace FROM pg_operator
  UNION ALL SELECT 'pg_opclass'::regclass, oid, opcowner, opcnamespace FROM pg_opclass
  UNION ALL SELECT 'pg_opfamily'::regclass, oid, opfowner, opfnamespace FROM pg_opfamily
  UNION ALL SELECT 'pg_ts_config'::regclass, oid, cfgowner, cfgnamespace FROM pg_ts_config
  UNION ALL SELECT 'pg_ts_dict'::regclass, oid, dictowner, dictnamespace FROM pg_ts_dict
  UNION ALL SELECT 'pg_statistic_ext'::regclass, oid, stxowner, stxnamespace FROM pg_statistic_ext),
-- what is evaluated for a table or view, also as its owner: when it is analyzed or refreshed
of_table AS (
  SELECT indrelid AS oid, 'pg_class'::regclass AS classid, indexrelid AS objid FROM pg_index
  UNION ALL SELECT conrelid, 'pg_constraint'::regclass, oid FROM pg_constraint
  UNION ALL SELECT tgrelid, 'pg_trigger'::regclass, oid FROM pg_trigger
  UNION ALL SELECT ev_class, 'pg_rewrite'::regclass, oid FROM pg_rewrite
  UNION ALL SELECT adrelid, 'pg_attrdef'::regclass, oid FROM pg_attrdef
  UNION ALL SELECT polrelid, 'pg_policy'::regclass, oid FROM pg_policy
  UNION ALL SELECT stxrelid, 'pg_statistic_ext'::regclass, oid FROM pg_statistic_ext)
SELECT CASE i.type WHEN 'statistics object' THEN 'STATISTICS' ELSE upper(i.type) END AS kind, i.identity AS name,
       pg_get_userbyid(listed.owner)::text AS owner,
       listed.owner = (TABLE tenant) AND (listed.class = 'pg_proc'::regclass
         OR listed.class = 'pg_class'::regclass AND EXISTS (
           SELECT FROM of_table o JOIN pg_depend d ON d.classid = o.classid AND d.objid = o.objid
                  JOIN pg_proc p ON d.refclassid = 'pg_proc'::regclass AND d.refobjid = p.oid
            WHERE o.oid = listed.oid AND p.proowner = listed.owner)) AS is_code
  FROM listed JOIN pg_namespace n ON n.oid = listed.space
       CROSS JOIN LATERAL pg_identify_object(listed.class, listed.oid, 0) i
 WHERE listed.owner <> (TABLE expected) AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', $3)
   AND NOT EXISTS (SELECT FROM extension e WHERE e.classid = listed.class AND e.objid = listed.oid)
   AND NOT (listed.class = 'pg_namespace'::regclass AND n.nspname = 'public'
            AND pg_get_userbyid(listed.owner) = 'pg_database_owner')
   AND NOT (listed.class <> 'pg_namespace'::regclass AND listed.owner = (TABLE tenant)
            AND EXISTS (SELECT FROM aclexplode(n.nspacl) a WHERE a.privilege_type = 'CREATE'
                         AND a.grantee = listed.owner AND n.nspowner <> listed.owner))
 ORDER BY is_code, listed.class = 'pg_namespace'::regclass DESC, 1, 2 LIMIT $4
"""
# those that a tenant makes are its own
_LARGE_OBJECTS = """
SELECT l.oid::text AS name, pg_get_userbyid(lomowner)::text AS owner FROM pg_largeobject_metadata l
 WHERE lomowner NOT IN (SELECT oid FROM pg_roles WHERE rolname IN ($1, $2)) ORDER BY l.oid LIMIT $3
"""
_RIGHTS = """
WITH extension AS (SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
space AS (
  SELECT oid, nspname, nspowner, nspacl FROM pg_namespace n
   WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', $1)
     AND NOT EXISTS (SELECT FROM extension e WHERE e.classid = 'pg_namespace'::regclass AND e.objid = n.oid)),
relation AS (
  SELECT c.oid, relowner, relacl, CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind,
         quote_ident(nspname) || '.' || quote_ident(relname) AS name
    FROM pg_class c JOIN space ON space.oid = relnamespace WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
     AND NOT EXISTS (SELECT FROM extension e WHERE e.classid = 'pg_class'::regclass AND e.objid = c.oid)),
listed AS (
  SELECT 'DATABASE' AS kind, '"' || replace(datname, '"', '""') || '"' AS name, '' AS part, datdba AS owner,
         coalesce(datacl, acldefault('d', datdba)) AS acl FROM pg_database WHERE datname = current_database()
  UNION ALL SELECT 'SCHEMA', quote_ident(nspname), '', nspowner, nspacl FROM space
  UNION ALL SELECT kind, name, '', relowner, relacl FROM relation
  UNION ALL SELECT 'TABLE', name, quote_ident(attname), relowner, attacl
              FROM relation JOIN pg_attribute ON attrelid = relation.oid WHERE attacl IS NOT NULL AND NOT attisdropped
  UNION ALL SELECT 'ROUTINE', format('%I.%I(%s)', nspname, proname, pg_get_function_identity_arguments(p.oid)), '',
                   proowner, proacl FROM pg_proc p JOIN space ON space.oid = pronamespace WHERE proacl IS NOT NULL
               AND NOT EXISTS (SELECT FROM extension e WHERE e.classid = 'pg_proc'::regclass AND e.objid = p.oid)
  UNION ALL SELECT 'TYPE', quote_ident(nspname) || '.' || quote_ident(typname), '', typowner, typacl
              FROM pg_type t JOIN space ON space.oid = typnamespace WHERE typacl IS NOT NULL
               AND NOT EXISTS (SELECT FROM extension e WHERE e.classid = 'pg_type'::regclass AND e.objid = t.oid)
  UNION ALL (SELECT 'LARGE OBJECT', l.oid::text, '', lomowner, lomacl FROM pg_largeobject_metadata l
              WHERE EXISTS (SELECT FROM aclexplode(lomacl) a WHERE a.grantee <> lomowner AND a.grantee NOT IN
                            (SELECT oid FROM pg_roles WHERE rolname IN ($2, $3))) ORDER BY l.oid LIMIT $4)
  UNION ALL SELECT CASE defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'n' THEN 'SCHEMAS'
                   WHEN 'f' THEN 'ROUTINES' WHEN 'T' THEN 'TYPES' ELSE 'LARGE OBJECTS' END,
                   coalesce(quote_ident(nspname), ''), '', defaclrole, defaclacl
              FROM pg_default_acl LEFT JOIN pg_namespace n ON n.oid = defaclnamespace)
SELECT kind, name, part, pg_get_userbyid(owner)::text AS owner,
       CASE WHEN a.grantee = 0 THEN '' ELSE coalesce(g.rolname::text, a.grantee::text) END AS grantee,
       a.privilege_type AS privilege, a.is_grantable AS grantable
  FROM listed, aclexplode(acl) a LEFT JOIN pg_roles g ON g.oid = a.grantee
 WHERE a.grantee <> owner AND NOT coalesce(g.rolsuper, false)
"""
_DEFAULT_KINDS = frozenset({*DEFAULTS, "ROUTINES", "TYPES", "LARGE OBJECTS"})
# what PostgreSQL gives to PUBLIC by itself, and needs a database to connect to
_PUBLICS_OWN = frozenset(
    {("ROUTINE", "EXECUTE"), ("TYPE", "USAGE"), ("ROUTINES", "EXECUTE"), ("TYPES", "USAGE"), ("SCHEMA public", "USAGE")}
)
_WRITES = frozenset({"INSERT", "UPDATE", "DELETE", "TRUNCATE"})
_HAS_FUNCTIONS = "SELECT f FROM unnest($1::text[]) f WHERE NOT has_function_privilege($2::name, f, 'EXECUTE')"
_ROUTINES = """
SELECT p.oid::text || md5(concat(prosrc, prosecdef, proconfig, proretset, prorettype)) FROM pg_proc p
  JOIN pg_namespace n ON n.oid = pronamespace WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""


class Held(NamedTuple):
    """A right that somebody other than the owner has. ``part`` is a column; a grantee of "" is PUBLIC."""

    kind: str
    name: str
    part: str
    owner: str
    grantee: str
    privilege: str
    grantable: bool

    @property
    def object(self) -> str:
        """What it is a right on."""
        if self.kind in _DEFAULT_KINDS:
            return f"{self.kind} that {self.owner} creates" + (f" in {self.name}" if self.name else "")
        return f"{self.kind} {self.name}" + (f" ({self.part})" if self.part else "")


class Owned(NamedTuple):
    """An object that somebody else owns than should. ``is_code``: it runs something that the tenant's role has made."""

    kind: str
    name: str
    owner: str
    is_code: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A database's owners and rights, and what is missing of what provisioning makes."""

    contents: Contents
    owned: tuple[Owned, ...]
    held: frozenset[Held]
    closed_functions: frozenset[str]
    guarded: bool
    locks_restricted: bool
    routines: frozenset[str]


@dataclass(slots=True)
class Result:
    """What a check has found: mended deviations, and others. ``more`` tells that there was too much for one batch."""

    mended: list[Deviation] = field(default_factory=list)
    left: list[Deviation] = field(default_factory=list)
    more: bool = False


class ContentsCheck:
    """The check of one tenant's database.

    Args:
        connection: An administrative one, to the database.
        blockers: Of its server.
        names: Of this installation.
        database: The database.
        role: The tenant's role.
        rights: What the role may do.
        spare_others: Whether an operator's own roles keep their rights, unless a grant hook says what they have.
    """

    def __init__(
        self,
        connection: Connection,
        blockers: Blockers,
        *,
        names: Names,
        database: str,
        role: str,
        rights: TenantRights,
        spare_others: bool = False,
    ) -> None:
        self._names = names
        self._spare_others = spare_others and rights.hook is None
        self._connection = connection
        self._blockers = blockers
        self._database = database
        self._role = role
        self._rights = rights
        self._owner = rights.owner

    async def look(self) -> list[Deviation]:
        """Return what differs. This writes nothing; it does not ask the grant hook, see ``settle``."""
        await self._connection.execute(_SEARCH_PATH)
        return self._deviations(await self._snapshot(), await self._is_superuser())

    async def owners(self) -> list[Owned]:
        """Return every object that does not belong to the owner role."""
        c = self._connection
        await c.execute(_SEARCH_PATH)
        found = [Owned(*row) for row in await c.fetch(_OWNERS, self._owner, self._role, event_trigger.NAME, _ALL)]
        objects = await c.fetch(_LARGE_OBJECTS, self._owner, self._role, _ALL)
        return found + [Owned("LARGE OBJECT", *row) for row in objects]

    async def restoring_statements(self) -> list[str]:
        """Return the statements that bring back owners and rights as they are now."""
        statements = [
            f"ALTER {one.kind} {one.name} OWNER TO {quote_identifier(one.owner)}" for one in await self.owners()
        ]
        rows = await self._connection.fetch(_RIGHTS, event_trigger.NAME, self._owner, self._role, _ALL)
        for one in sorted(Held(*row) for row in rows):
            grantee = quote_identifier(one.grantee) if one.grantee else "PUBLIC"
            option = " WITH GRANT OPTION" if one.grantable else ""
            if one.kind in _DEFAULT_KINDS:
                where = f" IN SCHEMA {one.name}" if one.name else ""
                statements.append(
                    f"ALTER DEFAULT PRIVILEGES FOR ROLE {quote_identifier(one.owner)}{where} "
                    f"GRANT {one.privilege} ON {one.kind} TO {grantee}{option}"
                )
            else:
                part = f" ({one.part})" if one.part else ""
                statements.append(f"GRANT {one.privilege}{part} ON {one.kind} {one.name} TO {grantee}{option}")
        return statements

    async def settle(self, *, mend: bool) -> Result:
        """Mend what differs, in one transaction, or roll that back and return what would have been done.

        Raises:
            ProvisioningError: the grant hook failed; nothing was changed.
        """
        result = Result()
        await self._connection.execute(_SEARCH_PATH)
        superuser = await self._is_superuser()
        before = await self._snapshot()
        found = self._deviations(before, superuser)
        result.more = (
            sum(not one.is_code for one in before.owned) >= _BATCH
            or sum(one.kind == "LARGE OBJECT" for one in before.held) >= _BATCH
        )
        if not mend and (self._rights.hook is None or before.owned):
            # a trial would lock tables; and the hook may need what is not the owner's yet
            result.left = found
            return result
        if not found and self._rights.hook is None:
            return result
        transaction = self._connection.transaction()
        await transaction.start()
        try:
            await self._connection.execute(_LOCK_TIMEOUT if mend else _CHECK_LOCK_TIMEOUT)
            async with self._ending_blockers(mend and any(one.dangerous and not one.spared for one in found)):
                everything, applied = dict.fromkeys(found), before
                for _ in range(_ROUNDS):
                    for deviation in found:
                        if not deviation.spared:
                            await self._apply(deviation)
                    applied = await self._snapshot()
                    found = [one for one in self._deviations(applied, superuser) if one not in everything]
                    if not found:
                        break
                    everything.update(dict.fromkeys(found))
                await self._connection.execute(f"RESET search_path; SET LOCAL ROLE {quote_identifier(self._owner)}")
                await self._rights.run_hook(self._connection, self._database, self._role)
                # before PostgreSQL 18, a deferred trigger runs as whoever commits, which would be the administrator
                await self._connection.execute(f"SET CONSTRAINTS ALL IMMEDIATE; RESET ROLE; {_SEARCH_PATH}")
            after = await self._snapshot()
        except BaseException:
            await connections.finish(self._connection, transaction.rollback)
            raise
        self._judge(result, everything, before, applied, after, superuser)
        if mend:
            await transaction.commit()
        else:
            await transaction.rollback()
            result.left, result.mended = [*result.mended, *result.left], []
        return result

    def _ending_blockers(self, wanted: bool) -> AbstractAsyncContextManager[None]:
        """End what blocks the body: only for what is dangerous, since it ends transactions of the application."""
        return self._blockers.ending(self._connection) if wanted else nullcontext()

    def _judge(
        self,
        result: Result,
        everything: Iterable[Deviation],
        before: Snapshot,
        applied: Snapshot,
        after: Snapshot,
        superuser: bool,
    ) -> None:
        """Sort deviations into mended and left, without those that the hook has restored: it wants them."""
        still, wanted = set(self._deviations(applied, superuser)), set(self._deviations(after, superuser))
        remaining = still & wanted
        for deviation in everything:
            if deviation in remaining:
                result.left.append(deviation)
            elif deviation not in wanted:
                result.mended.append(deviation)
        # what a deviation enumerates may have become less
        result.left += [one for one in remaining if one not in result.left]
        by_hook = (applied.held ^ after.held) & (before.held ^ after.held)
        if by_hook or before.routines != after.routines:
            given = enumeration(f"{one.privilege} on {one.object}" for one in by_hook) or "functions"
            detail = f"what provisioning.grants grants differs: {given}"
            result.mended.append(Deviation("grants.hook", detail, False))

    async def _apply(self, deviation: Deviation) -> None:
        for statement in deviation.statements:
            try:
                async with connections.transaction(self._connection):
                    await self._connection.execute(statement)
            except (asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedObjectError, asyncpg.UndefinedTableError):
                continue  # it is seen in what is left
        if deviation.kind == "guard.missing":
            async with connections.transaction(self._connection):
                await event_trigger.install(self._connection, self._owner)

    async def _is_superuser(self) -> bool:
        return await roles.is_superuser(self._connection)

    async def _snapshot(self) -> Snapshot:
        c, owner, role = self._connection, self._owner, self._role
        guard = event_trigger.NAME
        owned = [Owned(*row) for row in await c.fetch(_OWNERS, owner, role, guard, _BATCH)]
        owned += [Owned("LARGE OBJECT", *row) for row in await c.fetch(_LARGE_OBJECTS, owner, role, _BATCH)]
        functions = list(advisory_locks.FUNCTIONS) if self._rights.advisory_locks else []
        return Snapshot(
            contents=await grants.contents(c, owner),
            owned=tuple(owned),
            held=frozenset(Held(*row) for row in await c.fetch(_RIGHTS, guard, owner, role, _BATCH)),
            closed_functions=frozenset(row[0] for row in await c.fetch(_HAS_FUNCTIONS, functions, role)),
            guarded=await event_trigger.is_installed(c, owner),
            locks_restricted=await advisory_locks.is_restricted(c, owner),
            routines=frozenset(row[0] for row in await c.fetch(_ROUTINES)) if self._rights.hook else frozenset(),
        )

    # --- what differs -----------------------------------------------------------------------------------------------

    def _deviations(self, found: Snapshot, superuser: bool) -> list[Deviation]:
        return [
            *self._owners(found.owned),
            *self._foreign(found),
            *self._missing(found),
            *(self._superusers(found) if superuser else ()),
        ]

    def _owners(self, owned: Sequence[Owned]) -> Iterator[Deviation]:
        by_owner: dict[str, list[Owned]] = {}
        for one in owned:
            if not one.is_code:
                by_owner.setdefault(one.owner, []).append(one)
        if code := [f"{one.kind} {one.name}" for one in owned if one.is_code]:
            what = enumeration(code)
            yield Deviation(
                "object.code",
                f"its role owns {what}, where it may create nothing: drop that, or have the owner make it",
                False,
            )
        for owner, objects in by_owner.items():
            yield Deviation(
                "object.owner",
                f"{owner} owns {enumeration(f'{one.kind} {one.name}' for one in objects)}",
                True,
                tuple(f"ALTER {one.kind} {one.name} OWNER TO {self._owner_of(one)}" for one in objects),
            )

    def _owner_of(self, one: Owned) -> str:
        return quote_identifier(self._role if one.kind == "LARGE OBJECT" else self._owner)

    def _foreign(self, found: Snapshot) -> Iterator[Deviation]:
        """Rights of PUBLIC and of other roles, and too many of the tenant's own role."""
        versions = frozenset(found.contents.version_tables)
        grouped: dict[tuple[str, str], list[Held]] = {}
        for one in sorted(found.held):
            kind = self._kind_of(one, versions)
            if kind is not None:
                grouped.setdefault((kind, one.grantee), []).append(one)
        for (kind, grantee), rights in grouped.items():
            who = grantee or "PUBLIC"
            what = enumeration(f"{one.privilege} on {one.object}" for one in rights)
            detail = f"{who} may grant {what} to others" if kind == "right.grantable" else f"{who} has {what}"
            spared = self._spare_others and kind == "right.other" and not is_installations(grantee)
            statements = tuple(_revocations(rights, option=kind == "right.grantable"))
            # a tenant that writes its own copy of reference data harms no other one
            yield Deviation(kind, detail, kind != "right.read_only", statements, spared=spared)

    def _kind_of(self, one: Held, versions: frozenset[str]) -> str | None:
        if one.grantee == self._role:
            if one.kind == "TABLE" and one.name in versions and one.privilege != "SELECT":
                return "right.version_table"
            if one.kind == "TABLE" and one.privilege in _WRITES and self._rights.is_read_only(one.name):
                return "right.read_only"
            return "right.grantable" if one.grantable else None
        if one.kind == "DATABASE" and (one.grantee == PUBLIC or one.grantee.startswith(self._names.stem)):
            return None  # the shared catalogues have told it, see ``server_state``
        if one.grantee == PUBLIC:
            kind = "SCHEMA public" if (one.kind, one.name) == ("SCHEMA", "public") else one.kind
            return None if (kind, one.privilege) in _PUBLICS_OWN else "right.public"
        return None if one.grantee in (self._owner, "pg_database_owner") else "right.other"

    def _missing(self, found: Snapshot) -> Iterator[Deviation]:
        has = {
            Right(one.kind, one.name, one.privilege)
            for one in found.held
            if one.grantee == self._role and not one.part and (one.kind not in DEFAULTS or one.owner == self._owner)
        }
        missing = [
            right
            for right in self._rights.wanted(found.contents, self._database)
            if (right.name in found.closed_functions if right.kind == "FUNCTION" else right not in has)
        ]
        if missing:
            what = enumeration(
                f"{right.privilege} on {right.kind}" + (f" {right.name}" if right.name else " to come")
                for right in missing
            )
            statements = grant_statements(missing, self._role, owner=self._owner)
            yield Deviation("right.missing", f"its role lacks {what}", False, tuple(statements))

    def _superusers(self, found: Snapshot) -> Iterator[Deviation]:
        """What only a superuser makes in a template."""
        if not found.guarded:
            yield Deviation("guard.missing", "the event trigger tenancy_guard is missing, or is another one", True)
        if not found.locks_restricted:
            yield Deviation(
                "advisory_locks",
                "every role may take advisory locks in its database",
                True,
                tuple(advisory_locks.restrictions(self._owner)),
            )


def _revocations(rights: Sequence[Held], *, option: bool) -> Iterator[str]:
    """The statements that take these rights, of one grantee, away; ``option`` means the right to pass them on."""
    grantee = quote_identifier(rights[0].grantee) if rights[0].grantee else "PUBLIC"
    revoke = "REVOKE GRANT OPTION FOR" if option else "REVOKE"
    objects: dict[tuple[str, str], list[Held]] = {}
    for one in rights:
        objects.setdefault((one.kind, one.name), []).append(one)
    for (kind, name), found in objects.items():
        if kind in _DEFAULT_KINDS:
            for one in found:
                where = f" IN SCHEMA {name}" if name else ""
                yield (
                    f"ALTER DEFAULT PRIVILEGES FOR ROLE {quote_identifier(one.owner)}{where} {revoke} {one.privilege} "
                    f"ON {kind} FROM {grantee}"
                )
            continue
        parts = ", ".join(one.privilege + (f" ({one.part})" if one.part else "") for one in found)
        yield f"{revoke} {parts} ON {kind} {name} FROM {grantee} CASCADE"
