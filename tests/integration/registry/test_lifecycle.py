"""The rows of tenants: PostgreSQL itself refuses what the lifecycle does not have."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from tenancy_orm import Status, Tenancy
from tenancy_orm.registry.lifecycle import TRANSITIONS


@pytest.mark.parametrize("before", [s for s in Status if s is not Status.PURGED])
@pytest.mark.parametrize("after", list(Status))
async def test_the_database_has_the_same_lifecycle(tenancy: Tenancy, before: Status, after: Status) -> None:
    """A hand-written UPDATE is refused by the trigger for exactly the changes that the code refuses."""
    if before is after:
        return
    async with tenancy.internals.control.transaction() as connection:
        rows = await connection.execute(text("SELECT before, after FROM tenancy.status_transitions"))
        allowed = {(row.before, row.after) for row in rows}
    assert ((before.value, after.value) in allowed) == (after in TRANSITIONS[before])


async def test_the_database_refuses_an_illegal_update(tenancy: Tenancy) -> None:
    """The trigger raises the SQLSTATE that the registry knows, and nothing is changed."""
    created = await tenancy.tenants.create("acme")
    with pytest.raises(Exception, match="cannot change from active to purged") as caught:
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text("UPDATE tenancy.tenants SET status = 'purged'"))
    assert caught.value.orig.sqlstate == "TN001"  # type: ignore[attr-defined]
    assert (await tenancy.tenants.get(created.id)).status is Status.ACTIVE


async def test_the_database_refuses_to_lose_a_tenants_row(tenancy: Tenancy) -> None:
    """A living tenant's row cannot be deleted: its database would be forgotten."""
    await tenancy.tenants.create("acme")
    with pytest.raises(Exception, match="which keeps a tombstone"):
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text("DELETE FROM tenancy.tenants"))
