"""The report of an adoption by rows, or of a dry run of one."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..tenant import Tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRows:
    """The rows of one table that come along.

    Attributes:
        source: The table in the source, as ``schema.table``.
        target: The table in the tenant's database; None where it does not come along.
        rows: How many rows come along.
        total: How many rows the source has.
        nobodys: How many rows have no customer: the customer's column is NULL, or every reference that is followed.
        how: How its rows are reached.
        shared: Whether every customer gets all of it.
    """

    source: str
    target: str | None
    rows: int
    total: int
    nobodys: int = 0
    how: str
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsReport:
    """What an adoption by rows has done, or what one would do; ``tenancy adopt --where``.

    Attributes:
        slug: The tenant's slug.
        source: Where it comes from: host, port and database; never a login.
        where: The root condition.
        server: The tenants' server.
        revision: The revision that the rows are brought to first; None for base.
        pending: The revision that the tenant is brought to afterwards; None where it is there already.
        customer: The value that the customer's column has in the rows; None where no row has one.
        tables: Every table of the source.
        problems: What refuses it.
        notes: What else is worth knowing.
        seconds: How long it took.
        tenant: The tenant; None where this was a look only.
        api_key: The tenant's first API key, which is shown once; None where there is none.
        operation: The number of the operation.
    """

    slug: str
    source: str
    where: str
    server: str
    revision: str | None
    pending: str | None
    customer: str | None = None
    tables: tuple[TableRows, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float
    tenant: Tenant | None = None
    api_key: str | None = field(default=None, repr=False)
    operation: int | None = None

    @property
    def rows(self) -> int:
        """How many rows come along in all."""
        return sum(table.rows for table in self.tables)


__all__ = ["RowsReport", "TableRows"]
