"""Moves of tenants between two real servers, while they are written to."""

from __future__ import annotations

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tests.support.moving import Pair, Writer, writing
from tests.support.waiting import until

pytestmark = pytest.mark.new_installation


async def go_on(writers: list[Writer]) -> None:
    """Wait until each writer has written some more."""
    reached = [len(writer.written) for writer in writers]
    await until(lambda: all(len(w.written) > r + 3 for w, r in zip(writers, reached, strict=True)), seconds=60.0)


async def test_a_tenant_moves_under_writes_and_back_and_nothing_is_lost(
    plane: Tenancy, moving: TenancyConfig, pair: Pair
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    async with Tenancy(moving) as other, writing(acme, plane, other) as writers:
        await go_on(writers)
        operation = await plane.moves.move("acme", to="two")
        assert (operation.state, operation.step) == ("waiting", "switched")
        assert operation.detail["reverse"] == "following"
        await go_on(writers)
        moved = await plane.tenants.get("acme")
        assert pair.writable(moved) == ["two"]
        assert moved.placement is not None
        assert moved.placement.server == "two"
        operation = await plane.moves.rollback("acme")
        assert operation.state == "undone"
        await go_on(writers)
    assert [writer.errors for writer in writers] == [[]] * len(writers)
    back = await plane.tenants.get("acme")
    assert back.placement == acme.placement
    assert pair.writable(back) == ["one"]
    found = sorted(row[0] for row in pair.rows(back, "SELECT body FROM notes"))
    assert found == sorted(body for writer in writers for body in writer.written)
    assert pair.left(moving.name_prefix) == []
    assert back.placement is not None
    assert pair.databases(moving.name_prefix) == [f"one:{back.placement.database}"]
