"""The header of a message: for which tenant it was sent, when, and a signature. State without I/O.

``1;tenant (32 hex digits);sent at (ms since 1970);request id;signature``. The signature covers all of it, and which
message it is in: whoever can write to the broker cannot make a message for a tenant, nor put a header that it has read
into another message. The broker itself is trusted with what is in the messages.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

HEADER: Final = "tenancy"
"""The name of the header, label or argument that carries the tenant."""

_VERSION = "1"
_FORM = re.compile(r"1;([0-9a-f]{32});([0-9]{1,15});([A-Za-z0-9_.:@/+=-]{0,128});([A-Za-z0-9_-]{43})")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:@/+=-]{1,128}")


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a header says. Whether it is genuine, the signature says.

    ``sent_at`` is in seconds since 1970; ``request_id`` is of the request that sent the task, or None.
    """

    tenant_id: UUID
    sent_at: float
    request_id: str | None
    signature: str

    def parts(self, message: Sequence[str]) -> list[str]:
        """What the signature covers. ``message`` says which one it is in: the queue, the task's name, its id."""
        return signed_parts(message, self.sent_at, self.request_id)

    def __str__(self) -> str:
        """The header."""
        return ";".join((_VERSION, self.tenant_id.hex, str(_ms(self.sent_at)), self.request_id or "", self.signature))


def signed_parts(message: Sequence[str], sent_at: float, request_id: str | None) -> list[str]:
    """See ``Envelope.parts``."""
    return [_VERSION, str(_ms(sent_at)), request_id or "", *message]


def parse_header(text: object) -> Envelope | None:
    """Read a header; None where it is malformed."""
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        return None
    return Envelope(UUID(found[1]), int(found[2]) / 1000, found[3] or None, found[4])


def clean_request_id(text: str | None) -> str | None:
    """A request's id as it may travel; None where it has characters that no such id has, or is too long."""
    return text if text and _REQUEST_ID.fullmatch(text) else None


def now() -> float:
    """The time, in seconds since 1970, as headers have it."""
    return _ms(time.time()) / 1000


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


__all__ = ["HEADER", "Envelope", "clean_request_id", "now", "parse_header", "signed_parts"]
