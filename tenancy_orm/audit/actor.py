"""Actors of the audit log."""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from typing import Literal, get_args

ActorKind = Literal["system", "operator", "key", "token", "session", "anonymous"]
_KINDS = get_args(ActorKind)

_TEXT_LENGTH = 256  # of text from outside: a request id, a source address, an actor's name


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts: the system itself, an operator, or a request's credential.

    Args:
        kind: "system", "operator", or the kind of a credential: "key", "token", "session", "anonymous".
        id: The operator's name, the public id of the key, or the subject of the token or session.
        request_id: The request's id in the application's own logs.
        source: The address that the request came from.
    """

    kind: ActorKind
    id: str | None = None
    request_id: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown kind here rather than in the database."""
        if self.kind not in _KINDS:
            raise ValueError(f"an actor's kind is one of {', '.join(_KINDS)}, not {self.kind!r}")


SYSTEM = Actor("system")


def operator() -> Actor:
    """Return the user of this command line."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        # a uid without a passwd entry, as in some containers
        name = str(os.getuid())
    return Actor("operator", f"cli:{name}")


def clean_text(value: str | None) -> str | None:
    """Return ``value`` shortened, and as PostgreSQL can store it: text from outside must not fail the change."""
    if value is None:
        return None
    return value[:_TEXT_LENGTH].replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
