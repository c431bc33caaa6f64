"""``RevisionPolicy``: contents from elsewhere become a tenant's if they can do nothing that their revision cannot.

Functions, triggers, views and the like run with the rights of their owner, or of whoever changes a table. So each one
must be what the revision makes. Tables, columns, indexes and rows can do nothing by themselves, and may differ.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final

from ..errors import ContentsRefusedError, MigrationError
from ..migrations.connections import Connections
from ..migrations.plan import Heads, format_revision
from ..migrations.scripts import Environment
from ..migrations.services import FleetServices
from ..postgres.connections import Connection
from ..postgres.membership import joined
from ..postgres.quoting import quote_identifier
from ..provisioning.rights import event_trigger
from ..provisioning.rights.grants import CHECKPOINTS_SCHEMA
from ..provisioning.rights.tenant_rights import RECORD_SCHEMA
from . import catalogue
from .catalogue import Catalogue, Ignored, Key, split_target
from .compare import compare
from .mending import TENANT_ROLE, alter_word
from .queries import OWNER, TENANT
from .reference import KeptCatalogues, References

_EVERYTHING: Final = Ignored()

# what runs, or decides what runs
_CODE: Final = frozenset(
    {
        "access method",
        "aggregate",
        "base type",
        "cast",
        "conversion",
        "domain",
        "event trigger",
        "extension",
        "foreign data wrapper",
        "foreign server",
        "foreign table",
        "function",
        "language",
        "materialized view",
        "operator",
        "operator class",
        "operator family",
        "policy",
        "procedure",
        "publication",
        "range type",
        "rule",
        "text search configuration",
        "text search dictionary",
        "trigger",
        "view",
        "window function",
    }
)
# what runs with the rights of its owner, or of whoever uses a table, which the owner does at times
_AS_OWNER: Final = frozenset(
    {
        "column",
        "constraint",
        "index",
        "materialized view",
        "policy",
        "rule",
        "statistics",
        "table",
        "trigger",
        "view",
    }
)
# expressions that PostgreSQL evaluates as somebody else
_EXPRESSIONS: Final = frozenset({"default", "generated", "partition key", "bound", "definition", "using", "check"})
# a call, but neither of a sequence nor of a type with a length
_CALL: Final = re.compile(r'(?:\w|")\s*\(')
_SEQUENCE: Final = re.compile(r"nextval\('(?:[^']|'')*'::regclass\)")
_TYPE: Final = re.compile(r"\b(?:varying|character|varchar|char|bit|numeric|timestamp|time|interval)\s*\(\d[\d, ]*\)")
# Before a bracket: words of SQL, which PostgreSQL prints in capitals, and functions of its own that change nothing. It
# prints other functions with their schema, since only its own are in the path.
_HARMLESS: Final = re.compile(
    r'(?<![\w."])(?:CHECK|AND|OR|NOT|IN|ANY|ALL|ARRAY|CASE|WHEN|THEN|ELSE|COALESCE|NULLIF|GREATEST|LEAST|EXTRACT'
    r"|now|clock_timestamp|statement_timestamp|transaction_timestamp|date_trunc|gen_random_uuid|uuidv4|uuidv7"
    r"|length|char_length|octet_length|lower|upper|btrim|ltrim|rtrim|abs|jsonb_typeof|array_length|cardinality)\s*\("
)
# a definition that names columns in parentheses, and calls nothing
_PLAIN: Final = re.compile(
    r"(?:PRIMARY KEY|UNIQUE(?: NULLS NOT DISTINCT)?|FOREIGN KEY) \([^()]*\)(?: REFERENCES [^()]* ?\([^()]*\))?[^()]*"
    r"|CREATE (?:UNIQUE )?INDEX [^()]* ON [^()]* USING \w+ \([^()]*\)[^()]*"
)

# rows that neither a function nor a policy of the database can have a hand in
_HEADS = """
SELECT c.oid IS NOT NULL AS exists, coalesce(c.relkind = 'r' AND NOT c.relhasrules AND NOT c.relhassubclass
         AND NOT EXISTS (SELECT FROM pg_attribute a WHERE attrelid = c.oid AND attgenerated <> '')
         AND (SELECT typnamespace = 'pg_catalog'::regnamespace FROM pg_attribute a JOIN pg_type t ON t.oid = atttypid
               WHERE attrelid = c.oid AND attname = 'version_num'), false) AS is_plain
  FROM (SELECT to_regclass($1) AS oid) given LEFT JOIN pg_class c USING (oid)
"""
# where the tenant's role may make objects; and whether they are its own, as a grant hook lets it
_OPEN = """
SELECT quote_ident(nspname) AS name, pg_get_userbyid(nspowner) = $2 AND EXISTS (
         SELECT FROM aclexplode(nspacl) a WHERE a.privilege_type = 'CREATE' AND pg_get_userbyid(a.grantee) = $1) AS own
  FROM pg_namespace n WHERE nspname !~ '^pg_' AND has_schema_privilege($1::name, n.oid, 'CREATE')
"""
_SCHEMAS = "SELECT quote_ident(nspname) AS name FROM pg_namespace WHERE nspname !~ '^pg_'"
# named as in the catalogue
_DEFINERS = """
SELECT CASE prokind WHEN 'p' THEN 'procedure ' WHEN 'w' THEN 'window function ' ELSE 'function ' END
       || quote_ident(nspname) || '.' || quote_ident(proname) || '(' || oidvectortypes(proargtypes) || ')' AS target
  FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace WHERE prosecdef AND p.oid >= 16384
"""
# the catalogue leaves these schemas out; the numbers below 16384 are PostgreSQL's own objects
_LEFT_OUT_SCHEMAS = (RECORD_SCHEMA, CHECKPOINTS_SCHEMA, "information_schema")
_LEFT_OUT = """
SELECT format('%s %s.%s', what, nspname, name) FROM (
  SELECT 'function' AS what, pronamespace AS space, proname AS name, oid FROM pg_proc
  UNION ALL SELECT 'trigger', relnamespace, tgname, t.oid FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
             WHERE NOT tgisinternal
  UNION ALL SELECT 'rule', relnamespace, rulename, r.oid FROM pg_rewrite r JOIN pg_class c ON c.oid = ev_class
  UNION ALL SELECT 'policy', relnamespace, polname, p.oid FROM pg_policy p JOIN pg_class c ON c.oid = polrelid
  UNION ALL SELECT 'type', typnamespace, typname, oid FROM pg_type WHERE typtype = 'd'
  UNION ALL SELECT 'operator', oprnamespace, oprname, oid FROM pg_operator
  UNION ALL SELECT 'foreign table', relnamespace, relname, oid FROM pg_class WHERE relkind = 'f'
) found JOIN pg_namespace n ON n.oid = space WHERE nspname = ANY($1::text[]) AND found.oid >= 16384
"""
# ... and what belongs to an extension: who has created one may add other objects to it
_IN_EXTENSIONS = """
SELECT pg_describe_object(s.classid, s.objid, 0) || ' of an extension' FROM pg_shdepend s
 WHERE s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND s.deptype = 'o'
   AND s.refclassid = 'pg_authid'::regclass AND pg_get_userbyid(s.refobjid) = $1
   AND EXISTS (SELECT FROM pg_depend d WHERE (d.classid, d.objid, d.deptype) = (s.classid, s.objid, 'e'))
"""


class RevisionPolicy:
    """Compares contents with what their revision makes, before they become a tenant's; a ``ContentsPolicy``.

    Args:
        services: The services of an open ``Tenancy``.
        connections: Connects to databases.
        environment: The migrations; None without any.
        accept: Let through what differs, because an operator has looked at it.
        tenant_owned: What the tenant's role owned, by a source that is trusted: "table sandbox.drafts". It becomes the
            role's again, as far as the role may create something in its schema, and runs with no other rights. None
            where nobody vouches for it: then code in such schemas may be the tenant's, and is never accepted.
        kept: Catalogues that earlier policies have read.

    Attributes:
        tenant_owned: As given; to be set before ``check`` where it is known only then.
    """

    def __init__(
        self,
        services: FleetServices,
        connections: Connections,
        environment: Environment | None,
        *,
        accept: bool = False,
        tenant_owned: Collection[str] | None = None,
        kept: KeptCatalogues | None = None,
    ) -> None:
        self._services = services
        self._environment = environment
        self._accept = accept
        self.tenant_owned = tenant_owned
        self._references = References(services, connections, environment, _EVERYTHING, kept)
        self._expected: Catalogue | None = None
        self._theirs: tuple[Key, ...] = ()
        self._as_owner: tuple[Key, ...] = ()
        self.heads: Heads = frozenset()
        self.differences: tuple[str, ...] = ()

    async def check(self, connection: Connection, *, server: str, login: str, role: str) -> None:
        """Refuse code that the revision does not make. Afterwards ``heads`` and ``differences`` tell what was found.

        Args:
            connection: An administrative one.
            server: The server's name.
            login: The role that owns the contents.
            role: The tenant's role.

        Raises:
            ContentsRefusedError: there is some, or rights were granted in it.
            MigrationError: the migrations do not have its revision.
        """
        self.heads = await self._read_heads(connection)
        self._expected = expected = await self._references.read(server, self.heads)
        found = await catalogue.read(connection, owner=login, role=role)
        self.differences = tuple(
            one.text
            for one in compare(expected, found)
            if one.kind not in ("privilege", "default privileges", "event trigger") and not _is_guard(one.name)
        )
        # a schema is the owner's; what is in it may be the role's
        owned = {target for target in self.tenant_owned or () if not target.startswith("schema ")}
        self._theirs = tuple(_objects_of(found, owned))
        granted = list(_granted(found))
        code = list(_code_in(expected, found))
        refused = [_name(key) for key in code if key.target not in owned and key.parent not in owned]
        refused += [row[0] for row in await connection.fetch(_LEFT_OUT, _LEFT_OUT_SCHEMAS)]
        refused += [row[0] for row in await connection.fetch(_IN_EXTENSIONS, login)]
        if granted:
            raise ContentsRefusedError(self._revision, granted + refused, may_accept=False)
        definers = {row["target"] for row in await connection.fetch(_DEFINERS)} if code else set()
        self._as_owner = tuple(key for key in code if key.kind in _AS_OWNER or key.target in definers)
        self._refuse_nobodys(_open_in(expected))
        if refused and not self._accept:
            raise ContentsRefusedError(self._revision, refused)

    async def _read_heads(self, connection: Connection) -> Heads:
        if self._environment is None:
            return frozenset()
        table = self._environment.quoted_version_table
        name = table if "." in table else f"public.{table}"
        row = await connection.fetchrow(_HEADS, name)
        if not row["exists"]:
            return frozenset()
        if not row["is_plain"]:
            raise ContentsRefusedError(None, (f"the version table {name} is not a plain table",), may_accept=False)
        heads = frozenset(
            one[0]
            for one in await connection.fetch(f"SELECT version_num::text FROM ONLY {name}")  # noqa: S608 - quoted
        )
        check_revision(self._environment, heads)
        return heads

    async def align(self, connection: Connection, *, role: str) -> None:
        """Grant and revoke rights until everybody has those that the revision gives."""
        assert self._expected is not None  # noqa: S101 - for the type checker: ``check`` comes first
        owner = self._services.names.owner
        found = await catalogue.read(connection, owner=owner, role=role)
        statements = [
            statement.replace(TENANT_ROLE, quote_identifier(role))
            for one in compare(self._expected, found)
            if one.kind in ("privilege", "default privileges")
            for statement in one.statements
        ]
        if statements:
            await connection.execute("; ".join(statements))
        await self._assign_owners(connection, role)

    async def give_back(self, connection: Connection, *, role: str) -> None:
        """Make the tenant's role the owner of what it owned."""
        if not self._theirs:
            return
        spaces = [row["name"] for row in await connection.fetch(_SCHEMAS)]
        named, quoted = ", ".join(one for one in spaces if _among(self._theirs, (one,))), quote_identifier(role)
        # the grant hook has not run; PostgreSQL asks for this right, unless a superuser gives something away
        await connection.execute(
            "; ".join(
                [
                    f"GRANT CREATE ON SCHEMA {named} TO {quoted}",
                    *_owned_by(quoted, self._theirs),
                    f"REVOKE CREATE ON SCHEMA {named} FROM {quoted}",
                ]
            )
        )

    async def _assign_owners(self, connection: Connection, role: str) -> None:
        """Leave to the tenant's role what it has made where the grant hook lets it; the rest would be the owner's.

        Raises:
            ContentsRefusedError: there is some of that.
        """
        if not (self._theirs or self._as_owner):
            return
        owner = self._services.names.owner
        spaces = await connection.fetch(_OPEN, role, owner)
        self._refuse_nobodys([row["name"] for row in spaces])
        inside = _among(self._theirs, [row["name"] for row in spaces if row["own"]])
        outside = [key for key in self._theirs if key not in inside]
        targets = {key.target for key in outside}
        if refused := [_name(key) for key in self._as_owner if key.target in targets or key.parent in targets]:
            remedy = (
                "the tenant's role has made that, and it would run with the owner's rights: let provisioning.grants "
                "give the role CREATE on its schema, or drop it"
            )
            raise ContentsRefusedError(self._revision, refused, may_accept=False, remedy=remedy)
        if outside and not self._accept:
            raise ContentsRefusedError(self._revision, sorted(targets))
        if outside:
            async with joined(connection, role):
                await connection.execute("; ".join(_owned_by(quote_identifier(owner), outside)))

    def _refuse_nobodys(self, spaces: Collection[str]) -> None:
        """Refuse code that the tenant's role may have made, and that would run with the owner's rights.

        Args:
            spaces: The schemas, quoted, in which the role makes objects of its own.

        Raises:
            ContentsRefusedError: there is some.
        """
        if self.tenant_owned is None and (found := _among(self._as_owner, spaces)):
            remedy = (
                "the tenant's role makes objects in that schema, so it may have made that, and it would run with the "
                "owner's rights: restore a backup, which says who owned what, or leave it out of what is restored"
            )
            raise ContentsRefusedError(self._revision, [_name(key) for key in found], may_accept=False, remedy=remedy)

    @property
    def _revision(self) -> str:
        return format_revision(self.heads) or "base"


def check_revision(environment: Environment, heads: Heads) -> None:
    """Refuse contents of a revision that this code does not have, before they are brought in.

    Raises:
        MigrationError: it does not.
    """
    known = environment.script.revision_map
    if unknown := sorted(head for head in heads if head not in known._revision_map):
        raise MigrationError(
            f"the contents are at revision {', '.join(unknown)}, which this code does not have: they are newer "
            "than the code; deploy the release that made them, or a later one"
        )


def _is_guard(name: str) -> bool:
    return name.startswith(event_trigger.NAME)


def _granted(found: Catalogue) -> Iterator[str]:
    """Rights that somebody has granted inside: what is restored brings none."""
    for key, fields in found.objects.items():
        if key.kind == "default privileges":
            yield f"default privileges: {key.name}"
        if key.kind != "privilege" or key.name == OWNER:
            continue
        kind = (key.parent or "").partition(" ")[0]
        allowed = "EXECUTE" if kind in ("function", "procedure", "aggregate", "window") else "USAGE"
        is_default = key.name == "PUBLIC" and set(fields["privileges"].split(", ")) <= {
            allowed,
            *(["CREATE"] if key.parent == "schema public" else []),
        }
        if not is_default or (kind == "schema" and key.parent != "schema public"):
            yield f"rights on {key.parent} for {key.name}: {fields['privileges']}"


def code_of(expected: Catalogue, found: Catalogue) -> Iterator[str]:
    """Name what runs and is not in what the revision makes."""
    return map(_name, _code_in(expected, found))


def _code_in(expected: Catalogue, found: Catalogue) -> Iterator[Key]:
    for key, fields in found.objects.items():
        wanted = expected.objects.get(key)
        if wanted == fields or key.kind in ("privilege", "default privileges"):
            continue
        if key.kind in _CODE:
            if wanted is None or _without_comment(wanted) != _without_comment(fields):
                yield key
        elif any(
            name in _EXPRESSIONS and (wanted or {}).get(name) != value and _calls(key, value)
            for name, value in fields.items()
        ):
            yield key


def _objects_of(found: Catalogue, owned: Collection[str]) -> Iterator[Key]:
    """What of ``owned`` is given to somebody on its own. A sequence of a column goes with its table."""
    for key, fields in found.objects.items():
        if key.target in owned and "owner" in fields and not (key.kind == "sequence" and "owned by" in fields):
            yield key


def _open_in(expected: Catalogue) -> list[str]:
    """The schemas, quoted, in which the grant hook lets the tenant's role make objects."""
    return [
        key.parent.removeprefix("schema ")
        for key, fields in expected.objects.items()
        if key.kind == "privilege"
        and key.name in (TENANT, "PUBLIC")
        and key.parent is not None
        and key.parent.startswith("schema ")
        and "CREATE" in fields["privileges"]
    ]


def _among(keys: Iterable[Key], spaces: Collection[str]) -> list[Key]:
    """Those in one of these schemas, which are quoted."""
    return [key for key in keys if any(_place(key).startswith(f"{one}.") for one in spaces)]


def _place(key: Key) -> str:
    """The name with its schema: what belongs to another object is in the schema of that."""
    return key.name if key.parent is None or key.kind == "statistics" else split_target(key.parent)[1]


def _owned_by(role: str, keys: Iterable[Key]) -> list[str]:
    return [f"ALTER {alter_word(key.kind)} {key.name} OWNER TO {role}" for key in keys]


def _without_comment(fields: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if name != "comment"}


def _calls(key: Key, expression: str) -> bool:
    if key.kind in ("index", "constraint") and _PLAIN.fullmatch(expression):
        return False
    return _CALL.search(_HARMLESS.sub("(", _TYPE.sub("", _SEQUENCE.sub("", expression)))) is not None


def _name(key: Key) -> str:
    return key.target if key.parent is None else f"{key.target} on {key.parent}"


__all__ = ["RevisionPolicy", "check_revision", "code_of"]
