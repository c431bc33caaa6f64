"""Output of the commands: tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from datetime import datetime
from enum import Enum
from ipaddress import IPv4Network, IPv6Network
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..tenant import Tenant

# a pipe or a file has no width, and an id that is broken over two lines cannot be searched for
_PIPED_WIDTH = 400

console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH)
errors = Console(stderr=True)


def tenant_fields(tenant: Tenant) -> dict[str, Any]:
    """Return a tenant's fields as JSON values, without its sealed password."""
    placement = tenant.placement
    return {
        "id": str(tenant.id),
        "slug": tenant.slug,
        "status": tenant.status.value,
        "tier": tenant.tier,
        "server": placement.server if placement else None,
        "database": placement.database if placement else None,
        "schema_revision": tenant.schema_revision,
        "metadata": dict(tenant.metadata),
        "quotas": dict(tenant.quotas),
        "reason": tenant.reason,
        "timezone": tenant.timezone,
        "trial_ends_at": tenant.trial_ends_at,
        "suspend_at": tenant.suspend_at,
        "purge_at": tenant.purge_at,
        "created_at": tenant.created_at,
        "updated_at": tenant.updated_at,
        "deleted_at": tenant.deleted_at,
    }


def print_json(value: Any) -> None:
    """Print ``value`` as JSON, one document, unstyled and unwrapped."""
    print(json.dumps(value, default=_plain, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (UUID, IPv4Network, IPv6Network)):
        return str(value)
    if isinstance(value, Tenant):
        return tenant_fields(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print rows under column headings; None is shown as a dash."""
    # a title of Rich's own is broken to the width of its table
    console.print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
    table = Table(header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell(value)) for value in row))
    console.print(table)


def print_report(title: str, report: Any, *, as_json: bool) -> None:
    """Print a report, which is a dataclass: as JSON, or as a table of its fields."""
    if as_json:
        print_json(report)
    else:
        print_fields(title, {field.name: getattr(report, field.name) for field in fields(report)})


def print_fields(title: str, values: Mapping[str, Any]) -> None:
    """Print names and values, one pair a line."""
    print_table(title, ("field", "value"), values.items())


def cell(value: Any) -> str:
    """Return the text of a table's cell."""
    if value is None or value == "":
        return "-"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, default=_plain, ensure_ascii=False)
    return str(value)
