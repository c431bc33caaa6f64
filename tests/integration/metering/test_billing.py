"""Usage records: made once per closed period, sent at least once, counted once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from tenancy_orm import Tenancy
from tenancy_orm.config import Limit, TenancyConfig, Tier
from tenancy_orm.errors import QuotaError, UsageExportError
from tenancy_orm.events import UsageExported, UsageExportFailed
from tenancy_orm.metering.usage import ExportReport, UsageExporter
from tenancy_orm.protocols import UsageRecord
from tenancy_orm.tenant import Status, Tenant
from tests.support.quotas import QuotaPlane, quota_plane
from tests.support.waiting import HANGS

TIERS = {
    "free": Tier(
        "free",
        {"calls": Limit(1_000, "day"), "mails": Limit(None, "month"), "seats": Limit(5), "jobs": Limit(1, "day")},
    )
}


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[QuotaPlane]:
    async with quota_plane(control_url, tiers=TIERS) as opened:
        yield opened


class Collector:
    """A receiver that keeps what it gets, and fails when told to."""

    def __init__(self) -> None:
        self.received: list[UsageRecord] = []
        self.failures: list[Exception] = []
        self.billed = True

    async def send(self, record: UsageRecord) -> bool:
        self.received.append(record)
        if self.failures:
            raise self.failures.pop(0)
        return self.billed


def yesterday() -> datetime:
    """Noon of yesterday, UTC."""
    return datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=1)


async def used(plane: QuotaPlane, tenant: Tenant, amount: int = 7, resource: str = "calls") -> None:
    """Count a use of yesterday's."""
    await plane.quotas.consume(tenant, resource, amount, at=yesterday())


# --- the outbox -----------------------------------------------------------------------------------------------------


async def test_a_closed_period_becomes_one_record(plane: QuotaPlane) -> None:
    """With the tenant, the period's two ends, how much, and a key; what did not end, or was not used, has none."""
    tenant = await plane.tenant(metadata={"stripe_customer_id": "cus_1"})
    await used(plane, tenant)
    await plane.quotas.consume(tenant, "calls", 3)
    await plane.quotas.consume(tenant, "seats", 2)
    await plane.quotas.consume(tenant, "jobs", 1, at=yesterday())
    await plane.quotas.release(tenant, "jobs", 1, at=yesterday())
    collector = Collector()
    exporter = UsageExporter(plane.control, collector, plane.events)
    report = await exporter.run()
    assert (report.closed, report.sent) == (1, 1)
    [record] = collector.received
    start = yesterday().replace(hour=0)
    assert (record.tenant_id, record.slug, record.metadata) == (tenant.id, "acme", {"stripe_customer_id": "cus_1"})
    assert (record.resource, record.period, record.quantity) == ("calls", "day", 7)
    assert (record.period_start, record.period_end) == (start, start + timedelta(days=1))
    assert len(record.idempotency_key) == 64
    assert [(event.resource, event.quantity) for event in plane.of(UsageExported)] == [("calls", 7)]
    assert (await exporter.run()).sent == 0 and len(collector.received) == 1


async def test_a_period_is_closed_only_after_its_leases_can_have_been_returned(plane: QuotaPlane) -> None:
    """Some minutes after its end."""
    tenant = await plane.tenant()
    usage = await plane.quotas.consume(tenant, "calls")
    assert usage.resets_at is not None
    exporter = UsageExporter(plane.control, Collector(), plane.events)
    assert await exporter.close_periods(at=usage.resets_at + timedelta(seconds=299)) == 0
    assert await exporter.close_periods(at=usage.resets_at + timedelta(seconds=300)) == 1


async def test_nothing_is_counted_in_a_closed_period(plane: QuotaPlane) -> None:
    """It has been billed; late use is refused, not lost in silence."""
    tenant = await plane.tenant()
    await used(plane, tenant)
    await UsageExporter(plane.control, Collector(), plane.events).close_periods()
    for call in (plane.quotas.consume, plane.quotas.release):
        with pytest.raises(QuotaError, match="closed"):
            await call(tenant, "calls", at=yesterday())


async def test_many_exporters_share_the_work(plane: QuotaPlane) -> None:
    """Each record is made once and sent once."""
    for number in range(40):
        await used(plane, await plane.tenant(f"t{number}"), number + 1)
    collector = Collector()
    exporters = [UsageExporter(plane.control, collector, plane.events, close_after_seconds=0) for _ in range(4)]
    reports = await asyncio.gather(*(exporter.run(batch=3) for exporter in exporters))
    assert sum(report.closed for report in reports) == sum(report.sent for report in reports) == 40
    assert sorted(record.quantity for record in collector.received) == list(range(1, 41))


async def test_what_a_sender_trips_over_stops_no_other_record(
    plane: QuotaPlane, caplog: pytest.LogCaptureFixture
) -> None:
    """A mistake in the application's code is logged with its traceback, and the record tried again."""
    for slug in ("acme", "globex", "initech"):
        await used(plane, await plane.tenant(slug))
    collector = Collector()
    collector.failures = [KeyError("customer")]
    report = await UsageExporter(plane.control, collector, plane.events).run()
    assert (report.sent, report.retried) == (2, 1)
    assert "KeyError" in caplog.text


async def test_records_of_one_tenant_and_resource_go_one_by_one(plane: QuotaPlane) -> None:
    """In the order of their periods, beside those of others: a receiver would refuse or delay the second."""
    now = datetime.now(UTC)
    for slug in ("acme", "globex"):
        tenant = await plane.tenant(slug)
        for days in range(1, 4):
            await plane.quotas.consume(tenant, "calls", days, at=now - timedelta(days=days))
    sending: set[tuple[UUID, str]] = set()
    both = asyncio.Event()

    class Single(Collector):
        async def send(self, record: UsageRecord) -> bool:
            about = (record.tenant_id, record.resource)
            assert about not in sending
            sending.add(about)
            if len(sending) == 2:
                both.set()
            async with asyncio.timeout(30):
                await both.wait()
            sending.remove(about)
            return await super().send(record)

    collector = Single()
    assert (await UsageExporter(plane.control, collector, plane.events).run()).sent == 6
    assert [record.quantity for record in collector.received if record.slug == "acme"] == [3, 2, 1]


async def test_closing_passes_over_what_is_being_counted(plane: QuotaPlane) -> None:
    """One that holds a period's row for long keeps no other period from being billed."""
    acme, globex = await plane.tenant("acme"), await plane.tenant("globex")
    await used(plane, acme)
    await used(plane, globex)
    exporter = UsageExporter(plane.control, Collector(), plane.events)
    async with plane.holding("SELECT 1 FROM tenancy.usage WHERE tenant_id = :id FOR UPDATE", id=acme.id):
        async with asyncio.timeout(HANGS):
            assert await exporter.close_periods() == 1
    assert await exporter.close_periods() == 1


async def test_a_record_that_another_exporter_took_over_is_left_to_it(plane: QuotaPlane) -> None:
    """An exporter that was held up for so long that its claims ran out sends nothing twice."""
    tenant = await plane.tenant()
    now = datetime.now(UTC)
    for days in range(1, 4):
        await plane.quotas.consume(tenant, "calls", days, at=now - timedelta(days=days))
    taken_over, first_ended = asyncio.Event(), asyncio.Event()

    class Later(Collector):
        async def send(self, record: UsageRecord) -> bool:
            taken_over.set()
            await first_ended.wait()
            return await super().send(record)

    later = Later()
    # the first one's claims have run out by this one's clock
    run = UsageExporter(plane.control, later, plane.events).run(at=now + timedelta(hours=1))
    tasks: list[asyncio.Task[ExportReport]] = []

    class HeldUp(Collector):
        async def send(self, record: UsageRecord) -> bool:
            tasks.append(asyncio.create_task(run))
            async with asyncio.timeout(30):
                await taken_over.wait()
            return await super().send(record)

    first = HeldUp()
    report = await UsageExporter(plane.control, first, plane.events).run(at=now)
    first_ended.set()
    assert ([record.quantity for record in first.received], report.sent) == ([3], 1)
    assert [(await task).sent for task in tasks] == [3]
    assert [record.quantity for record in later.received] == [3, 2, 1]


async def test_claims_are_prolonged_while_records_wait_for_their_turn(plane: QuotaPlane) -> None:
    """As long as an exporter is at work no other one takes what it has claimed."""
    tenant = await plane.tenant()
    now = datetime.now(UTC)
    for days in range(1, 4):
        await plane.quotas.consume(tenant, "calls", days, at=now - timedelta(days=days))
    another = UsageExporter(plane.control, Collector(), plane.events)

    class Slow(Collector):
        async def send(self, record: UsageRecord) -> bool:
            # a claim as old as the sending before it has made it
            await plane.sql("UPDATE tenancy.usage_records SET due_at = due_at - interval '100 seconds'")
            assert (await another.run()).sent == 0
            return await super().send(record)

    assert (await UsageExporter(plane.control, Slow(), plane.events).run()).sent == 3


async def test_a_late_failure_does_not_touch_what_was_sent(plane: QuotaPlane) -> None:
    """By another exporter, which had taken it over: it is not listed as given up, nor announced."""
    await used(plane, await plane.tenant())
    another = UsageExporter(plane.control, Collector(), plane.events)

    class Late(Collector):
        async def send(self, record: UsageRecord) -> bool:
            assert (await another.run(at=datetime.now(UTC) + timedelta(hours=1))).sent == 1
            raise UsageExportError("refused as a duplicate", permanent=True)

    report = await UsageExporter(plane.control, Late(), plane.events).run()
    assert (report.sent, report.failed) == (0, 0)
    assert await another.failures() == [] and plane.of(UsageExportFailed) == []


async def test_nothing_is_sent_behind_the_back_of_a_caller_that_gave_up(plane: QuotaPlane) -> None:
    """A cancelled run has ended all its sending when it returns."""
    for slug in ("acme", "globex"):
        await used(plane, await plane.tenant(slug))
    ended: list[str] = []
    both = asyncio.Event()
    waiting: set[str] = set()

    class Slow(Collector):
        async def send(self, record: UsageRecord) -> bool:
            waiting.add(record.slug)
            if len(waiting) == 2:
                both.set()
            try:
                await asyncio.Event().wait()
            finally:
                # what ends it takes a moment of its own
                await asyncio.sleep(0)
                ended.append(record.slug)
            return True

    task = asyncio.create_task(UsageExporter(plane.control, Slow(), plane.events).run())
    await both.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == ["acme", "globex"]


async def test_all_sending_has_ended_when_an_error_is_raised(plane: QuotaPlane) -> None:
    """What one group of records runs into ends no other one halfway, and leaves none at work."""
    for slug in ("acme", "globex"):
        await used(plane, await plane.tenant(slug))
    failed = asyncio.Event()

    class Slow(Collector):
        async def send(self, record: UsageRecord) -> bool:
            if record.slug == "acme":
                failed.set()
                raise asyncio.CancelledError
            await failed.wait()
            await asyncio.sleep(0)
            return await super().send(record)

    collector = Slow()
    with pytest.raises(asyncio.CancelledError):
        await UsageExporter(plane.control, collector, plane.events).run()
    assert [record.slug for record in collector.received] == ["globex"]
    assert await plane.sql("SELECT count(*) FROM tenancy.usage_records WHERE sent_at IS NOT NULL") == [(1,)]


async def test_the_longest_pause_is_six_hours(plane: QuotaPlane) -> None:
    """After however many attempts."""
    await used(plane, await plane.tenant())
    collector = Collector()
    exporter = UsageExporter(plane.control, collector, plane.events)
    await exporter.close_periods()
    now = datetime.now(UTC)
    for attempts in (20, 5_000):
        await plane.sql("UPDATE tenancy.usage_records SET attempts = :n, due_at = :now", n=attempts, now=now)
        collector.failures = [UsageExportError("no answer")]
        assert (await exporter.run(at=now)).retried == 1
        assert await plane.sql("SELECT due_at FROM tenancy.usage_records") == [(now + timedelta(hours=6),)]


async def test_a_failure_is_tried_again_later_under_the_same_key(plane: QuotaPlane) -> None:
    """Further and further apart, up to six hours."""
    tenant = await plane.tenant()
    await used(plane, tenant)
    collector = Collector()
    exporter = UsageExporter(plane.control, collector, plane.events)
    now = datetime.now(UTC)
    collector.failures = [UsageExportError("no answer"), UsageExportError("no answer")]
    assert (await exporter.run(at=now)).retried == 1
    assert (await exporter.run(at=now + timedelta(seconds=29))).retried == 0
    assert (await exporter.run(at=now + timedelta(seconds=31))).retried == 1
    assert (await exporter.run(at=now + timedelta(seconds=31 + 59))).sent == 0
    assert (await exporter.run(at=now + timedelta(seconds=31 + 61))).sent == 1
    assert len({record.idempotency_key for record in collector.received}) == 1
    assert [record.attempts for record in collector.received] == [1, 2, 3]
    assert [event.permanent for event in plane.of(UsageExportFailed)] == [False, False]


async def test_a_permanent_failure_is_set_aside_until_somebody_looks(plane: QuotaPlane) -> None:
    """It is listed with its reason, and can be made due again."""
    tenant = await plane.tenant()
    await used(plane, tenant)
    collector = Collector()
    collector.failures = [UsageExportError("no such customer", permanent=True)]
    exporter = UsageExporter(plane.control, collector, plane.events)
    assert (await exporter.run()).failed == 1
    assert (await exporter.run(at=datetime.now(UTC) + timedelta(days=30))).sent == 0
    [(record, reason)] = await exporter.failures()
    assert (record.quantity, reason) == (7, "no such customer")
    assert await exporter.retry([record.id]) == 1
    assert (await exporter.run()).sent == 1
    assert [record.attempts for record in collector.received] == [1, 2]
    assert await exporter.failures() == []


async def test_an_exporter_that_dies_while_sending_leaves_the_record_to_another(plane: QuotaPlane) -> None:
    """When its claim has run out, under the same key."""
    tenant = await plane.tenant()
    await used(plane, tenant)
    collector = Collector()
    collector.failures = [asyncio.CancelledError()]  # type: ignore[list-item]
    exporter = UsageExporter(plane.control, collector, plane.events)
    with pytest.raises(asyncio.CancelledError):
        await exporter.run()
    assert (await exporter.run()).sent == 0
    assert (await exporter.run(at=datetime.now(UTC) + timedelta(seconds=121))).sent == 1
    first, second = collector.received
    assert first.idempotency_key == second.idempotency_key


async def test_a_sender_that_hangs_is_given_up_at_its_deadline(plane: QuotaPlane) -> None:
    """The record is put off, and the others go out."""
    for slug in ("acme", "globex"):
        await used(plane, await plane.tenant(slug))

    class Slow(Collector):
        async def send(self, record: UsageRecord) -> bool:
            if record.slug == "acme":
                await asyncio.Event().wait()
            return await super().send(record)

    report = await UsageExporter(plane.control, Slow(), plane.events, timeout=0.1).run()
    assert (report.sent, report.retried) == (1, 1)


async def test_what_is_not_billed_is_done_with(plane: QuotaPlane) -> None:
    """A sender may leave a record out; it does not come again. Old ones are pruned."""
    tenant = await plane.tenant()
    await used(plane, tenant)
    collector = Collector()
    collector.billed = False
    exporter = UsageExporter(plane.control, collector, plane.events)
    assert (await exporter.run()).skipped == 1
    assert (await exporter.run()).skipped == 0
    assert await exporter.prune() == 0
    await plane.sql("UPDATE tenancy.usage_records SET sent_at = now() - interval '401 days'")
    assert await exporter.prune() == 1


async def test_use_that_was_never_billed_is_not_cleaned_away(plane: QuotaPlane) -> None:
    """Where there is billing; where there is none, nothing waits for it."""
    tenant = await plane.tenant()
    old = datetime.now(UTC) - timedelta(days=401)
    await plane.quotas.consume(tenant, "jobs", at=old)
    assert await plane.quotas.clean() == 1
    await used(plane, tenant)
    exporter = UsageExporter(plane.control, Collector(), plane.events)
    assert (await exporter.run()).sent == 1
    await plane.quotas.consume(tenant, "jobs", at=old)
    assert await plane.quotas.clean() == 0
    assert (await exporter.run()).sent == 1
    assert await plane.quotas.clean() == 1


async def test_nor_is_it_before_the_first_export(control_url: str) -> None:
    """The configuration says that there is billing."""
    async with quota_plane(control_url, tiers=TIERS, metering={"usage_sender": Collector()}) as plane:
        await plane.quotas.consume(await plane.tenant(), "jobs", at=datetime.now(UTC) - timedelta(days=401))
        assert await plane.quotas.clean() == 0


# --- purged tenants -------------------------------------------------------------------------------------------------


async def purge(plane: QuotaPlane, tenant: Tenant) -> None:
    """As if its database had been dropped."""
    await plane.registry.transition(tenant.id, Status.DELETED, action="tenant.delete")
    await plane.registry.begin_purge(tenant.id)
    await plane.registry.finish_purge(tenant.id)


async def test_a_purged_tenant_pays_for_what_it_used(plane: QuotaPlane) -> None:
    """Up to its purge: the customer is known until all of it was sent, and forgotten then."""
    collector = Collector()
    exporter = UsageExporter(plane.control, collector, plane.events)
    await used(plane, await plane.tenant("globex"), 1)
    assert (await exporter.run()).sent == 1
    tenant = await plane.tenant(metadata={"stripe_customer_id": "cus_1"})
    await used(plane, tenant)
    await exporter.close_periods()
    usage = await plane.quotas.consume(tenant, "calls", 3)
    await purge(plane, tenant)
    assert (await exporter.run()).sent == 2
    yesterdays, todays = collector.received[1:]
    assert (yesterdays.quantity, todays.quantity) == (7, 3)
    assert yesterdays.metadata == todays.metadata == {"stripe_customer_id": "cus_1"}
    assert usage.resets_at is not None
    # it ends with the tenant, so that it can be billed before the period's end
    assert todays.period_start < todays.period_end <= datetime.now(UTC) < usage.resets_at
    assert await plane.sql("SELECT 1 FROM tenancy.usage_records WHERE metadata IS NOT NULL") == []
    assert (await plane.registry.get(tenant.id)).metadata == {}


async def test_use_that_is_being_counted_at_the_purge_is_billed(plane: QuotaPlane) -> None:
    """The purge waits for it."""
    collector = Collector()
    exporter = UsageExporter(plane.control, collector, plane.events)
    await used(plane, await plane.tenant("globex"), 1)
    assert (await exporter.run()).sent == 1
    tenant = await plane.tenant(metadata={"stripe_customer_id": "cus_1"})
    await plane.quotas.consume(tenant, "calls", 3)
    async with plane.holding("SELECT tenancy.quota_consume(:id, 'calls', 2)", id=tenant.id):
        purging = asyncio.create_task(purge(plane, tenant))
        await plane.waiting(purging)
    await purging
    assert (await exporter.run()).sent == 1
    assert collector.received[-1].quantity == 5


async def test_where_nobody_bills_a_purge_keeps_no_metadata(plane: QuotaPlane) -> None:
    """It may name people."""
    tenant = await plane.tenant(metadata={"owner": "jane.doe@example.org"})
    await plane.quotas.consume(tenant, "calls", 3)
    await purge(plane, tenant)
    assert await plane.sql("SELECT 1 FROM tenancy.usage_records") == []


async def test_the_first_tenant_to_be_purged_pays_as_well(tenancy_config: TenancyConfig) -> None:
    """Where the configuration has a sender, before anything was ever sent."""
    collector = Collector()
    tenancy = Tenancy(tenancy_config.replace(metering={"usage_sender": collector}))
    await tenancy.open(initialise=True)
    async with tenancy:
        await tenancy.tenants.create("acme", metadata={"stripe_customer_id": "cus_1"})
        await tenancy.quotas.consume("acme", "api_calls", 3)
        await tenancy.tenants.delete("acme")
        await tenancy.tenants.purge("acme")
        assert (await tenancy.internals.usage_exporter.run()).sent == 1
    [record] = collector.received
    assert (record.slug, record.quantity, record.metadata) == ("acme", 3, {"stripe_customer_id": "cus_1"})
