"""``OperationManager``: which operations there are, and how far they have come (``tenancy.operations``)."""

from __future__ import annotations

from collections.abc import Iterable

from ..context import refuse_while_bound
from ..registry.registry import Registry
from ..tenant import TenantRef
from .records import Operation, OperationKind, Operations, OperationState


class OperationManager:
    """Shows operations. Only operators may: while a tenant is bound, everything is refused.

    Args:
        operations: The records.
        registry: The tenants.
    """

    def __init__(self, operations: Operations, registry: Registry) -> None:
        self._operations = operations
        self._registry = registry

    async def get(self, number: int) -> Operation:
        """Return an operation.

        Raises:
            OperationNotFoundError: there is none of this number.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("looking at operations")
        return await self._operations.get(number)

    async def list(
        self,
        tenant: TenantRef | None = None,
        *,
        kinds: Iterable[OperationKind] | None = None,
        states: Iterable[OperationState] | None = None,
        limit: int = 100,
        before: int | None = None,
    ) -> tuple[Operation, ...]:
        """Return operations, the newest first.

        Args:
            tenant: Of this tenant; of all where None.
            kinds: Only these.
            states: Only in these states.
            limit: How many at most.
            before: Only those with a lower number, to go on after a page.

        Raises:
            TenantNotFoundError: there is no such tenant.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("looking at operations")
        tenant_id = None if tenant is None else (await self._registry.find(tenant)).id
        return await self._operations.list(tenant_id=tenant_id, kinds=kinds, states=states, limit=limit, before=before)


__all__ = ["OperationManager"]
