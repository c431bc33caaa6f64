"""Actors of the audit log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ActorKind = Literal["system", "operator", "key"]

_TEXT_LENGTH = 256  # of text from outside: a request id, a source address, an actor's name


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts: the system itself, an operator, or the holder of an API key.

    Args:
        kind: "system", "operator" or "key".
        id: The operator's name, or the public id of the key.
        request_id: The request's id in the application's own logs.
        source: The address that the request came from.
    """

    kind: ActorKind
    id: str | None = None
    request_id: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown kind here rather than in the database."""
        if self.kind not in ("system", "operator", "key"):
            raise ValueError(f"an actor is 'system', 'operator' or 'key', not {self.kind!r}")


SYSTEM = Actor("system")


def clean_text(value: str | None) -> str | None:
    """Return ``value`` shortened, and as PostgreSQL can store it: text from outside must not fail the change."""
    if value is None:
        return None
    return value[:_TEXT_LENGTH].replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
