"""Statements that make a database as it should be, only where none can lose a row.

Nothing here drops a table, a column, a sequence or a type, or converts values. A statement may fail, for example
because the rows do not fit a constraint: then nothing has changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from ..postgres.quoting import quote_identifier, quote_literal
from .catalogue import Key, split_target
from .queries import KIND_OF, OWNER, TENANT

Objects = Mapping[Key, Mapping[str, str]]

GRANT_OPTION = " WITH GRANT OPTION"

TENANT_ROLE = ':"tenant_role"'

_VARCHAR = re.compile(r"character varying(?:\((\d+)\))?$")
_ON_PARTITIONED = " ON ONLY "
_NOT_VALID = " NOT VALID"
_STATES = {
    None: "ENABLE",
    "disabled": "DISABLE",
    "enabled on replicas": "ENABLE REPLICA",
    "enabled always": "ENABLE ALWAYS",
}
_SEQUENCE = {
    "increment": "INCREMENT BY {}",
    "minimum": "MINVALUE {}",
    "maximum": "MAXVALUE {}",
    "cache": "CACHE {}",
}
# what GRANT, ALTER and COMMENT call objects
_WORDS = {"window function": "FUNCTION", "foreign server": "SERVER"}
_GRANT_WORDS = {"view": "TABLE", "materialized view": "TABLE", "foreign table": "TABLE", "aggregate": "FUNCTION"}
_TYPES = frozenset(kind for kind, general in KIND_OF.items() if general == "type")


class Mending:
    """Finds the statements for differences.

    Args:
        expected: The objects of a database as it should be.
        found: The objects of the database to mend.
        owner: The owner of all tenants' schemas.
    """

    def __init__(self, expected: Objects, found: Objects, *, owner: str) -> None:
        self._expected = expected
        self._found = found
        self._owner = quote_identifier(owner)

    # --- objects that are missing -----------------------------------------------------------------------------------

    def missing(self, key: Key) -> list[str]:
        """Return the statements that create an object."""
        return [self._named(one) for one in self._create(key, self._expected[key])]

    def _create(self, key: Key, fields: Mapping[str, str]) -> Iterable[str]:
        definition = fields.get("definition", "")
        on = self._table_of(key)
        match key.kind:
            case "schema":
                yield f"CREATE SCHEMA {key.name} AUTHORIZATION {self._owner}"
            case "column":
                yield from self._add_column(key, fields)
            case "constraint" if on is not None:
                yield from _add_constraint(key, on, definition)
            case "constraint":
                yield f"ALTER {key.parent} ADD CONSTRAINT {key.name} {definition}"
            case "index":
                yield _create_index(definition)
            case "trigger":
                yield definition
                yield from self._trigger_state(key, fields)
            case "rule":
                yield definition.rstrip(";")
            case "statistics":
                yield definition
                yield from self._owned(key, fields)
            case "domain":
                default = f" DEFAULT {fields['default']}" if "default" in fields else ""
                yield f"CREATE DOMAIN {key.name} AS {definition}{default}{' NOT NULL' * ('not null' in fields)}"
                yield from self._owned(key, fields)
            case "view" | "materialized view":
                options = f" WITH ({fields['options']})" if "options" in fields else ""
                yield f"CREATE {key.kind.upper()} {key.name}{options} AS {definition.strip().rstrip(';')}"
                yield from self._owned(key, fields)
            case "function" | "procedure" | "window function":
                yield definition.strip()
                yield from self._owned(key, fields)
            case "enum":
                yield f"CREATE TYPE {key.name} AS ENUM ({definition})"
                yield from self._owned(key, fields)
            case "composite type":
                yield f"CREATE TYPE {key.name} AS ({definition})"
                yield from self._owned(key, fields)
            case "policy" if on is not None:
                yield _create_policy(key, on, fields)
            case "extension":
                yield f"CREATE EXTENSION {key.name} SCHEMA {fields['schema']}"
            case _:
                return
        if (comment := fields.get("comment")) is not None:
            yield from self._comment(key, comment)

    def _add_column(self, key: Key, fields: Mapping[str, str]) -> Iterable[str]:
        on = self._table_of(key)
        if on is None or ("not null" in fields and not {"default", "identity", "generated"} & fields.keys()):
            return  # there is no value for the rows that exist
        parts = [f"ALTER TABLE {on} ADD COLUMN {key.name} {fields['type']}"]
        if "collation" in fields:
            parts.append(f"COLLATE {fields['collation']}")
        if "default" in fields:
            parts.append(f"DEFAULT {fields['default']}")
        if "identity" in fields:
            parts.append(f"GENERATED {fields['identity'].upper()} AS IDENTITY")
        if "generated" in fields:
            expression, _, kept = fields["generated"].rpartition(" ")
            parts.append(f"GENERATED ALWAYS AS ({expression}) {kept.upper()}")
        if "not null" in fields:
            parts.append("NOT NULL")
        yield " ".join(parts)

    def _owned(self, key: Key, fields: Mapping[str, str]) -> Iterable[str]:
        yield f"ALTER {alter_word(key.kind)} {key.name} OWNER TO {fields['owner']}"

    # --- objects that should not exist ------------------------------------------------------------------------------

    def surplus(self, key: Key) -> list[str]:
        """Return the statements that drop an object, if no row can be lost; they fail if something depends on it."""
        on = self._table_of(key)
        match key.kind:
            case "index":
                return [_drop_index(key, self._found[key]["definition"])]
            case "constraint":
                return [f"ALTER {'TABLE ' + on if on is not None else key.parent} DROP CONSTRAINT {key.name}"]
            case "trigger" | "policy" | "rule":
                return [f"DROP {key.kind.upper()} {key.name} ON {split_target(key.parent or '')[1]}"]
            case "view" | "function" | "procedure" | "aggregate" | "statistics":
                return [f"DROP {key.kind.upper()} {key.name}"]
        return []

    def renamed(self, key: Key, other: Key) -> list[str]:
        """Return the statements that give the index or constraint ``other`` the name of ``key``."""
        if key.kind == "index":
            schema = split_target(key.parent or "")[1].partition(".")[0]
            return [f"ALTER INDEX {schema}.{other.name} RENAME TO {key.name}"]
        on = self._table_of(key)
        target = key.parent if on is None else f"TABLE {on}"
        return [f"ALTER {target} RENAME CONSTRAINT {other.name} TO {key.name}"]

    # --- objects that have changed ----------------------------------------------------------------------------------

    def changed(self, key: Key, field: str) -> list[str]:
        """Return the statements that give a field its expected value."""
        wanted = self._expected[key].get(field)
        if field == "comment":
            return [self._named(one) for one in self._comment(key, wanted)]
        if field == "owner" and wanted is not None:
            return [self._named(one) for one in self._owned(key, self._expected[key])]
        general = KIND_OF.get(key.kind, key.kind)
        change = {
            "table": self._table,
            "column": self._column,
            "constraint": self._constraint,
            "index": self._index,
            "view": self._view,
            "function": self._function,
            "trigger": self._trigger,
            "policy": self._policy,
            "sequence": self._sequence,
            "type": self._type,
            "extension": self._extension,
        }.get(general)
        return [] if change is None else [self._named(one) for one in change(key, field, wanted)]

    def _table(self, key: Key, field: str, wanted: str | None) -> Iterable[str]:
        alter = f"ALTER TABLE {key.name}"
        match field:
            case "row security":
                yield f"{alter} {'ENABLE' if 'enabled' in (wanted or '') else 'DISABLE'} ROW LEVEL SECURITY"
                yield f"{alter} {'' if 'forced' in (wanted or '') else 'NO '}FORCE ROW LEVEL SECURITY"
            case "replica identity":
                kind, _, index = (wanted or "default").partition(" ")
                # the index is named without its schema
                using = f"USING INDEX {index.rpartition('.')[2]}" if index else kind.upper()
                yield f"{alter} REPLICA IDENTITY {using}"
            case "options":
                yield from self._options(key, "TABLE", wanted)

    def _options(self, key: Key, word: str, wanted: str | None) -> Iterable[str]:
        had = self._found[key].get("options")
        names = {one.partition("=")[0] for one in (wanted or "").split(", ")}
        surplus = [one.partition("=")[0] for one in had.split(", ")] if had else []
        if gone := [name for name in surplus if name not in names]:
            yield f"ALTER {word} {key.name} RESET ({', '.join(gone)})"
        if wanted:
            yield f"ALTER {word} {key.name} SET ({wanted})"

    def _column(self, key: Key, field: str, wanted: str | None) -> Iterable[str]:
        alter = f"ALTER TABLE {self._table_of(key)} ALTER COLUMN {key.name}"
        match field:
            case "default":
                yield f"{alter} DROP DEFAULT" if wanted is None else f"{alter} SET DEFAULT {wanted}"
            case "not null" if wanted != "not valid":
                yield f"{alter} {'DROP' if wanted is None else 'SET'} NOT NULL"
            case "type" if wanted is not None and _widens(self._found[key]["type"], wanted):
                # without this, the column would get the collation of its type
                collation = self._expected[key].get("collation")
                yield f"{alter} TYPE {wanted}{f' COLLATE {collation}' if collation is not None else ''}"
            case "storage" if wanted is not None:
                yield f"{alter} SET STORAGE {wanted.upper()}"
            case "identity" if wanted is not None and "identity" in self._found[key]:
                yield f"{alter} SET GENERATED {wanted.upper()}"

    def _constraint(self, key: Key, field: str, wanted: str | None) -> Iterable[str]:
        if field == "definition" and self._found[key].get(field) == f"{wanted}{_NOT_VALID}":
            on = self._table_of(key)
            yield f"ALTER {key.parent if on is None else f'TABLE {on}'} VALIDATE CONSTRAINT {key.name}"

    def _index(self, key: Key, field: str, wanted: str | None) -> Iterable[str]:
        schema = split_target(key.parent or "")[1].partition(".")[0]
        if field == "state" and wanted is None:
            yield f"REINDEX INDEX CONCURRENTLY {schema}.{key.name}"
        elif field == "definition" and wanted is not None:
            yield _drop_index(key, self._found[key]["definition"])
            yield _create_index(wanted)

    def _view(self, key: Key, field: str, wanted: str | None) -> Iterable[str]:
        if key.kind != "view":
            return
        if field == "options":
            yield from self._options(key, "VIEW", wanted)
        elif field == "definition" and wanted is not None:
            options = self._expected[key].get("options")
            given = f" WITH ({options})" if options else ""
            yield f"CREATE OR REPLACE VIEW {key.name}{given} AS {wanted.strip().rstrip(';')}"

    def _function(self, key: Key, field: str, wanted: str | None) -> Iterable[str]:
        if field != "definition" or wanted is None or key.kind == "aggregate":
            return
        # neither the names of arguments nor the result can be replaced
        before, after = (text.partition("\n LANGUAGE ")[0] for text in (self._found[key][field], wanted))
        if before == after:
            yield wanted.strip()

    def _trigger(self, key: Key, field: str, wanted: str | None) -> Iterable[str]:
        table = self._table_of(key)
        if table is None:
            return
        if field == "state":
            yield f"ALTER TABLE {table} {_STATES[wanted]} TRIGGER {key.name}"
        elif field == "definition" and wanted is not None:
            yield f"DROP TRIGGER {key.name} ON {table}"
            yield wanted
            yield from self._trigger_state(key, self._expected[key])

    def _trigger_state(self, key: Key, fields: Mapping[str, str]) -> Iterable[str]:
        """A new trigger is enabled."""
        if "state" in fields:
            yield f"ALTER TABLE {self._table_of(key)} {_STATES[fields['state']]} TRIGGER {key.name}"

    def _policy(self, key: Key, field: str, wanted: str | None) -> Iterable[str]:
        table = self._table_of(key)
        if table is None:
            return
        if field in ("command", "mode") or wanted is None:
            yield f"DROP POLICY {key.name} ON {table}"
            yield _create_policy(key, table, self._expected[key])
        else:
            clause = {"roles": f"TO {wanted}", "using": f"USING ({wanted})", "check": f"WITH CHECK ({wanted})"}[field]
            yield f"ALTER POLICY {key.name} ON {table} {clause}"

    def _sequence(self, key: Key, field: str, wanted: str | None) -> Iterable[str]:
        if field in _SEQUENCE and wanted is not None:
            yield f"ALTER SEQUENCE {key.name} {_SEQUENCE[field].format(wanted)}"
        elif field == "cycle":
            yield f"ALTER SEQUENCE {key.name} {'NO ' if wanted is None else ''}CYCLE"

    def _type(self, key: Key, field: str, wanted: str | None) -> Iterable[str]:
        if key.kind == "enum" and field == "definition" and wanted is not None:
            yield from _add_labels(key.name, self._found[key].get("definition", ""), wanted)
        elif key.kind == "domain" and field == "default":
            alter = f"ALTER DOMAIN {key.name}"
            yield f"{alter} DROP DEFAULT" if wanted is None else f"{alter} SET DEFAULT {wanted}"
        elif key.kind == "domain" and field == "not null":
            yield f"ALTER DOMAIN {key.name} {'DROP' if wanted is None else 'SET'} NOT NULL"

    def _extension(self, key: Key, field: str, wanted: str | None) -> Iterable[str]:
        if field == "version" and wanted is not None:
            yield f"ALTER EXTENSION {key.name} UPDATE TO {quote_literal(wanted)}"

    # --- privileges -------------------------------------------------------------------------------------------------

    def granted(self, key: Key, privileges: Sequence[str]) -> list[str]:
        """Return the statements that grant privileges to the grantee of ``key``."""
        plain = [one for one in privileges if not one.endswith(GRANT_OPTION)]
        grantable = [one.removesuffix(GRANT_OPTION) for one in privileges if one.endswith(GRANT_OPTION)]
        statements = []
        for chosen, option in ((plain, ""), (grantable, GRANT_OPTION)):
            if chosen:
                right, grantee = self._right(key, chosen)
                statements.append(self._named(f"GRANT {right} TO {grantee}{option}"))
        return statements

    def revoked(self, key: Key, privileges: Sequence[str], kept: Collection[str]) -> list[str]:
        """Return the statements that revoke privileges; of those that are ``kept``, only the right to grant them."""
        names = [one.removesuffix(GRANT_OPTION) for one in privileges]
        statements = []
        for what, chosen in (
            ("REVOKE", [name for name in names if name not in kept]),
            ("REVOKE GRANT OPTION FOR", [name for name in names if name in kept]),
        ):
            if chosen:
                right, grantee = self._right(key, chosen)
                statements.append(self._named(f"{what} {right} FROM {grantee}"))
        return statements

    def _right(self, key: Key, privileges: Iterable[str]) -> tuple[str, str]:
        column, _, grantee = key.name.rpartition(" ")
        kind, name = split_target(key.parent or "")
        part = f" ({column})" if column else ""
        listed = ", ".join(one + part for one in privileges)
        return f"{listed} ON {_GRANT_WORDS.get(kind, alter_word(kind))} {name}", grantee

    # --- parts ------------------------------------------------------------------------------------------------------

    def _comment(self, key: Key, wanted: str | None) -> Iterable[str]:
        text = "NULL" if wanted is None else quote_literal(wanted)
        if key.parent is None:
            yield f"COMMENT ON {alter_word(key.kind)} {key.name} IS {text}"
            return
        kind, on = split_target(key.parent)
        match key.kind:
            case "column":
                yield f"COMMENT ON COLUMN {on}.{key.name} IS {text}"
            case "index":
                yield f"COMMENT ON INDEX {on.partition('.')[0]}.{key.name} IS {text}"
            case "constraint":
                of = "DOMAIN " if kind == "domain" else ""
                yield f"COMMENT ON CONSTRAINT {key.name} ON {of}{on} IS {text}"
            case "trigger":
                yield f"COMMENT ON TRIGGER {key.name} ON {on} IS {text}"

    def _table_of(self, key: Key) -> str | None:
        """The table that an object belongs to; None for what belongs to something else."""
        if key.parent is None:
            return None
        kind, name = split_target(key.parent)
        return name if kind in ("table", "foreign table", "view", "materialized view") else None

    def _named(self, statement: str) -> str:
        return statement.replace(OWNER, self._owner).replace(TENANT, TENANT_ROLE)


def alter_word(kind: str) -> str:
    """Return what ALTER calls a kind of object."""
    if kind in _TYPES:
        return "DOMAIN" if kind == "domain" else "TYPE"
    return _WORDS.get(kind, kind.upper())


def _add_constraint(key: Key, table: str, definition: str) -> Iterable[str]:
    add = f"ALTER TABLE {table} ADD CONSTRAINT {key.name} {definition}"
    if definition.startswith(("CHECK", "FOREIGN KEY")) and not definition.endswith(("NOT VALID", "NOT ENFORCED")):
        # so that the table is not locked while its rows are read
        yield f"{add}{_NOT_VALID}"
        yield f"ALTER TABLE {table} VALIDATE CONSTRAINT {key.name}"
    else:
        yield add


def _create_index(definition: str) -> str:
    """The statement for an index; writers are not blocked, except where PostgreSQL cannot do so."""
    if _ON_PARTITIONED in definition:
        return definition.replace(_ON_PARTITIONED, " ON ", 1)
    return definition.replace(" INDEX ", " INDEX CONCURRENTLY ", 1)


def _drop_index(key: Key, definition: str) -> str:
    schema = split_target(key.parent or "")[1].partition(".")[0]
    return f"DROP INDEX {'' if _ON_PARTITIONED in definition else 'CONCURRENTLY '}{schema}.{key.name}"


def _create_policy(key: Key, table: str, fields: Mapping[str, str]) -> str:
    parts = [f"CREATE POLICY {key.name} ON {table}"]
    if "mode" in fields:
        parts.append("AS RESTRICTIVE")
    parts.append(f"FOR {fields['command']} TO {fields['roles']}")
    if "using" in fields:
        parts.append(f"USING ({fields['using']})")
    if "check" in fields:
        parts.append(f"WITH CHECK ({fields['check']})")
    return " ".join(parts)


def _widens(found: str, wanted: str) -> bool:
    """Whether every value of a type is one of the other, so that no row changes."""
    was, becomes = _VARCHAR.match(found), _VARCHAR.match(wanted)
    if was is None:
        return (found, wanted) in {("smallint", "integer"), ("smallint", "bigint"), ("integer", "bigint")}
    if becomes is None:
        return wanted == "text"
    return becomes[1] is None or (was[1] is not None and int(becomes[1]) >= int(was[1]))


def _add_labels(name: str, found: str, wanted: str) -> Iterable[str]:
    """Add the labels that an enum lacks; nothing where others have to go, or to be in another order."""
    if "\\" in found + wanted:
        return  # a literal with other rules
    labels, has = ([one[0] for one in re.findall(r"('(?:[^']|'')*')()", text)] for text in (wanted, found))
    if [label for label in labels if label in has] != has:
        return
    before: str | None = None
    for label in labels:
        if label not in has:
            place = f" AFTER {before}" if before is not None else f" BEFORE {has[0]}" if has else ""
            yield f"ALTER TYPE {name} ADD VALUE {label}{place}"
        before = label


__all__ = ["GRANT_OPTION", "TENANT_ROLE", "Mending"]
