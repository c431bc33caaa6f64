"""The values that replace others: each is made from one field of a row in PostgreSQL's text format of COPY."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from types import ModuleType
from typing import Any
from uuid import UUID

from ..errors import AnonymisationError, MissingExtraError
from .plan import Column, Table, hash_length

Replacement = Callable[[bytes], bytes]
"""Makes a field of another one, both as COPY writes them."""

NULL = rb"\N"
_ESCAPES = {ord("\\"): r"\\", ord("\n"): r"\n", ord("\r"): r"\r", ord("\t"): r"\t", 0: ""}


class Replacing:
    """Makes the values of one clone.

    Args:
        key: The key of hashes, which nobody keeps: without it, no dictionary finds the values again.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, table: Table, column: Column) -> Replacement | None:
        """Return what replaces a column's fields; None where they stay.

        Raises:
            AnonymisationError: Faker has no such method.
            MissingExtraError: Faker is not installed.
        """
        rule = column.rule
        if rule is None or rule.kind == "keep":
            return None
        if rule.kind == "null":
            return lambda _: NULL
        if rule.kind == "constant":
            constant = _encode(_fitting(rule.value, column))
            return lambda _: constant
        return self._hash(column) if rule.kind == "hash" else _faker(table, column)

    def _hash(self, column: Column) -> Replacement:
        key, kind = self._key, column.type
        length = hash_length(column)

        def replace(field: bytes) -> bytes:
            if field == NULL:
                return field
            # those that PostgreSQL takes for equal get equal hashes
            value = field.decode("utf-8").lower().encode() if kind == "citext" else field
            digest = hmac.new(key, value.rstrip(b" ") if kind == "bpchar" else value, hashlib.sha256)
            if kind == "uuid":
                return str(UUID(bytes=digest.digest()[:16], version=4)).encode()
            if kind == "bytea":
                return rb"\\x" + digest.hexdigest().encode()
            text = digest.hexdigest()[:length].encode()
            return b'"' + text + b'"' if kind in ("json", "jsonb") else text

        return replace


def replace_rows(rows: Sequence[bytes], replacements: Mapping[int, Replacement]) -> Iterator[bytes]:
    """Replace fields of rows, given and returned as COPY's lines without their ends."""
    for row in rows:
        fields = row.split(b"\t")
        for number, replace in replacements.items():
            fields[number] = replace(fields[number])
        yield b"\t".join(fields)


def _faker(table: Table, column: Column) -> Replacement:
    rule, label = column.rule, f"{table.label}.{column.name}"
    assert rule is not None  # noqa: S101 - for the type checker
    module = _import_faker()
    try:
        generator = module.Faker(rule.locale) if rule.locale else module.Faker()
    except (AttributeError, ValueError, TypeError) as exc:
        raise AnonymisationError(f"{label}: Faker has no locale {rule.locale!r}", columns=(label,)) from exc
    if rule.seed is not None:
        generator.seed_instance(rule.seed)
    # of its providers alone: its other methods change it
    providers = [provider for one in generator.factories for provider in one.get_providers()]
    public = rule.value.isidentifier() and not rule.value.startswith("_")
    if not public or not any(callable(getattr(type(provider), rule.value, None)) for provider in providers):
        raise AnonymisationError(f"{label}: Faker has no provider {rule.value!r}", columns=(label,))
    make = getattr(generator.unique if column.differs else generator, rule.value)

    def replace(field: bytes) -> bytes:
        if field == NULL:
            return field
        try:
            made = make()
        except Exception as exc:
            why = "has no more distinct values" if column.differs else "needs arguments, or failed"
            raise AnonymisationError(f"{label}: Faker's {rule.value} {why}", columns=(label,)) from exc
        return NULL if made is None else _encode(_fitting(_text(made, column), column))

    return replace


def _import_faker() -> ModuleType:
    try:
        import faker
    except ImportError as exc:
        raise MissingExtraError("faker", "anonymise") from exc
    return faker


def _text(value: Any, column: Column) -> str:
    if column.type in ("json", "jsonb"):
        return value if isinstance(value, str) and _is_json(value) else json.dumps(value, default=str)
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    return value.isoformat() if isinstance(value, date | datetime | time) else str(value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _fitting(text: str, column: Column) -> str:
    return text if column.length is None else text[: column.length]


def _encode(text: str) -> bytes:
    """Write a text as a field of COPY."""
    return text.translate(_ESCAPES).encode("utf-8")


__all__ = ["NULL", "Replacement", "Replacing", "replace_rows"]
