"""``RevisionPolicy``: contents from elsewhere become a tenant's if they can do nothing that their revision cannot.

Functions, triggers, views and the like run with the rights of their owner, or of whoever changes a table. So each one
must be what the revision makes. Tables, columns, indexes and rows can do nothing by themselves, and may differ.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from ..errors import ContentsRefusedError, MigrationError
from ..migrations.connections import Connections
from ..migrations.plan import Heads, format_revision
from ..migrations.scripts import Environment
from ..migrations.services import FleetServices
from ..postgres.connections import Connection
from ..postgres.membership import joined
from ..postgres.quoting import quote_identifier
from ..provisioning import event_trigger
from ..provisioning.grants import CHECKPOINTS_SCHEMA
from ..provisioning.tenant_rights import RECORD_SCHEMA
from . import catalogue
from .catalogue import Catalogue, Ignored, Key
from .compare import compare
from .mending import TENANT_ROLE, alter_word
from .queries import OWNER
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
# where the tenant's role makes objects of its own, as a grant hook lets it
_CREATABLE = """
SELECT quote_ident(nspname) FROM pg_namespace n, aclexplode(nspacl) a
 WHERE a.privilege_type = 'CREATE' AND pg_get_userbyid(a.grantee) = $1 AND pg_get_userbyid(nspowner) = $2
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
            role's again, as far as the role may create something in its schema, and runs with no other rights.
        kept: Catalogues that earlier policies have read.
    """

    def __init__(
        self,
        services: FleetServices,
        connections: Connections,
        environment: Environment | None,
        *,
        accept: bool = False,
        tenant_owned: Collection[str] = (),
        kept: KeptCatalogues | None = None,
    ) -> None:
        self._services = services
        self._environment = environment
        self._accept = accept
        self._tenant_owned = frozenset(tenant_owned)
        self._references = References(services, connections, environment, _EVERYTHING, kept)
        self._expected: Catalogue | None = None
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
        granted = list(_granted(found))
        refused = list(code_of(expected, self._without_tenants(found)))
        refused += [row[0] for row in await connection.fetch(_LEFT_OUT, _LEFT_OUT_SCHEMAS)]
        refused += [row[0] for row in await connection.fetch(_IN_EXTENSIONS, login)]
        if granted or (refused and not self._accept):
            revision = format_revision(self.heads) or "base"
            raise ContentsRefusedError(revision, tuple(granted + refused), may_accept=not granted)

    async def _read_heads(self, connection: Connection) -> Heads:
        if self._environment is None:
            return frozenset()
        table = self._environment.quoted_version_table
        name = table if "." in table else f"public.{table}"
        row = await connection.fetchrow(_HEADS, name)
        if not row["exists"]:
            return frozenset()
        if not row["is_plain"]:
            raise ContentsRefusedError(None, (f"the version table {name} is no plain table",), may_accept=False)
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
        await self._give_back(connection, found, role)

    def _without_tenants(self, found: Catalogue) -> Catalogue:
        """The catalogue without what the tenant's role will own, and what belongs to it."""
        if not self._tenant_owned:
            return found
        owned = self._tenant_owned - {target for target in self._tenant_owned if target.startswith("schema ")}
        kept = {k: v for k, v in found.objects.items() if k.target not in owned and k.parent not in owned}
        return Catalogue(kept, found.owner)

    async def _give_back(self, connection: Connection, found: Catalogue, role: str) -> None:
        """Make the tenant's role the owner of what it owned, and refuse that this fails: it would be the owner's code.

        Raises:
            ContentsRefusedError: the role may not create anything in a schema of these.
        """
        theirs = [
            key
            for key, fields in found.objects.items()
            if key.parent is None and key.target in self._tenant_owned and key.kind != "schema" and "owner" in fields
        ]
        if not theirs:
            return
        spaces = {row[0] for row in await connection.fetch(_CREATABLE, role, self._services.names.owner)}
        outside = {key for key in theirs if not any(key.name.startswith(f"{one}.") for one in spaces)}
        if outside and not self._accept:
            findings = tuple(sorted(key.target for key in outside))
            raise ContentsRefusedError(format_revision(self.heads) or "base", findings)
        quoted = quote_identifier(role)
        async with joined(connection, role):
            for key in theirs:
                # a sequence of a column goes with its table
                if key not in outside and not (key.kind == "sequence" and "owned by" in found.objects[key]):
                    await connection.execute(f"ALTER {alter_word(key.kind)} {key.name} OWNER TO {quoted}")


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
    for key, fields in found.objects.items():
        wanted = expected.objects.get(key)
        if wanted == fields or key.kind in ("privilege", "default privileges"):
            continue
        if key.kind in _CODE:
            if wanted is None or _without_comment(wanted) != _without_comment(fields):
                yield _name(key)
        elif any(
            name in _EXPRESSIONS and (wanted or {}).get(name) != value and _calls(key, value)
            for name, value in fields.items()
        ):
            yield _name(key)


def _without_comment(fields: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if name != "comment"}


def _calls(key: Key, expression: str) -> bool:
    if key.kind in ("index", "constraint") and _PLAIN.fullmatch(expression):
        return False
    return _CALL.search(_HARMLESS.sub("(", _TYPE.sub("", _SEQUENCE.sub("", expression)))) is not None


def _name(key: Key) -> str:
    return key.target if key.parent is None else f"{key.target} on {key.parent}"


__all__ = ["RevisionPolicy", "check_revision", "code_of"]
