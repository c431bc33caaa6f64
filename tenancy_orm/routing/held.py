"""What the budget and the pools ask of a tenant's connection, whichever driver opened it."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from .route import TenantRoute


class Ending(Protocol):
    """Closes the socket of a connection. It does not refer to the connection, which may be garbage-collected."""

    async def close(self, *, timeout: float) -> None:
        """End the session, and wait until the server has ended it."""

    def terminate(self) -> None:
        """Cut the socket, also while another thread uses it."""


class HeldConnection(Protocol):
    """A tenant's DBAPI connection in a slot.

    ``finalizer`` represents the slot: the code that detaches it closes the connection and frees the slot, and a call of
    it lets the loop do so.
    """

    route: TenantRoute
    finalizer: weakref.finalize[Any, Any]

    @property
    def ending(self) -> Ending:
        """What closes its socket."""

    @property
    def is_closed(self) -> bool:
        """Whether its socket is closed, as far as is known."""

    def has_mode_of(self, *, reading: bool) -> bool:
        """Whether a session, read-only or not, can use it without changing its mode."""

    @property
    def usable(self) -> bool:
        """Whether it can be reused, as far as is known: its socket and no transaction are open."""

    @property
    def is_read_only(self) -> bool:
        """Whether its transaction was asked to be read-only."""

    @property
    def peer(self) -> tuple[str, int]:
        """The host and the port that it leads to."""

    def reported(self, setting: str) -> str | None:
        """The value of a setting of which the server reports every change."""


__all__ = ["Ending", "HeldConnection"]
