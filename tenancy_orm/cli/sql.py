"""``tenancy sql``: one statement on many tenants, in one table."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import counted
from ..queries import TenantRows
from ..tenancy import Tenancy
from . import values
from .output import Column, note, print_json, print_table, printable
from .runtime import EXIT_FAILED, Json, Yes, duration, fail, operator, run
from .selection import All, Also, Concurrency, Selection, Statuses, Tiers

_AUDITED_TENANTS = 1_000  # how many slugs an entry of the audit log lists
_AUDITED_CHARACTERS = 10_000
# what SQLAlchemy takes for a parameter
_PARAMETER = re.compile(r"(?<![:\w\\]):(\w+)(?!:)")
_NAME = re.compile(r"[A-Za-z_]\w*")
_KINDS = {int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


def sql(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STATEMENT TENANT",
            help="One SQL statement, without --file; then tenants, by slug, former slug, verified domain or id.",
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", help="Read the statement from a file; - is input.")
    ] = None,
    tenant: Also = None,
    tier: Tiers = None,
    status: Statuses = None,
    everyone: All = False,
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", metavar="NAME=VALUE", help="Value of :NAME; repeatable.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Let the statement write, and commit it. Asks first.")] = False,
    timeout: Annotated[str, typer.Option(help="How long it may take in each database, such as 30s.")] = "30s",
    max_rows: Annotated[int, typer.Option(min=1, help="How many rows of each tenant are read.")] = 1_000,
    concurrency: Concurrency = 8,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Run one SQL statement on tenants, read-only unless --write. Exit status 1 if it failed for some. Audited."""
    named = list(arguments or ())
    if file is not None:
        statement = _read(file)
    elif named:
        statement = named.pop(0)
    else:
        fail("there is no statement: give one, or --file", kind="ConfigurationError")
    if as_csv and as_json:
        fail("give --csv or --json, not both", kind="ConfigurationError")
    selection = Selection.of([*named, *(tenant or ())], tier, status, everyone)
    parameters = _parameters(param or ())
    limit = duration(timeout, longest=timedelta(days=1))
    assert limit is not None  # noqa: S101 - for the type checker

    async def command(tenancy: Tenancy) -> list[TenantRows]:
        tenants = await selection.find(tenancy)
        if write:
            selection.ask("Write to the databases of", tenants, yes=yes)
        query = tenancy.query_all(
            _escaped(statement, parameters),
            parameters,
            tenants=tenants,
            concurrency=concurrency,
            timeout=limit.total_seconds(),
            max_rows=max_rows,
            write=write,
            yield_errors=True,
        )
        if not tenants:
            return []
        detail = {
            "statement": statement[:_AUDITED_CHARACTERS],
            "write": write,
            "tenants": [one.slug for one in tenants[:_AUDITED_TENANTS]],
            "count": len(tenants),
        }
        async with tenancy.internals.control.transaction() as connection:
            await tenancy.audit.append(connection, action="fleet.query", detail=detail, actor=operator())
        order = {one.id: number for number, one in enumerate(tenants)}
        async with query:
            return sorted([answer async for answer in query], key=lambda answer: order[answer.tenant.id])

    found = run(command)
    if as_json:
        print_json([_document(answer) for answer in found])
    else:
        _print(found, as_csv=as_csv, write=write)
    _tell(found, max_rows, _unbound(statement, parameters), parameters)
    if any(answer.rows.error for answer in found):
        raise typer.Exit(EXIT_FAILED)


def _document(answer: TenantRows) -> dict[str, Any]:
    rows, error = answer.rows, answer.rows.error
    names = values.distinct(rows.columns)
    document: dict[str, Any] = {
        "tenant": answer.tenant.slug,
        "id": answer.tenant.id,
        "rows": [dict(zip(names, map(values.plain, row, _types(answer)), strict=True)) for row in rows],
        "truncated": rows.truncated,
    }
    if rows.rowcount >= 0:
        document["rowcount"] = rows.rowcount
    if error is not None:
        document["error"] = {"sqlstate": error.sqlstate, "message": error.message}
    return document


def _types(answer: TenantRows) -> Sequence[int]:
    return answer.rows.types or (0,) * len(answer.rows.columns)


def _print(found: Iterable[TenantRows], *, as_csv: bool, write: bool) -> None:
    """Print one table: a column for the tenant, and every column that some tenant has."""
    answered = [answer for answer in found if answer.rows.error is None]
    columns = list(dict.fromkeys(name for answer in answered for name in values.distinct(answer.rows.columns)))
    rows: list[list[Any]] = []
    for answer in answered:
        names = values.distinct(answer.rows.columns)
        for row in answer.rows:
            by_name = dict(zip(names, map(values.shown, row, _types(answer)), strict=True))
            rows.append([answer.tenant.slug, *(by_name.get(name) for name in columns)])
    if write and not columns:
        columns = ["rows"]
        rows = [[answer.tenant.slug, max(answer.rows.rowcount, 0)] for answer in answered]
    if as_csv:
        for line in values.csv_lines(("tenant", *columns), rows):
            sys.stdout.write(line)
        sys.stdout.flush()
    elif answered:
        headings = [Column("tenant", keep=True), *(Column(printable(name)) for name in columns)]
        print_table("rows", headings, rows)


def _tell(found: Iterable[TenantRows], max_rows: int, unbound: Sequence[str], parameters: Mapping[str, Any]) -> None:
    """Say on standard error what is missing, and why."""
    answers = list(found)
    if shortened := [answer.tenant.slug for answer in answers if answer.rows.truncated]:
        note(f"only the first {max_rows} rows of {', '.join(shortened)}: there are more (--max-rows)")
    failed = [answer.rows.error for answer in answers if answer.rows.error is not None]
    alike: dict[tuple[str, ...], list[str]] = {}
    for error in failed:
        reason = (*([error.sqlstate] if error.sqlstate else []), error.message)
        alike.setdefault(reason, []).append(error.slug)
    for reason, slugs in alike.items():
        note(f"{', '.join(slugs)}: {' '.join(reason)}")
    if failed:
        note(f"failed for {len(failed)} of {counted(len(answers))}")
    for remedy in _remedies((error.message for error in failed), unbound, parameters):
        note(remedy)


def _remedies(messages: Iterable[str], unbound: Sequence[str], parameters: Mapping[str, Any]) -> Iterator[str]:
    """What may help against errors that come of parameters."""
    texts = list(messages)
    if unbound and any(text.startswith('syntax error at or near ":"') for text in texts):
        given = " ".join(f"--param {name}=..." for name in unbound)
        yield f"no value was given for {', '.join(f':{name}' for name in unbound)}; give {given}"
    if any(text.startswith("invalid input for query argument") for text in texts):
        names = ", ".join(f":{name} is {_KINDS.get(type(value), 'text')}" for name, value in parameters.items())
        yield f"{names}; for a text where another type is needed, write CAST(CAST(:name AS text) AS date)"


def _read(name: str) -> str:
    try:
        if name == "-":
            return sys.stdin.read()
        return Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        fail(f"{name!r} cannot be read: {reason}", kind="ConfigurationError")


def _parameters(given: Iterable[str]) -> dict[str, Any]:
    found = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not _NAME.fullmatch(name):
            fail(f"{text!r} is not a parameter: write NAME=VALUE", kind="ConfigurationError")
        found[name] = values.parameter(value)
    return found


def _unbound(statement: str, parameters: Mapping[str, Any]) -> list[str]:
    """What looks like a parameter and has no value, once each."""
    return [name for name in dict.fromkeys(_PARAMETER.findall(statement)) if name not in parameters]


def _escaped(statement: str, parameters: Mapping[str, Any]) -> str:
    """Escape the colons that begin no given parameter: in a text, a slice of an array or JSON."""
    unused = parameters.keys() - set(_PARAMETER.findall(statement))
    if unused:
        fail(f"the statement has no :{min(unused)}", kind="ConfigurationError")
    return _PARAMETER.sub(lambda found: found[0] if found[1] in parameters else f"\\{found[0]}", statement)


__all__ = ["sql"]
