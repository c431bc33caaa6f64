"""The registry: every change of ``tenancy.tenants`` with its audit entry, except the rotation of passwords.

``TenantManager`` and the provisioning pipeline are built on this; neither has its own SQL on tenants.
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
from .databases import Databases
from .pauses import Pauses
from .purge import Purge
from .reading import Reading
from .revisions import Revisions
from .transitions import Transitions


class Registry(Reading, Creation, Changes, Databases, Pauses, Revisions, Transitions, Purge):
    """Reads and writes tenants' rows.

    Args:
        control: The control database.
        audit: The log of changes.
        usage_billed: Whether usage is exported for billing. Where there are usage records already, it is.
    """

    def __init__(self, control: ControlDatabase, audit: AuditLog, *, usage_billed: bool = False) -> None:
        super().__init__(control, audit, usage_billed=usage_billed)

    async def record(self, tenant_id: UUID, action: str, *, detail: Mapping[str, Any], actor: Actor = SYSTEM) -> None:
        """Write an audit entry for an action on a tenant outside the control database.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        tenant = await self.get(tenant_id)
        async with self._control.transaction() as connection:
            await self._write_audit(connection, action, tenant, actor, detail=detail)
