"""The files of an archive that describe it: README.txt, schema.json, manifest.json and SHA256SUMS."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from .catalogue import Type
from .journal import Journal
from .plan import Plan, Table

FORMAT_VERSION = 1

_KINDS = {"b": "base", "c": "composite", "d": "domain", "e": "enum", "r": "range", "m": "multirange"}
_IDENTITY = {"a": "always", "d": "by default"}
_GENERATED = {"s": "stored", "v": "virtual"}

_README = """\
Export of the data of {slug}

This archive has a copy of all data of {slug}, except for what manifest.json lists under "left_out". No database
program is needed to read it.

data/          One file for each table{rows}
values/        Values that are too large for their row ({bound} bytes or more), each a file of its own. The row
               names the file in the place of the value: {reference}
               manifest.json tells of each such file which table and column it is of.
large-objects/ PostgreSQL's large objects, each a file. Its name is the number by which rows refer to it.
schema.json    What each table and column is: its type, whether it may be empty, its keys, which columns refer to
               which other table, and notes. "file" is the file in data/, since names of tables may have signs that
               names of files may not. "encoding" says how the values of a column are written.
manifest.json  When the data was read, how many rows each table has, and the size and checksum (SHA-256) of each file.
SHA256SUMS     The same checksums, for the program sha256sum: sha256sum -c SHA256SUMS
{details}
All rows are as they were at one moment, which manifest.json names under "snapshots". If it names more than one, the
export was interrupted and resumed, and each file says which of them it is of: rows of different files may then not fit
together.

If manifest.json or SHA256SUMS is missing, or a program cannot open the archive, it was not written to its end.
"""
_JSONL = """, in JSON Lines: each line is a row, an object in JSON with a member for each column.
               An empty value is null."""
_CSV = """, in CSV (RFC 4180, UTF-8, lines end with LF). The first line has the names of the
               columns. An empty value (NULL) has nothing between the commas, an empty text has "".
               Arrays, objects and JSON values are written as JSON."""
_CSV_DETAILS = """
Programs for spreadsheets take a value that begins with = + - or @ for a formula, and may run it. Values are written
as they are stored. Import such a file with all columns as text, and do not open one that has values of people whom
you do not trust.
"""
_JSONL_DETAILS = """
Whole numbers may be larger than 2^53, which JavaScript cannot hold: let it read them as text or BigInt. Decimal numbers
are written as text, so that no digit is lost.
"""


def readme(slug: str, plan: Plan) -> bytes:
    """Return README.txt."""
    jsonl = plan.row_format == "jsonl"
    text = _README.format(
        slug=slug,
        bound=f"{plan.bound + 1:,}",
        rows=_JSONL if jsonl else _CSV,
        reference='{"$file": "values/...", "bytes": 12345}' if jsonl else "$file:values/...",
        details=_JSONL_DETAILS if jsonl else _CSV_DETAILS,
    )
    return text.encode()


def schema(plan: Plan) -> bytes:
    """Return schema.json."""
    tables = [_table(table) for table in plan.tables]
    used = {value.column.type_oid for table in plan.tables for value in table.values}
    types = [_described(kind) for kind in _below(used, plan.catalogue.types)]
    return _json({"format_version": FORMAT_VERSION, "tables": tables, "types": types})


def _table(table: Table) -> dict[str, Any]:
    relation = table.relation
    kept = {value.column.name for value in table.values}
    found: dict[str, Any] = {
        "schema": relation.schema,
        "name": relation.name,
        "file": table.path,
        "comment": relation.comment,
        "columns": [
            {
                "name": column.name,
                "type": column.type,
                "encoding": value.encoding,
                "nullable": column.nullable,
                "default": None if column.generated else column.default,
                "identity": _IDENTITY.get(column.identity),
                "generated": _GENERATED.get(column.generated),
                "expression": column.default if column.generated else None,
                "comment": column.comment,
            }
            for value in table.values
            for column in (value.column,)
        ],
        "primary_key": list(relation.primary_key),
        "unique": [list(key.columns) for key in relation.keys if key.kind == "u"],
        "references": [
            {
                "name": key.name,
                "columns": list(key.columns),
                "table": key.other,
                "its_columns": list(key.other_columns),
                "on_delete": key.on_delete,
            }
            for key in relation.keys
            if key.kind == "f"
        ],
        "checks": [key.definition for key in relation.keys if key.kind in "cx"],
        "partitioned_by": relation.partitioned_by,
        "inherits": list(relation.inherits),
        "left_out_columns": [column.name for column in relation.columns if column.name not in kept],
    }
    return {name: value for name, value in found.items() if value is not None}


def _below(wanted: set[int], types: Mapping[int, Type]) -> Iterator[Type]:
    """The types that are not PostgreSQL's own, with those that they are made of."""
    seen: set[int] = set()
    waiting = sorted(wanted)
    while waiting:
        oid = waiting.pop()
        if oid in seen or oid not in types:
            continue
        seen.add(oid)
        kind = types[oid]
        waiting += [kind.base, kind.element if kind.is_array else 0, *kind.field_types]
        if kind.schema != "pg_catalog" and not kind.is_array:
            yield kind


def _described(kind: Type) -> dict[str, Any]:
    found: dict[str, Any] = {
        "schema": kind.schema,
        "name": kind.name,
        "kind": _KINDS.get(kind.kind, "base"),
        "comment": kind.comment,
    }
    if kind.kind == "e":
        found["labels"] = list(kind.labels)
    elif kind.kind == "d":
        found |= {"type": kind.base_name, "checks": list(kind.checks)}
    elif kind.kind == "c":
        found["fields"] = [{"name": name, "type": of} for name, of in kind.fields]
    return {name: value for name, value in found.items() if value is not None}


def manifest(journal: Journal, plan: Plan, about: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield manifest.json in pieces: it lists every file, and there may be millions.

    Args:
        journal: What was written.
        plan: What the export has.
        about: The tenant, the versions.
    """
    snapshots = journal.snapshots
    head = {
        "format_version": FORMAT_VERSION,
        "made_by": f"tenancy-orm {version('tenancy-orm')}",
        **about,
        "row_format": plan.row_format,
        "snapshots": list(snapshots),
        "is_of_one_moment": len(snapshots) == 1,
        "left_out": [{"name": one.name, "reason": one.reason} for one in plan.left_out],
        "rules_without_a_match": list(plan.unmatched),
    }
    text = json.dumps(head, indent=1, ensure_ascii=False)
    yield text.removesuffix("\n}").encode() + b',\n "files": ['
    separator = b"\n  "
    for entry in journal.files():
        entry.pop("at")
        yield separator + json.dumps(entry, ensure_ascii=False).encode()
        separator = b",\n  "
    yield b"\n ]\n}\n"


def checksums(journal: Journal) -> Iterator[bytes]:
    """Yield SHA256SUMS in pieces."""
    for entry in journal.files():
        yield f"{entry['sha256']}  {entry['path']}\n".encode()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


__all__ = ["FORMAT_VERSION", "checksums", "manifest", "readme", "schema"]
