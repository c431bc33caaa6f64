"""Which servers of a run are down and awaited, and which tenants wait with them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import uuid4

import asyncpg
import pytest

from tenancy_orm.errors import MigrationError, ProvisioningError, ServerUnavailableError
from tenancy_orm.migrations import connections
from tenancy_orm.migrations.connections import Health
from tenancy_orm.runs.outages import Outages
from tenancy_orm.tenant import Placement, Status, Tenant

GONE = ServerUnavailableError(server="one")
NONE: frozenset[str] = frozenset()
ONE = frozenset({"one"})
STARTED = datetime(2026, 1, 1, tzinfo=UTC)
RESTARTED = STARTED + timedelta(seconds=1)


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
    """Stands for the connections of a process: a server that answers since ``started``, or does not."""

    started: datetime | None = None

    async def reach(self, server: str, health: Health) -> datetime | None:
        (health.silent if self.started is None else health.back)(server)
        return self.started


def outages_of(reaching: Reaching, health: Health) -> Outages:
    made = Outages(cast("Any", reaching))
    made.health = health
    return made


def a_tenant() -> Tenant:
    placement = Placement(server="one", database="db", role="role", sealed_password=b"")
    return Tenant(id=uuid4(), slug="acme", status=Status.ACTIVE, tier="free", placement=placement)


def wrapped(kind: type[Exception], cause: Exception) -> Exception:
    error = kind("wrapped")
    error.__cause__ = cause
    return error


LOST = asyncpg.ConnectionDoesNotExistError("lost")


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
        health.back("one")
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


@pytest.mark.parametrize("error", [GONE, LOST, wrapped(MigrationError, LOST), wrapped(ProvisioningError, LOST)])
@pytest.mark.parametrize(
    ("started", "session", "waits"),
    [
        (None, None, True),
        (None, STARTED, True),
        (RESTARTED, STARTED, True),  # it is back before anybody asked
        (STARTED, STARTED, False),  # that session alone was ended
    ],
)
async def test_a_tenant_waits_where_its_server_was_restarted(
    clock: Clock, error: Exception, started: datetime | None, session: datetime | None, waits: bool
) -> None:
    """Whether it is down now, or has been started since the session was opened."""
    health, reaching = Health(10.0), Reaching()
    health.answered("one")
    reaching.started = started
    outages = outages_of(reaching, health)
    assert await outages.waits(a_tenant(), error, since=clock.now, server_started=session) is waits
    assert health.awaited == (ONE if started is None else NONE)


async def test_a_tenant_waits_where_the_server_was_down_in_its_time(clock: Clock) -> None:
    """Another one has seen it: after a crash of one process the server has the time of its start from before."""
    health, reaching, began = Health(10.0), Reaching(), clock.now
    health.answered("one")
    health.silent("one")
    clock.now += 1.0
    reaching.started = STARTED
    outages = outages_of(reaching, health)
    assert await outages.waits(a_tenant(), LOST, since=began, server_started=STARTED)
    clock.now += 1.0
    assert not await outages.waits(a_tenant(), LOST, since=clock.now, server_started=STARTED)


async def test_tenants_that_cannot_be_connected_to_fail_where_the_server_answers(clock: Clock) -> None:
    """Each is tried once more; after two of them the server's others fail at once, until one can be connected to."""
    health, reaching = Health(10.0), Reaching()
    health.answered("one")
    reaching.started = STARTED
    outages = outages_of(reaching, health)
    for tenant, more in ((a_tenant(), True), (a_tenant(), False)):
        health.failed("one")
        assert await outages.waits(tenant, GONE, since=clock.now)
        health.failed("one")
        assert not await outages.waits(tenant, GONE, since=clock.now)
        assert health.may_await("one") is more
    assert (health.awaited, health.unreached) == (NONE, ONE)
    with pytest.raises(ServerUnavailableError):
        health.check("one", "acme")
    health.back("one")
    assert health.unreached == ONE
    health.answered("one")
    assert health.unreached == NONE


def test_a_server_that_goes_down_after_its_log_ins_failed_is_found_again(clock: Clock) -> None:
    """And one that is a standby yet is not found by a tenant's connect alone."""
    health = Health(10.0)
    health.answered("one")
    health.odd("one")
    health.odd("one")
    health.silent("one")
    assert health.unreached == ONE
    health.answered("one")
    assert health.unreached == ONE
    health.back("one")
    assert (health.unreached, health.may_await("one")) == (NONE, True)


@pytest.mark.parametrize("error", [TimeoutError("a statement"), asyncpg.UndefinedTableError("x"), MigrationError("x")])
async def test_every_other_error_is_a_failure(clock: Clock, error: Exception) -> None:
    health = Health(10.0)
    health.answered("one")
    assert not await outages_of(Reaching(), health).waits(a_tenant(), error, since=clock.now)


async def test_a_server_that_is_awaited_no_longer_lets_its_tenants_fail(clock: Clock) -> None:
    health = Health(10.0)
    health.answered("one")
    health.failed("one")
    clock.now += 10.0
    assert not await outages_of(Reaching(), health).waits(a_tenant(), GONE, since=clock.now)
