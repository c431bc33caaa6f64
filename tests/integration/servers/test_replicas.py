"""How stale replicas are: measured on two servers with streaming replication."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest

from tenancy_orm.events import Event, EventBus, ReplicaLost, ReplicaRestored
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.servers.positions import end_of_records
from tenancy_orm.servers.replicas import Replica, ReplicaMonitor
from tenancy_orm.servers.server import Server
from tests.support.replication import Standby, TestServer, primary_server, standby_of
from tests.support.waiting import until


def add_plain_role(server: TestServer) -> None:
    server.query("CREATE ROLE plain LOGIN PASSWORD 'plain'")
    server.query("GRANT CONNECT ON DATABASE postgres TO plain")


@pytest.fixture(scope="module")
def primary() -> Iterator[TestServer]:
    """A primary of this module's own, with a role that may log in and nothing else."""
    with primary_server() as server:
        add_plain_role(server)
        yield server


@pytest.fixture(scope="module")
def standby(primary: TestServer) -> Iterator[Standby]:
    """A standby that follows it."""
    with standby_of(primary) as server:
        server.catch_up()
        yield server


class Watch:
    """A monitor, what it has emitted, and which replicas' connections it had closed."""

    def __init__(self, primary: TestServer, standby: TestServer, heir: TestServer | None = None) -> None:
        self.emitted: list[Event] = []
        self.closed: list[Replica] = []
        events = EventBus()
        events.subscribe(Event, self.emitted.append)
        hosts = f"127.0.0.1:{primary.port}" + ("" if heir is None else f",127.0.0.1:{heir.port}")
        dsn = Dsn.parse(f"postgresql://plain:plain@{hosts}/postgres?target_session_attrs=read-write")
        replica = Dsn.parse(f"postgresql://127.0.0.1:{standby.port}")
        self.monitor = ReplicaMonitor(
            Server("eu", dsn, connect_timeout=5, replicas=[replica]), events, self.closed.append
        )
        [self.replica] = self.monitor.replicas

    async def follow(self, bound: float = 1.0) -> Watch:
        await self.monitor.start(bound)
        return self

    @property
    def staleness(self) -> float:
        return time.monotonic() - self.replica.fresh_at


def _is_over(deadline: float) -> bool:
    return time.monotonic() > deadline


def _is_fresh(watch: Watch, since: float) -> bool:
    return watch.replica.fresh_at > since


@pytest.fixture
async def watch(primary: TestServer, standby: Standby) -> AsyncIterator[Watch]:
    """A monitor of the two, as a role without any right."""
    made = Watch(primary, standby)
    yield made
    await made.monitor.close()


async def test_an_idle_primary_makes_no_replica_stale(primary: TestServer, standby: Standby, watch: Watch) -> None:
    """The time of the last replayed transaction grows old with it, and would say otherwise."""
    primary.query("SELECT pg_current_xact_id()")  # a transaction with a commit record
    # the position of the next record is then behind the header of a page, and that of the last one in front of it
    primary.query("SELECT pg_switch_wal()")
    standby.catch_up()
    await watch.follow()
    await until(watch.monitor.usable)
    age = "SELECT EXTRACT(EPOCH FROM now() - pg_last_xact_replay_timestamp())"
    await until(lambda: standby.query(age) > 1.5)
    assert watch.staleness < 1.5
    assert watch.emitted == []


async def test_what_is_not_replayed_is_stale(primary: TestServer, standby: Standby, watch: Watch) -> None:
    """Paused replay, and a link that is cut: staleness grows from the first write that is missing."""
    await watch.follow()
    await until(lambda: watch.staleness < 1)
    for end, resume in ((standby.pause_replay, standby.resume_replay), (standby.disconnect, standby.reconnect)):
        end()
        try:
            written = time.monotonic()
            primary.query("SELECT pg_logical_emit_message(false, 'test', 'x', true)")
            await until(partial(_is_over, written + 1.0))
            assert watch.replica.fresh_at <= written
            assert watch.monitor.usable() == [watch.replica]  # for reads with a wider bound
        finally:
            resume()
        await until(partial(_is_fresh, watch, written))


async def test_staleness_grows_without_the_primary(primary: TestServer, standby: Standby, watch: Watch) -> None:
    """Nobody can tell what it has committed since; the replica still answers, and is fresh again afterwards."""
    await watch.follow(0.4)
    await until(lambda: watch.staleness < 0.4)
    primary.kill()
    try:
        await until(lambda: watch.staleness > 0.5)
        before = watch.replica.fresh_at
        await until(lambda: watch.staleness > 0.8)
        assert watch.replica.fresh_at == before and watch.monitor.usable() == [watch.replica]
    finally:
        primary.start_again()
    await until(lambda: watch.staleness < 0.4)
    assert watch.emitted == []


async def test_a_killed_replica_is_lost_and_restored(standby: Standby, watch: Watch) -> None:
    """With an event for each, and by way of an instance of its own."""
    await watch.follow()
    await until(watch.monitor.usable)
    instance = watch.replica.server.instance
    standby.kill()
    try:
        await until(lambda: not watch.monitor.usable())
    finally:
        standby.start_again()
    await until(watch.monitor.usable)
    lost, restored = watch.emitted
    assert isinstance(lost, ReplicaLost) and (lost.server, lost.replica) == ("eu", "eu/1")
    assert isinstance(restored, ReplicaRestored) and restored.seconds > 0
    assert watch.replica.server.instance != instance and watch.replica.server.instance is not None


async def test_what_is_no_standby_of_the_primary_is_not_read_from(primary: TestServer, standby: Standby) -> None:
    """A promoted one, the primary itself, and a standby of another cluster."""
    with standby_of(primary, name="promoted") as promoted, primary_server() as other, standby_of(other) as foreign:
        add_plain_role(other)
        foreign.catch_up()
        watches = [await Watch(primary, server).follow() for server in (promoted, primary, foreign)]
        try:
            await until(watches[0].monitor.usable)
            promoted.promote()
            await until(lambda: not watches[0].monitor.usable())
            assert watches[0].closed == [watches[0].replica] and watches[0].replica.server.instance is None
            for watch, reason in zip(watches, ("promoted", "promoted", "another cluster"), strict=True):
                await until(partial(len, watch.emitted))
                [lost] = watch.emitted
                assert isinstance(lost, ReplicaLost) and reason in lost.reason
                assert watch.monitor.usable() == []
        finally:
            for watch in watches:
                await watch.monitor.close()


async def test_a_standby_of_the_former_primary_is_not_read_from(primary: TestServer) -> None:
    """Its position may be ahead of the new primary's, with data that this never had."""
    with standby_of(primary, name="heir") as heir, standby_of(primary, name="left_behind") as left_behind:
        heir.catch_up()
        heir.disconnect()
        primary.query("SELECT pg_logical_emit_message(false, 'lost', repeat('x', 100000), true)")
        left_behind.catch_up()
        heir.promote()
        watch = await Watch(heir, left_behind).follow()
        try:
            await until(lambda: watch.emitted)
            [lost] = watch.emitted
            assert isinstance(lost, ReplicaLost) and "timeline" in lost.reason and watch.monitor.usable() == []
        finally:
            await watch.monitor.close()


async def test_a_fenced_primary_makes_no_replica_fresh(primary: TestServer) -> None:
    """It is up, and so is a replica of it that has all it has written; the new primary has more."""
    with standby_of(primary, name="heir") as heir, standby_of(primary, name="left") as left:
        heir.catch_up()
        watch = Watch(primary, left, heir)
        try:
            await watch.follow()
            await until(watch.monitor.usable)
            before = await watch.monitor.position()
            primary.query("ALTER SYSTEM SET default_transaction_read_only = on")
            primary.query("SELECT pg_reload_conf()")
            await until(lambda: watch.monitor._primary_failed)
            fresh_at = watch.replica.fresh_at
            heir.promote()
            heir.query("SELECT pg_logical_emit_message(false, 'written', 'later', true)")
            await until(lambda: watch.monitor._known != before)
            after = await watch.monitor.position()
            assert after.timeline > before.timeline and not watch.replica.has(after)
            await until(lambda: watch.emitted)
            assert watch.monitor.usable() == [] and watch.replica.fresh_at <= fresh_at
        finally:
            await watch.monitor.close()
            primary.query("ALTER SYSTEM RESET default_transaction_read_only")
            primary.query("SELECT pg_reload_conf()")


def test_a_position_behind_a_header_is_the_end_of_the_page_before() -> None:
    """A replica reports the latter, and would else never have caught up with an idle primary."""
    page, segment = 8192, 16 * 1024 * 1024
    for lsn, end in (
        (5 * segment + 40, 5 * segment),
        (5 * segment + page + 24, 5 * segment + page),
        (5 * segment + page + 40, 5 * segment + page + 40),  # the end of a record that goes over to this page
        (5 * segment + 24, 5 * segment + 24),
        (5 * segment + page, 5 * segment + page),
    ):
        assert end_of_records(lsn, page=page, segment=segment) == end
