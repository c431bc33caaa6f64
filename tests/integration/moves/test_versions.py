"""A move to a newer PostgreSQL, and back: the way to upgrade a server tenant by tenant."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import OperationError
from tests.support.moving import Pair, pair_of_servers, writing
from tests.support.waiting import until

pytestmark = pytest.mark.new_installation


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """PostgreSQL 16 and 18."""
    with pair_of_servers(16, 18) as running:
        yield running


async def test_a_tenant_moves_from_16_to_18_and_back(plane: Tenancy, moving: TenancyConfig, pair: Pair) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    async with writing(acme, plane) as writers:
        await until(lambda: all(writer.written for writer in writers), seconds=60.0)
        operation = await plane.moves.move("acme", to="two")
        assert operation.detail["reverse"] == "following"
        reached = [len(writer.written) for writer in writers]
        await until(lambda: all(len(w.written) > r for w, r in zip(writers, reached, strict=True)), seconds=60.0)
        await plane.moves.rollback("acme")
    assert [writer.errors for writer in writers] == [[], []]
    found = sorted(row[0] for row in pair.rows(acme, "SELECT body FROM notes"))
    assert found == sorted(body for writer in writers for body in writer.written)
    # the other way, a dump of the newer version is restored into the older one
    await plane.moves.move("acme", to="two")
    await plane.moves.confirm("acme")
    await plane.moves.move("acme", to="one")
    await plane.moves.confirm("acme")
    now = await plane.tenants.get("acme")
    assert sorted(row[0] for row in pair.rows(now, "SELECT body FROM notes")) == found
    assert pair.left(moving.name_prefix) == []


async def test_a_server_that_lacks_the_locale_is_refused_by_name(
    plane: Tenancy, moving: TenancyConfig, pair: Pair
) -> None:
    """PostgreSQL has locales of its own from 17 on."""
    acme = (await plane.tenants.create("acme", server="two")).tenant
    for offline in (False, True):
        with pytest.raises(OperationError, match=r"server 'one' does not have the locale builtin 'C\.UTF-8'"):
            await plane.moves.move("acme", to="one", offline=offline)
    now = await plane.tenants.get("acme")
    assert (now.placement, now.status) == (acme.placement, acme.status)
    assert pair.left(moving.name_prefix) == []
