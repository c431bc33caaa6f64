"""What a request's credential stands for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ..errors import (
    MissingScopeError,
)
from ..keys.networks import Network
from ..tenant import Tenant

_EVERYTHING = "*"


@dataclass(frozen=True, slots=True)
class Credential:
    """What a valid key stands for."""

    tenant: Tenant
    key_id: str
    scopes: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    name: str = ""
    prefix: str = ""
    expires_at: datetime | None = None

    def has_scope(self, scope: str) -> bool:
        """Whether the key may do ``scope``; a key with the scope ``*`` may do everything."""
        return scope in self.scopes or _EVERYTHING in self.scopes

    def require_scope(self, scope: str) -> None:
        """Refuse unless the key may do ``scope``.

        Raises:
            MissingScopeError: it may not.
        """
        if not self.has_scope(scope):
            raise MissingScopeError(scope)
