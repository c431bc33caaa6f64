"""``Catalogue``: a database's schema, as PostgreSQL's catalogue describes it, and its fingerprint."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import asyncpg

from ..postgres.connections import Connection, finish, version
from ..postgres.errors import sqlstate_of
from .queries import FIELDS, KIND_OF, PRESENT, TENANT, catalogue

# the first so that no name is found in a tenant's schema; the others have an influence on what PostgreSQL prints
_SETTINGS = "; ".join(
    f"SET LOCAL {name} = {value}"
    for name, value in (
        ("search_path", "pg_catalog, pg_temp"),
        ("DateStyle", "'ISO, YMD'"),
        ("IntervalStyle", "postgres"),
        ("TimeZone", "'UTC'"),
        ("bytea_output", "hex"),
        ("extra_float_digits", "1"),
        ("lc_monetary", "'C'"),
        ("quote_all_identifiers", "off"),
        ("standard_conforming_strings", "on"),
        # compiling the query takes longer than running it
        ("jit", "off"),
    )
)
_INTERNAL_ERROR = "XX000"
_ROWS = 5_000  # rows that are fetched at once
_ATTEMPTS = 3  # an object that is dropped while it is printed is an internal error


@dataclass(frozen=True, slots=True)
class Key:
    """What identifies an object: its kind, what it belongs to ("table public.notes") or None, and its name, quoted."""

    kind: str
    parent: str | None
    name: str

    @property
    def target(self) -> str:
        """How objects that belong to this one name it."""
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The schema of one database: its objects, each with the fields that are set.

    The owner of all tenants' schemas is ``OWNER`` in it, and the tenant's role ``TENANT``, so that the databases of
    different tenants can be equal. Neither the order of a table's columns is in it, nor rows, the positions of
    sequences, statistics, tablespaces and settings of autovacuum.

    Args:
        objects: The fields of each object.
        owner: The name of the owner of all tenants' schemas.
    """

    objects: Mapping[Key, Mapping[str, str]]
    owner: str = field(compare=False)

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that two databases share if their schemas are equal."""
        lines = sorted(
            json.dumps([key.kind, key.parent, key.name, *sorted(fields.items())])
            for key, fields in self.objects.items()
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]

    @property
    def tenant_owned(self) -> tuple[str, ...]:
        """What the tenant's role owns, in order: "table sandbox.drafts"."""
        return tuple(sorted(key.target for key, fields in self.objects.items() if fields.get("owner") == TENANT))

    def without(self, ignored: Ignored) -> Catalogue:
        """Return this without the objects that are ignored, and what belongs to them."""
        if not ignored.patterns:
            return self
        kept = {key: fields for key, fields in self.objects.items() if not ignored.match(key, fields)}
        return Catalogue(kept, self.owner)


@dataclass(frozen=True)
class Ignored:
    """Objects that no comparison looks at.

    Args:
        patterns: Of names, as in a shell: ``events_*`` and ``audit.*``. One may begin with a kind: ``publication
            cdc_*``.
    """

    patterns: tuple[str, ...] = ()

    def match(self, key: Key, fields: Mapping[str, str] = MappingProxyType({})) -> bool:
        """Whether an object is ignored: by its own name, or since it belongs to one that is.

        What belongs to another object is named with its kind: ``index notes_*``, ``column notes.legacy_*``.
        """
        if not self.patterns:
            return False
        if key.parent is None:
            column = fields.get("owned by") if key.kind == "sequence" else None
            owner = None if column is None else f"table {column.rpartition('.')[0]}"
            return self._matches(key.target) or (owner is not None and self._matches(owner))
        if self._matches(key.parent):
            return True
        _, parent = split_target(key.parent)
        schema = parent.partition(".")[0]
        forms = (f"{key.kind} {schema}.{key.name}", f"{key.kind} {parent}.{key.name}", key.target)
        return any(self._matches(form, bare=False) for form in forms)

    def _matches(self, target: str, *, bare: bool = True) -> bool:
        kind, name = split_target(target)
        names = (name, name.removeprefix("public."))
        forms = [f"{kind} {form}" for form in names] + (list(names) if bare else [])
        return any(pattern.fullmatch(form) for pattern in self._compiled for form in forms)

    @cached_property
    def _compiled(self) -> list[re.Pattern[str]]:
        return [re.compile(fnmatch.translate(pattern)) for pattern in self.patterns]


def split_target(target: str) -> tuple[str, str]:
    """Return the kind and the name of "table public.notes"."""
    kind = next((kind for kind in _LONGEST_FIRST if target.startswith(f"{kind} ")), target.partition(" ")[0])
    return kind, target[len(kind) + 1 :]


_LONGEST_FIRST = sorted((*FIELDS, *KIND_OF), key=len, reverse=True)


async def read(
    connection: Connection,
    *,
    owner: str,
    role: str | None = None,
    ignored: Ignored | None = None,
    timeout: float | None = None,
) -> Catalogue:
    """Read the catalogue of the database that ``connection`` leads to, in one snapshot; it changes nothing.

    Args:
        connection: An administrative one, or of the owner. In a transaction that is open, nobody else may change the
            schema, unless its snapshot stays the same.
        owner: The owner of all tenants' schemas.
        role: The tenant's role, if the database is a tenant's.
        ignored: What is left out.
        timeout: Seconds that the query may take.

    Raises:
        asyncpg.PostgresError: PostgreSQL refused, or a table's lock was not free in time.
        TimeoutError: it took longer than ``timeout``.
    """
    ignored = ignored or Ignored()
    for attempt in range(_ATTEMPTS):
        # a savepoint where a transaction is open: its end restores the settings
        isolation = None if connection.is_in_transaction() else "repeatable_read"
        transaction = connection.transaction(isolation=isolation)
        await transaction.start()
        try:
            await connection.execute(_SETTINGS)
            return Catalogue(await _objects(connection, owner, role, ignored, timeout), owner)
        except asyncpg.PostgresError as exc:
            if sqlstate_of(exc) != _INTERNAL_ERROR or attempt == _ATTEMPTS - 1:
                raise
        finally:
            await finish(connection, transaction.rollback)
    raise AssertionError("unreachable")


async def _objects(
    connection: Connection, owner: str, role: str | None, ignored: Ignored, timeout: float | None
) -> dict[Key, Mapping[str, str]]:
    present = frozenset(await connection.fetchval(PRESENT, timeout=timeout))
    # by a cursor: an application may have made a hundred thousand partitions, which are ignored
    cursor = connection.cursor(
        catalogue(version(connection), present), owner, role or "", prefetch=_ROWS, timeout=timeout
    )
    objects: dict[Key, Mapping[str, str]] = {}
    async for kind, parent, name, values in cursor:
        key, fields = Key(kind, parent, name), _fields(kind, values)
        if not ignored.match(key, fields):
            objects[key] = fields
    return objects


def _fields(kind: str, values: Sequence[str | None]) -> Mapping[str, str]:
    names = FIELDS.get(KIND_OF.get(kind, kind), ())
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


__all__ = ["Catalogue", "Ignored", "Key", "read"]
