"""The differences between two catalogues, each in words, with the statements that mend it where that is safe."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .catalogue import Catalogue, Key, split_target
from .mending import GRANT_OPTION, Mending
from .queries import OWNER, TENANT

Change = Literal["missing", "extra", "changed"]

_LONGEST = 100  # characters of the values in a line
_SHORT_TYPES = {
    "character varying": "varchar",
    "timestamp with time zone": "timestamptz",
    "timestamp without time zone": "timestamp",
    "time with time zone": "timetz",
    "time without time zone": "time",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One way in which a database is not as it should be.

    Args:
        kind: The kind of the object: "column", "index" and so on.
        parent: The object it belongs to, as "table public.notes"; None for others.
        name: Its name, quoted; with the schema, unless it belongs to another object.
        change: "missing", "extra" or "changed".
        field: What is different in an object that has changed: "type", for example.
        expected: The value it should have; None for none.
        found: The value it has.
        text: All of this in one line.
        lines: Those that differ in a long value, after ``-`` (expected) or ``+`` (found).
        statements: SQL that mends it and loses no rows, to be run by an administrator in this order; empty where no
            statement is safe. It names the tenant's role as ``:"tenant_role"``, as a variable of psql.
    """

    kind: str
    parent: str | None
    name: str
    change: Change
    field: str | None = None
    expected: str | None = None
    found: str | None = None
    text: str
    lines: tuple[str, ...] = ()
    statements: tuple[str, ...] = ()


def compare(expected: Catalogue, found: Catalogue) -> list[Difference]:
    """Return what differs in ``found``, object by object.

    What belongs to an object that is missing, or that should not exist, is not listed by itself.

    Args:
        expected: The catalogue of a database as it should be.
        found: The catalogue of another one.
    """
    mending = Mending(expected.objects, found.objects, owner=expected.owner)
    whole = {key.target for key in expected.objects.keys() ^ found.objects.keys() if key.parent is None}
    renamed = _renamed(expected, found)
    differences: list[Difference] = []
    for key in sorted({*expected.objects, *found.objects}, key=_order):
        wanted, has = expected.objects.get(key), found.objects.get(key)
        if wanted == has or key.parent in whole or (wanted is None and key in renamed.values()):
            continue
        if key in renamed:
            differences.append(_rename(key, renamed[key], mending))
            continue
        if key.kind == "privilege":
            differences += _privileges(key, wanted or {}, has or {}, mending)
        elif has is None:
            differences.append(_missing(key, wanted or {}, mending))
        elif wanted is None:
            differences.append(_extra(key, has, mending))
        else:
            differences += _changes(key, wanted, has, mending)
    return differences


def _renamed(expected: Catalogue, found: Catalogue) -> dict[Key, Key]:
    """Indexes and constraints that differ in nothing but their names: those of ``expected``, with the found ones."""
    surplus = {_nameless(key, found): key for key in found.objects.keys() - expected.objects.keys() if _can_rename(key)}
    lacking = sorted(filter(_can_rename, expected.objects.keys() - found.objects.keys()), key=_order)
    # one of each: there may be two such indexes
    matches = {key: surplus.pop(_nameless(key, expected), None) for key in lacking}
    return {key: other for key, other in matches.items() if other is not None}


def _can_rename(key: Key) -> bool:
    return key.kind in ("index", "constraint")


def _nameless(key: Key, catalogue: Catalogue) -> tuple[object, ...]:
    fields = catalogue.objects[key]
    definition = fields["definition"].replace(f"INDEX {key.name} ON", "INDEX ON", 1)
    return key.kind, key.parent, definition, fields.get("state"), fields.get("comment")


def _rename(key: Key, other: Key, mending: Mending) -> Difference:
    return Difference(
        kind=key.kind,
        parent=key.parent,
        name=other.name,
        change="changed",
        field="name",
        expected=key.name,
        found=other.name,
        text=f"{_where(key)}{_label(other)} should be named {key.name}",
        statements=tuple(mending.renamed(key, other)),
    )


def _order(key: Key) -> tuple[str, bool, str, str]:
    return key.parent or key.target, key.parent is not None, key.kind, key.name


def _missing(key: Key, wanted: Mapping[str, str], mending: Mending) -> Difference:
    return Difference(
        kind=key.kind,
        parent=key.parent,
        name=key.name,
        change="missing",
        expected=wanted.get("definition"),
        text=f"{_where(key)}{_label(key)} is missing",
        statements=tuple(mending.missing(key)),
    )


def _extra(key: Key, has: Mapping[str, str], mending: Mending) -> Difference:
    return Difference(
        kind=key.kind,
        parent=key.parent,
        name=key.name,
        change="extra",
        found=has.get("definition"),
        text=f"{_where(key)}{_label(key)} should not exist",
        statements=tuple(mending.surplus(key)),
    )


def _changes(key: Key, wanted: Mapping[str, str], has: Mapping[str, str], mending: Mending) -> Iterator[Difference]:
    for field in dict.fromkeys((*wanted, *has)):
        expected, found = wanted.get(field), has.get(field)
        if expected == found:
            continue
        both = (expected or "") + (found or "")
        long = "\n" in both or len(both) > _LONGEST
        words = f"has another {field}" if long else _words(field, expected, found)
        yield Difference(
            kind=key.kind,
            parent=key.parent,
            name=key.name,
            change="changed",
            field=field,
            expected=expected,
            found=found,
            text=f"{_where(key)}{_label(key)} {words}",
            lines=tuple(_lines(expected or "", found or "")) if long else (),
            statements=tuple(mending.changed(key, field)),
        )


def _words(field: str, expected: str | None, found: str | None) -> str:
    if field == "not null" and "yes" in (expected, found) and None in (expected, found):
        return "may be NULL, should be NOT NULL" if found is None else "is NOT NULL, should not be"
    if field == "persistence":
        return f"is {found or 'logged'}, should be {expected or 'logged'}"
    if expected == "yes":
        return f"has no {field}, should have it"
    if found == "yes":
        return f"has {field}, should not have it"
    if field in ("type", "definition", "state") and expected is not None and found is not None:
        return f"is {_shown(found)}, should be {_shown(expected)}"
    if field == "state":
        return (
            f"is {found or 'enabled'}, should be {expected or 'enabled'}"
            if expected or found != "invalid"
            else ("is invalid")
        )
    if found is None:
        return f"has no {field}, should have {_shown(expected)}"
    return f"has {field} {_shown(found)}, should have {'none' if expected is None else _shown(expected)}"


def _privileges(key: Key, wanted: Mapping[str, str], has: Mapping[str, str], mending: Mending) -> Iterator[Difference]:
    expected, found = (set(filter(None, of.get("privileges", "").split(", "))) for of in (wanted, has))
    lacking = {one for one in expected - found if f"{one}{GRANT_OPTION}" not in found}
    column, _, grantee = key.name.rpartition(" ")
    where = _where(key)[:-2] + (f", column {column}" if column else "")
    for change, privileges in (("missing", sorted(lacking)), ("extra", sorted(found - expected))):
        if not privileges:
            continue
        listed = ", ".join(privileges)
        yield Difference(
            kind=key.kind,
            parent=key.parent,
            name=key.name,
            change="missing" if change == "missing" else "extra",
            field="privileges",
            expected=wanted.get("privileges"),
            found=has.get("privileges"),
            text=f"{where}: {_shown(grantee)} {'lacks' if change == 'missing' else 'should not have'} {listed}",
            statements=tuple(
                mending.granted(key, privileges) if change == "missing" else mending.revoked(key, privileges, expected)
            ),
        )


def _where(key: Key) -> str:
    if key.parent is None:
        return ""
    kind, name = split_target(key.parent)
    return f"{kind} {_short(name)}: "


def _label(key: Key) -> str:
    return f"{key.kind} {_short(_shown(key.name))}"


def _short(name: str) -> str:
    return name.removeprefix("public.")


def _shown(value: str | None) -> str:
    """Return a value as it is shown: with the usual short names of types."""
    text = (value or "").replace(OWNER, "the owner").replace(TENANT, "the tenant's role")
    for long, short in _SHORT_TYPES.items():
        if text == long or text.startswith(f"{long}("):
            return short + text[len(long) :]
    return text


def _lines(expected: str, found: str) -> Iterator[str]:
    for line in difflib.unified_diff(expected.splitlines(), found.splitlines(), lineterm="", n=0):
        if not line.startswith(("---", "+++", "@@")):
            yield line


__all__ = ["Difference", "compare"]
