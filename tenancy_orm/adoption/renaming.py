"""A schema's objects become those of another schema, in a database that only they are in.

References between objects follow by themselves, since PostgreSQL keeps them by number. What is text does not: the
bodies of functions, and names in strings. In a function's body, the schema before a point is replaced; a name in a
string is not touched, and reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..drift.catalogue import Catalogue
from ..errors import AdoptionError
from ..postgres.connections import Connection, transaction
from ..postgres.errors import describe
from ..postgres.quoting import quote_identifier

# Owned sequences, indexes, row types and arrays follow what they belong to. The functions that make the values of a
# range type do not, and are the superuser's. Other functions, and operators, go first: their names have those of types.
_OBJECTS = """
WITH space AS (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = $1),
listed AS (
  SELECT 'pg_catalog.pg_class'::pg_catalog.regclass AS class, c.oid FROM pg_catalog.pg_class c
   WHERE relnamespace = (TABLE space) AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
     AND NOT (relkind = 'S' AND EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.deptype IN ('a', 'i')
       AND d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid AND d.refclassid = d.classid))
  UNION ALL SELECT 'pg_catalog.pg_type'::pg_catalog.regclass, t.oid FROM pg_catalog.pg_type t
    LEFT JOIN pg_catalog.pg_class c ON c.oid = t.typrelid
   WHERE typnamespace = (TABLE space) AND (typtype IN ('d', 'e', 'r') OR c.relkind = 'c')
  UNION ALL SELECT 'pg_catalog.pg_proc'::pg_catalog.regclass, oid FROM pg_catalog.pg_proc p
   WHERE pronamespace = (TABLE space) AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.deptype = 'i'
     AND d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND d.objid = p.oid)
  UNION ALL SELECT 'pg_catalog.pg_collation'::pg_catalog.regclass, oid FROM pg_catalog.pg_collation
     WHERE collnamespace = (TABLE space)
  UNION ALL SELECT 'pg_catalog.pg_operator'::pg_catalog.regclass, oid FROM pg_catalog.pg_operator
     WHERE oprnamespace = (TABLE space)
  UNION ALL SELECT 'pg_catalog.pg_ts_config'::pg_catalog.regclass, oid FROM pg_catalog.pg_ts_config
     WHERE cfgnamespace = (TABLE space)
  UNION ALL SELECT 'pg_catalog.pg_ts_dict'::pg_catalog.regclass, oid FROM pg_catalog.pg_ts_dict
     WHERE dictnamespace = (TABLE space)
  UNION ALL SELECT 'pg_catalog.pg_statistic_ext'::pg_catalog.regclass, oid FROM pg_catalog.pg_statistic_ext
     WHERE stxnamespace = (TABLE space))
SELECT CASE i.type WHEN 'statistics object' THEN 'STATISTICS' ELSE pg_catalog.upper(i.type) END AS kind, i.identity
  FROM listed CROSS JOIN LATERAL pg_catalog.pg_identify_object(class, oid, 0) i
 WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_depend e
                    WHERE e.deptype = 'e' AND e.classid = class AND e.objid = listed.oid)
 ORDER BY class IN ('pg_catalog.pg_proc'::pg_catalog.regclass, 'pg_catalog.pg_operator'::pg_catalog.regclass) DESC
"""
_FUNCTIONS = """
SELECT p.oid::pg_catalog.regprocedure::text AS name, pg_catalog.pg_get_functiondef(p.oid) AS definition,
       p.prosrc AS body
  FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = pronamespace
  JOIN pg_catalog.pg_language l ON l.oid = prolang
 WHERE n.nspname = $1 AND prokind <> 'a' AND l.lanname NOT IN ('c', 'internal')
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.deptype = 'e'
         AND e.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND e.objid = p.oid)
"""
_STRING = re.compile(r"'(?:[^']|'')*'")


async def move_schema(connection: Connection, schema: str, into: str) -> None:
    """Move everything in a schema into another one, and drop the schema that is empty then.

    Args:
        connection: As the owner of all of it.
        schema: The schema.
        into: Where to; it is created if it is missing.

    Raises:
        AdoptionError: an object's name is taken there, or one cannot be moved.
    """
    if schema == into:
        return
    target = quote_identifier(into)
    async with transaction(connection):
        await connection.execute("SET LOCAL search_path = pg_catalog, pg_temp")
        if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)", into):
            await connection.execute(f"CREATE SCHEMA {target}")
        for row in await connection.fetch(_OBJECTS, schema):
            moved = f"ALTER {row['kind']} {row['identity']} SET SCHEMA {target}"
            try:
                await connection.execute(moved)
            except Exception as exc:
                raise AdoptionError(
                    f"{row['kind'].lower()} {row['identity']} cannot become {into!r}'s: {describe(exc)}"
                ) from exc
        for row in await connection.fetch(_FUNCTIONS, into):
            if (text := rewritten(row["definition"], schema, into)) != row["definition"]:
                await connection.execute("SET LOCAL check_function_bodies = off")
                await connection.execute(text)
        try:
            await connection.execute(f"DROP SCHEMA {quote_identifier(schema)}")
        except Exception as exc:
            raise AdoptionError(
                f"schema {schema!r} has something that cannot become {into!r}'s: {describe(exc)}"
            ) from exc


def rewritten(definition: str, schema: str, into: str) -> str:
    """Return a function's definition with the schema's name replaced, where it stands before a point.

    Strings are left alone, but for the ``search_path`` that the function sets.
    """
    head, mark, body = definition.partition("\nAS ")
    named = re.compile(_name(schema) + r"(?=\s*\.)")
    replaced = named.sub(_shown(into).replace("\\", r"\\"), _quiet(body))
    path = re.compile(r"(?m)^( SET search_path TO .*)$")

    def in_path(match: re.Match[str]) -> str:
        return match[1].replace(f"'{schema}'", f"'{into}'").replace(f'"{schema}"', f'"{into}"')

    return path.sub(in_path, head) + mark + _loud(replaced, body)


def remaining(found: Catalogue, schema: str) -> list[str]:
    """Return the objects that still name a schema which does not exist any more, in text."""
    before_point = re.compile(_name(schema) + r"\s*\.")
    # a string alone is most often a value; in a function it may become a part of SQL
    in_code = re.compile(before_point.pattern + "|'" + re.escape(schema) + "'")
    return sorted(
        {
            key.target if key.parent is None else f"{key.kind} {key.name} of {key.parent}"
            for key, fields in found.objects.items()
            if any(
                (in_code if key.kind in ("function", "procedure") else before_point).search(value)
                for name, value in fields.items()
                if name != "comment"
            )
        }
    )


def _name(schema: str) -> str:
    """A pattern for a schema's name, quoted or not."""
    plain = rf"(?<![\w.\"$]){schema}" if re.fullmatch(r"[a-z_][a-z0-9_]*", schema) else r"(?!)"
    return rf"(?:{plain}|(?<![\w.]){re.escape(quote_identifier(schema))})"


def _shown(name: str) -> str:
    """A name as people write it."""
    return name if re.fullmatch(r"[a-z_][a-z0-9_]*", name) else quote_identifier(name)


def _quiet(body: str) -> str:
    """The text with placeholders for its strings."""
    return _STRING.sub("''", body)


def _loud(text: str, body: str) -> str:
    """The text with its strings again."""
    strings: Iterable[str] = iter(_STRING.findall(body))
    return _STRING.sub(lambda _: next(strings), text)  # type: ignore[call-overload]


__all__ = ["move_schema", "remaining", "rewritten"]
