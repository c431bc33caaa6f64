"""Reading one's own writes: what a request has written, and the tokens that carry it to the next request.

A process notes when it last committed something of a tenant, not where in the write-ahead log that is: a note costs
nothing. A replica has the commit if it has replayed a position that its primary was asked for later. A token has the
position itself, since clocks of two machines do not agree; asking for it takes one round trip, for those who want one.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..context import reset_variable
from ..secrets.signing import SigningKeys
from ..servers.positions import Position

TOKEN_SECONDS: Final = 300
"""How much older than a read's bound on staleness a token must be to be of no concern: the clocks of two machines
differ by less."""

_FORGET_SECONDS = 3_600.0
_NOTES = 10_000  # tenants with notes, from which on old notes are dropped
_LONGEST = 128  # characters; a token has 76
_NONCE_BYTES = 12
_FIELDS = struct.Struct(">BQIQQ")
_VERSION = 1


class Consistency:
    """What a request or another block has written of one tenant, and the token that it came with.

    Attributes:
        tenant_id: The tenant.
        written_at: When it last committed something, as ``time.monotonic()``.
        token: As the client sent it.
        is_request: Whether it is a request, of which nobody else sees anything; and not a block of a program, of which
            the program sees afterwards what it has written.
    """

    __slots__ = ("is_request", "tenant_id", "token", "written_at")

    def __init__(self, tenant_id: UUID, token: str | None = None, *, is_request: bool = True) -> None:
        self.tenant_id = tenant_id
        self.is_request = is_request
        self.token = token
        self.written_at = -math.inf

    @property
    def has_written(self) -> bool:
        """Whether anything was committed."""
        return self.written_at > -math.inf


class WriteNotes:
    """When something of each tenant was last committed, for a whole process: a server may be replaced in between.

    What a request has committed is noted there alone, and the rest here.
    """

    def __init__(self) -> None:
        self._written: dict[UUID, float] = {}
        self._most = _NOTES
        self._noting = threading.Lock()  # it protects these two

    def add(self, tenant_id: UUID) -> None:
        """Note that something of a tenant was committed just now. In any thread."""
        now = time.monotonic()
        found = current_consistency(tenant_id)
        if found is not None:
            found.written_at = now
            if found.is_request:
                return
        with self._noting:
            self._written[tenant_id] = now
            if len(self._written) > self._most:
                self._written = {one: at for one, at in self._written.items() if at > now - _FORGET_SECONDS}
                self._most = max(_NOTES, 2 * len(self._written))

    def last(self, tenant_id: UUID) -> float:
        """When the running request, or code outside of all, has last committed something of a tenant."""
        found = current_consistency(tenant_id)
        return self._written.get(tenant_id, -math.inf) if found is None else found.written_at


_current: ContextVar[Consistency | None] = ContextVar("tenancy_orm.consistency", default=None)


def current_consistency(tenant_id: UUID) -> Consistency | None:
    """Return what the running request has written of this tenant; None outside of its requests and scopes."""
    found = _current.get()
    return found if found is not None and found.tenant_id == tenant_id else None


def set_consistency(consistency: Consistency | None) -> Token[Consistency | None]:
    """Note writes there for the rest of this context, for the start of a request."""
    return _current.set(consistency)


def reset_consistency(token: Token[Consistency | None]) -> None:
    """Undo ``set_consistency``; does nothing in another context."""
    reset_variable(_current, token)


@contextmanager
def noting_writes(tenant_id: UUID) -> Iterator[None]:
    """Note the writes of the body together, with those of the block around it if that is the same tenant's."""
    if current_consistency(tenant_id) is not None:
        yield
        return
    token = _current.set(Consistency(tenant_id, is_request=False))
    try:
        yield
    finally:
        reset_consistency(token)


@dataclass(frozen=True, slots=True)
class Marked:
    """What a token says: ``position`` has all that was committed before ``issued_at``, a time of ``time.time()``."""

    position: Position
    issued_at: int

    def concerns(self, bound: float) -> bool:
        """Whether a read with this bound on staleness might not see what was committed before."""
        return time.time() - self.issued_at <= bound + TOKEN_SECONDS


class ConsistencyTokens:
    """Makes tokens and reads them. They are encrypted, since a position tells how much all tenants write.

    Args:
        installation: The id of the installation; tokens of another one are not genuine.
        keys: The installation's encryption keys by id, oldest first, from which the keys of tokens are derived. A token
            of a key that is not known here has none read: it counts as not genuine, and the read goes to the primary.
    """

    def __init__(self, installation: UUID, keys: Mapping[str, bytes]) -> None:
        self._installation = installation
        self.keys = SigningKeys(keys, purpose="consistency")

    def make(self, tenant_id: UUID, position: Position) -> str:
        """Return a token of a tenant: 76 characters of URL-safe base64."""
        plain = _FIELDS.pack(_VERSION, position.system, position.timeline, position.lsn, int(time.time()))
        nonce = os.urandom(_NONCE_BYTES)
        sealed = AESGCM(self.keys.newest).encrypt(nonce, plain, self._installation.bytes + tenant_id.bytes)
        return base64.urlsafe_b64encode(nonce + sealed).decode()

    def read(self, tenant_id: UUID, token: str) -> Marked | None:
        """Return what a token says; None where it is not genuine, or another tenant's."""
        if len(token) > _LONGEST:
            return None
        try:
            sealed = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError, ValueError):
            return None
        nonce, body = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        if len(body) != _FIELDS.size + 16:
            return None
        for key in self.keys:
            try:
                plain = AESGCM(key).decrypt(nonce, body, self._installation.bytes + tenant_id.bytes)
            except InvalidTag:
                continue
            version, system, timeline, lsn, issued_at = _FIELDS.unpack(plain)
            return Marked(Position(system, timeline, lsn), issued_at) if version == _VERSION else None
        return None


__all__ = [
    "TOKEN_SECONDS",
    "Consistency",
    "ConsistencyTokens",
    "Marked",
    "WriteNotes",
    "current_consistency",
    "noting_writes",
    "reset_consistency",
    "set_consistency",
]
