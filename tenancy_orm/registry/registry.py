"""The registry: every statement on ``tenancy.tenants`` is in this room, each change with its audit row.

``TenantManager`` and the provisioning pipeline are built on this; neither writes SQL on tenants of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..control.database import ControlDatabase
from .changes import Changes
from .creation import Creation
from .purge import Purge
from .reading import Reading
from .transitions import Transitions


class Registry(Reading, Creation, Changes, Transitions, Purge):
    """Reads and writes tenants' rows.

    Args:
        control: The control database.
        audit: Where changes are written down.
        usage_billed: Whether usage is exported for billing. Where there are usage records already, it is.
    """

    def __init__(self, control: ControlDatabase, audit: AuditLog, *, usage_billed: bool = False) -> None:
        super().__init__(control, audit, usage_billed=usage_billed)

    async def record(self, tenant_id: UUID, action: str, *, detail: Mapping[str, Any], actor: Actor = SYSTEM) -> None:
        """Write into the audit log what was done to a tenant elsewhere than in the control database.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        tenant = await self.get(tenant_id)
        async with self._control.transaction() as connection:
            await self._write_audit(connection, action, tenant, actor, detail=detail)
