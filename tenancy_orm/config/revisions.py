"""The revisions that an application declares it can work with, as the setting ``compatible_revisions`` holds them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Annotated, TypeAlias

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from .values import named

RevisionTest: TypeAlias = Callable[[str | None], bool]
"""Returns whether the application works with a revision; None is a database without any."""

Declared: TypeAlias = str | Collection[str] | RevisionTest
"""As an application writes it; a setting that was read holds a tuple of items, or the function."""

_SYMBOL = re.compile(r"[^\s:,]+")


def _read(value: object) -> Declared | None:
    if value is None or callable(value):
        return value
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple, set, frozenset)) or not all(isinstance(item, str) for item in items):
        raise ValueError(
            'must be revisions: a list, text with commas between them, a range as "0012:head", or a function'
        )
    stripped = [item.strip() for item in items]
    found = tuple(item for item in (sorted(stripped) if isinstance(items, (set, frozenset)) else stripped) if item)
    if not found:
        raise ValueError("names no revision; leave it out where every tenant is to be served")
    for item in found:
        lower, colon, upper = item.partition(":")
        if not all(_SYMBOL.fullmatch(symbol) for symbol in (lower, upper) if symbol) or (colon and not lower + upper):
            raise ValueError(f"{item!r} is neither a revision nor a range; write 0012, head, 0012:0014 or 0012:")
    return found


def _dumped(value: Declared | None) -> list[str] | str | None:
    return list(value) if isinstance(value, tuple) else None if value is None else named(value)


CompatibleRevisions = Annotated[
    str | Collection[str] | RevisionTest | None,
    PlainValidator(_read),
    PlainSerializer(_dumped),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}),
]

__all__ = ["CompatibleRevisions", "Declared", "RevisionTest"]
