"""The report of an adoption, or of a look at one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ..drift.compare import Difference
from ..migrations.plan import format_revision
from ..operations import Operation
from ..tenant import Tenant
from .frame import KEY_SHOWN
from .in_place import InPlaceLook
from .looking import Look, place_of
from .source import OpenSource


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


def copy_report(slug: str, opened: OpenSource, look: Look, started: float) -> AdoptionReport:
    """Return the report of a copy that would be made."""
    former = opened.source.schema
    return AdoptionReport(
        slug=slug,
        source=str(opened.source),
        server=look.server,
        version=opened.version,
        size=opened.size,
        revision=look.revision,
        pending=format_revision(look.end) if look.end != look.heads else None,
        tables=tuple(
            AdoptedTable(
                source=one.label, target=f"{place_of(one, former, look.schema)}.{one.name}", rows=one.rows or 0
            )
            for one in look.contents.tables
        ),
        differences=look.differences,
        refused=look.refused,
        notes=look.notes,
        seconds=time.monotonic() - started,
    )


def in_place_report(slug: str, opened: OpenSource, look: InPlaceLook, started: float) -> AdoptionReport:
    """Return the report of a database that would be taken over."""
    return AdoptionReport(
        slug=slug,
        source=str(opened.source),
        server=look.server,
        in_place=True,
        version=opened.version,
        size=opened.size,
        revision=look.revision,
        pending=format_revision(look.end) if look.end != look.heads else None,
        tables=tuple(
            AdoptedTable(source=one.label, target=one.label, rows=one.rows or 0) for one in look.contents.tables
        ),
        differences=look.differences,
        refused=look.refused,
        foreign_rights=look.foreign_rights,
        notes=look.contents.notes,
        seconds=time.monotonic() - started,
    )


def record_of(report: AdoptionReport) -> dict[str, Any]:
    """Return what the operation records of a report, which ``former_report`` reads again."""
    tables = {one.source: [one.target, one.rows] for one in report.tables}
    return {
        "source": report.source,
        "version": report.version,
        "size": report.size,
        "server": report.server,
        "revision": report.revision,
        "in_place": report.in_place,
        "rows": report.rows,
        # one more would make the record long, and the rows are compared with the snapshot anyway
        "tables": dict(list(tables.items())[:1_000]),
        "accepted": [one.text for one in report.differences][:100],
    }


def former_report(tenant: Tenant, operation: Operation, started: float) -> AdoptionReport:
    """Return the report of an adoption that is complete already."""
    detail = operation.detail
    return AdoptionReport(
        slug=tenant.slug,
        source=detail["source"],
        server=detail["server"],
        in_place=detail["in_place"],
        version=detail["version"],
        size=detail["size"],
        revision=detail["revision"],
        pending=None,
        tables=tuple(
            AdoptedTable(source=source, target=target, rows=rows) for source, (target, rows) in detail["tables"].items()
        ),
        differences=(),
        notes=(f"tenant {tenant.slug!r} has been made of this source already, {KEY_SHOWN}",),
        seconds=time.monotonic() - started,
        tenant=tenant,
        operation=operation.id,
    )


__all__ = ["AdoptedTable", "AdoptionReport", "copy_report", "former_report", "in_place_report", "record_of"]
