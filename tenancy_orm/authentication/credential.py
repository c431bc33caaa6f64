"""The credential that a request was admitted with."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from ..errors import MissingScopeError
from ..keys.networks import Network
from ..tenant import Tenant

ALL_SCOPES: Final = "*"
"""The scope that includes every other one."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A valid API key: its tenant, and what it may do."""

    tenant: Tenant
    key_id: str
    scopes: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    name: str = ""
    prefix: str = ""
    expires_at: datetime | None = None

    def has_scope(self, scope: str) -> bool:
        """Whether the key may do ``scope``; a key with the scope ``*`` may do everything."""
        return scope in self.scopes or ALL_SCOPES in self.scopes

    def require_scope(self, scope: str) -> None:
        """Raise unless the key may do ``scope``.

        Raises:
            MissingScopeError: it may not.
        """
        if not self.has_scope(scope):
            raise MissingScopeError(scope)
