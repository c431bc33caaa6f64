"""Output of the commands: tables for people, plain lines for pipes and logs, JSON for programs.

On a terminal a table fits the width: texts are shortened, then columns left out, ids never broken. Without a terminal
nothing is shortened, coloured or framed: a line of headings, then a line for each row, in columns that are aligned by
two spaces or more.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Protocol
from uuid import UUID

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..migrations.logs import TENANT_FAILED
from ..tenant import Tenant

# soft_wrap: a long line is the terminal's to wrap, so that an id can be selected, and searched for
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_GAP = "  "
_SHORTEST = 10  # cells that are left of a text that is shortened


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Args:
        name: Its heading.
        keep: Whether it is never shortened, as an id.
        drop: When it is left out of a table that is too wide: the highest first, 0 never.
    """

    name: str
    keep: bool = False
    drop: int = 0


@contextmanager
def failures_listed() -> Iterator[None]:
    """Print no log line for a tenant that fails in the body, since the command lists it. Handlers still get it."""

    def unlisted(record: logging.LogRecord) -> bool:
        # without a handler, Python prints errors on standard error
        return record.msg != TENANT_FAILED or logging.getLogger(record.name).hasHandlers()

    loggers = [logging.getLogger(f"tenancy_orm.{name}") for name in ("migrations", "seeds")]
    for logger in loggers:
        logger.addFilter(unlisted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(unlisted)


def tenant_fields(tenant: Tenant) -> dict[str, Any]:
    """Return a tenant's fields as JSON values, without its sealed password."""
    placement = tenant.placement
    return {
        "id": str(tenant.id),
        "slug": tenant.slug,
        "status": tenant.status.value,
        "tier": tenant.tier,
        "region": tenant.region,
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
    print(json_text(value))


def json_text(value: Any) -> str:
    """Return ``value`` as JSON, in which no sign controls the terminal."""
    text = json.dumps(value, default=_plain, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf"))
    # what is not printable can only be in a string
    return "".join(sign if sign.isprintable() else json.dumps(sign)[1:-1] for sign in text)


def printable(text: str) -> str:
    """Return ``text``, of one line or several, with the signs that control the terminal as escapes."""
    return "".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in text)


def size_text(count: float) -> str:
    """Return a number of bytes as people write it: 512 bytes, 1.5 MB."""
    unit = 0
    while count >= 1_000 and unit < len(_UNITS) - 1:
        count, unit = count / 1_000, unit + 1
    return f"{count:.{0 if unit == 0 else 1}f} {_UNITS[unit]}"


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


def print_table(title: str, columns: Iterable[str | Column], rows: Iterable[Iterable[Any]]) -> None:
    """Print rows under column headings; None is shown as a dash. The title is for terminals alone."""
    headings = [column if isinstance(column, Column) else Column(column) for column in columns]
    values = [list(row) for row in rows]
    texts = [[cell(value) for value in row] for row in values]
    names = [column.name.upper() for column in headings]
    widths = [max(map(cell_len, column)) for column in zip(names, *texts, strict=True)]
    shown = list(range(len(headings)))
    if sys.stdout.isatty():
        console.print(title, style="italic", markup=False)
        fixed = [
            column.keep or any(isinstance(row[i], (UUID, datetime, int)) for row in values)
            for i, column in enumerate(headings)
        ]
        shown, widths = fit(headings, widths, fixed, console.width)
    console.print(_line(names, shown, widths), style="bold", markup=False)
    for row in texts:
        print(_line(row, shown, widths))
    _flush()


def fit(
    columns: Sequence[Column], widths: Sequence[int], fixed: Sequence[bool], available: int
) -> tuple[list[int], list[int]]:
    """Return the columns that are shown and the width of each, so that a line has at most ``available`` cells.

    Texts are shortened first, then columns are left out; the first column, which names the row, is shortened last. What
    is fixed is never shortened, so that a line of nothing else may be longer.
    """
    shown = list(range(len(columns)))
    while True:
        given = list(widths)
        shortened = [i for i in shown if i and not fixed[i]]
        if _shorten(given, shown, shortened, columns, available):
            return shown, given
        optional = [i for i in shown if columns[i].drop]
        if not optional:
            if not fixed[0]:
                _shorten(given, shown, [0], columns, available)
            return shown, given
        shown.remove(max(optional, key=lambda i: columns[i].drop))


def _shorten(
    widths: list[int], shown: list[int], shortened: list[int], columns: Sequence[Column], available: int
) -> bool:
    """Shorten the widest of the columns that can be, one cell at a time; returns whether the line fits."""
    while (over := sum(widths[i] for i in shown) + len(_GAP) * (len(shown) - 1) - available) > 0:
        longer = [i for i in shortened if widths[i] > max(_SHORTEST, cell_len(columns[i].name))]
        if not longer:
            return False
        widest = max(longer, key=lambda i: widths[i])
        others = [widths[i] for i in longer if i != widest]
        floor = max([_SHORTEST, cell_len(columns[widest].name), *(other - 1 for other in others)])
        widths[widest] -= max(1, min(over, widths[widest] - floor))
    return True


def _line(texts: Sequence[str], shown: Sequence[int], widths: Sequence[int]) -> str:
    return _GAP.join(_padded(texts[i], widths[i]) for i in shown).rstrip()


def _padded(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    mark = "…" if (sys.stdout.encoding or "").lower().startswith("utf") else "..."
    return set_cell_size(text, width - len(mark)) + mark


def print_report(title: str, report: Any, *, as_json: bool) -> None:
    """Print a report, which is a dataclass: as JSON, or a line for each of its fields, chores and errors."""
    if as_json:
        print_json(report)
    else:
        _print_pairs(title, _flat({field.name: getattr(report, field.name) for field in fields(report)}))


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if name == "errors" and value:
            yield from (("error", error) for error in value)
        elif isinstance(value, Mapping):
            yield from ((inner, _summary(found)) for inner, found in value.items())
        else:
            yield name, _summary(value)


def _summary(value: Any) -> str:
    """Return a value of a report in words, without what is empty."""
    if is_dataclass(value) and not isinstance(value, (type, Tenant)):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name} {_summary(inner)}" for name, inner in value.items() if inner not in (None, (), [], {})
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_summary, value))
    return value.slug if isinstance(value, Tenant) else cell(value)


def print_fields(title: str, values: Mapping[str, Any]) -> None:
    """Print names and values, one pair a line. The title is for terminals alone."""
    _print_pairs(title, values.items())


def _print_pairs(title: str, pairs: Iterable[tuple[str, Any]]) -> None:
    if sys.stdout.isatty():
        console.print(title, style="italic", markup=False)
    texts = [(name, cell(value)) for name, value in pairs]
    width = max((cell_len(name) for name, _ in texts), default=0)
    for name, text in texts:
        print(f"{set_cell_size(name, width)}{_GAP}{text}")
    _flush()


def _flush() -> None:
    # a pipe's standard output is buffered and standard error is not: in a log with both, a note would be amid the rows
    sys.stdout.flush()


def note(text: str) -> None:
    """Print what is about the output on standard error, so that it is never taken for a row."""
    errors.print(printable(text), markup=False)


class _HasSlug(Protocol):
    @property
    def slug(self) -> str: ...


def progress_bar(*, shown: bool) -> Progress:
    """Return a bar on standard error; a silent one where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=errors, disable=not (shown and sys.stderr.isatty()))


class TenantBar:
    """Shows how many tenants are done on a bar, with the last one's slug.

    Args:
        bar: What ``progress_bar`` returned.
        verb: What is done.
    """

    def __init__(self, bar: Progress, verb: str) -> None:
        self._bar = bar
        self._verb = verb
        self._task = bar.add_task(verb, total=None)

    def total(self, count: int) -> None:
        """Show of how many."""
        self._bar.update(self._task, total=count)

    def done(self, tenant: str | _HasSlug) -> None:
        """Show that a tenant is done: its slug, or its result."""
        slug = tenant if isinstance(tenant, str) else tenant.slug
        self._bar.update(self._task, advance=1, description=f"{self._verb} {slug}")


def cell(value: Any) -> str:
    """Return the text of a table's cell: one line, in which no sign controls the terminal."""
    if value is None or (isinstance(value, (str, list, tuple, dict)) and not value):
        return "-"
    if isinstance(value, datetime):
        moment = value.astimezone(UTC)
        # one word without a terminal, for awk
        return moment.strftime("%Y-%m-%d %H:%M:%S" if sys.stdout.isatty() else "%Y-%m-%dT%H:%M:%SZ")
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        value = ",".join(value)
    elif isinstance(value, (Mapping, list, tuple)):
        value = json.dumps(value, default=_plain, ensure_ascii=False, separators=(",", ":"))
    return printable(" ".join(str(value).split())) or "-"
