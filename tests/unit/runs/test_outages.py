"""Which servers of a run are down and awaited, and which tenants wait with them."""

from __future__ import annotations

from typing import Any, cast
from uuid import uuid4

import asyncpg
import pytest

from tenancy_orm.errors import MigrationError, ServerUnavailableError
from tenancy_orm.migrations import connections
from tenancy_orm.migrations.connections import Health
from tenancy_orm.runs.outages import Outages
from tenancy_orm.tenant import Placement, Status, Tenant

GONE = ServerUnavailableError(server="one")
NONE: frozenset[str] = frozenset()
ONE = frozenset({"one"})


class Clock:
    now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(connections, "time", made)
    return made


class Reaching:
    """Stands for the connections of a process."""

    def __init__(self) -> None:
        self.answers = False
        self.asked = 0

    async def reach(self, server: str, health: Health) -> bool:
        self.asked += 1
        return self.answers


def a_tenant() -> Tenant:
    placement = Placement(server="one", database="db", role="role", sealed_password=b"")
    return Tenant(id=uuid4(), slug="acme", status=Status.ACTIVE, tier="free", placement=placement)


def test_a_server_is_awaited_from_its_first_failure_for_so_long(clock: Clock) -> None:
    """And once it has answered, from its next failure on."""
    health = Health(10.0)
    health.answered("one")
    assert (health.awaited, health.unreached) == (NONE, NONE)
    for _ in range(2):
        health.failed("one")
        assert (health.awaited, health.unreached) == (ONE, NONE)
        clock.now += 9.0
        health.failed("one")
        assert (health.awaited, health.unreached) == (ONE, NONE)
        clock.now += 1.5
        assert (health.awaited, health.unreached) == (NONE, ONE)
        health.answered("one")
        assert (health.awaited, health.unreached) == (NONE, NONE)


@pytest.mark.parametrize(("patience", "answered"), [(0.0, True), (10.0, False)])
def test_a_server_that_never_answered_is_not_awaited(clock: Clock, patience: float, answered: bool) -> None:
    """Nor is any without patience."""
    health = Health(patience)
    if answered:
        health.answered("one")
    health.down("one")
    assert (health.awaited, health.unreached) == (NONE, ONE)
    assert not health.may_await("one")


async def test_a_tenant_waits_so_often_and_once_where_it_has_begun(clock: Clock) -> None:
    """What ends a server each time must not do so for ever."""
    health, reaching, tenant = Health(10.0), Reaching(), a_tenant()
    health.answered("one")
    outages = Outages(cast("Any", reaching), health)
    assert [await outages.waits(tenant, GONE, has_begun=False) for _ in range(6)] == [True] * 5 + [False]
    begun = a_tenant()
    lost = MigrationError("upgrade 0001 -> 0002: lost")
    lost.__cause__ = asyncpg.ConnectionDoesNotExistError("lost")
    assert [await outages.waits(begun, lost, has_begun=True) for _ in range(2)] == [True, False]
    assert health.awaited == ONE
    assert reaching.asked == 1


@pytest.mark.parametrize(
    ("error", "answers", "waited"),
    [
        (asyncpg.ConnectionDoesNotExistError("ended"), True, 0.0),  # that session alone
        (GONE, False, 10.0),  # it is awaited for too long
        (TimeoutError("a statement"), False, 0.0),
        (asyncpg.UndefinedTableError("a mistake"), False, 0.0),
        (MigrationError("a mistake"), False, 0.0),
    ],
)
async def test_what_does_not_pass_with_the_outage_is_a_failure(
    clock: Clock, error: Exception, answers: bool, waited: float
) -> None:
    """A session that somebody has ended, a server that is awaited no longer, and every other error."""
    health, reaching = Health(10.0), Reaching()
    reaching.answers = answers
    health.answered("one")
    if waited:
        health.failed("one")
        clock.now += waited
    outages = Outages(cast("Any", reaching), health)
    assert not await outages.waits(a_tenant(), error, has_begun=True)
