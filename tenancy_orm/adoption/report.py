"""The report of an adoption, or of a look at one."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..drift.compare import Difference
from ..tenant import Tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedTable:
    """A table that is adopted.

    Attributes:
        source: The table in the source, as ``schema.table``.
        target: The table in the tenant's database.
        rows: How many rows it has; a partitioned table has those of its partitions, which are listed.
    """

    source: str
    target: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptionReport:
    """What an adoption has done, or what one would do; ``tenancy adopt``.

    Attributes:
        slug: The tenant's slug.
        source: Where it comes from: host, port, database, and the schema; never a login.
        server: The tenants' server.
        in_place: Whether the database itself becomes the tenant's.
        version: The source's major version of PostgreSQL.
        size: The size of the source's database, in bytes.
        revision: The revision that the source is at; None for base, and without migrations.
        pending: The revision that the tenant is brought to afterwards; None where it is there already.
        tables: Its tables.
        differences: How its schema differs from that of its revision.
        refused: Functions, triggers, views and the like that its revision does not make. They are never adopted.
        foreign_rights: Of a database that is adopted in place: what roles may do there that will not be the tenant's.
        notes: What else is worth knowing: what does not come along, and what was set right.
        seconds: How long it took.
        tenant: The tenant; None where this was a look only.
        api_key: The tenant's first API key, which is shown once; None where there is none.
        operation: The number of the operation.
    """

    slug: str
    source: str
    server: str
    in_place: bool = False
    version: int
    size: int
    revision: str | None
    pending: str | None
    tables: tuple[AdoptedTable, ...]
    differences: tuple[Difference, ...]
    refused: tuple[str, ...] = ()
    foreign_rights: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float
    tenant: Tenant | None = None
    api_key: str | None = field(default=None, repr=False)
    operation: int | None = None

    @property
    def rows(self) -> int:
        """How many rows there are in all."""
        return sum(table.rows for table in self.tables)


__all__ = ["AdoptedTable", "AdoptionReport"]
