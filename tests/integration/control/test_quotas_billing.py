"""Usage records: made once per closed period, sent at least once, counted once; Stripe is played by a local server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from tenancy_orm.config import Limit, Tier
from tenancy_orm.context import Tenant
from tenancy_orm.control.usage import UsageExporter
from tenancy_orm.errors import QuotaError, UsageExportError
from tenancy_orm.events import UsageExported, UsageExportFailed
from tenancy_orm.integrations.stripe_billing import StripeMeterSender
from tenancy_orm.protocols import UsageRecord
from tests.support.quotas import QuotaPlane, quota_plane
from tests.support.stripe_server import FakeStripe, fake_stripe

TIERS = {
    "free": Tier(
        "free",
        {"calls": Limit(1_000, "day"), "mails": Limit(None, "month"), "seats": Limit(5), "jobs": Limit(1, "day")},
    )
}
KEY = "sk_test_of_the_fake"

# the stripe library gives httpx its body in a way that httpx would rather not have
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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


# --- Stripe ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def stripe(plane: QuotaPlane) -> AsyncIterator[tuple[FakeStripe, StripeMeterSender]]:
    async with fake_stripe(KEY) as fake:
        sender = StripeMeterSender(KEY, meters={"calls": "acme_calls"}, base_url=fake.url, timeout=5)
        try:
            yield fake, sender
        finally:
            await sender.close()


async def test_stripe_receives_a_meter_event(plane: QuotaPlane, stripe: tuple[FakeStripe, StripeMeterSender]) -> None:
    """Customer, value, the last second of the period, and the key twice: as identifier and as header."""
    fake, sender = stripe
    await used(plane, await plane.tenant(metadata={"stripe_customer_id": "cus_1"}))
    assert (await UsageExporter(plane.control, sender, plane.events).run()).sent == 1
    [event] = fake.events.values()
    end = yesterday().replace(hour=0) + timedelta(days=1)
    assert event["event_name"] == "acme_calls"
    assert (event["payload[stripe_customer_id]"], event["payload[value]"]) == ("cus_1", "7")
    assert int(event["timestamp"]) == int(end.timestamp()) - 1
    assert fake.requests[0]["idempotency-key"] == event["identifier"]


async def test_stripe_counts_a_record_once_however_often_it_is_sent(
    plane: QuotaPlane, stripe: tuple[FakeStripe, StripeMeterSender]
) -> None:
    """The refusal of a second event with the same identifier means that the first arrived."""
    fake, sender = stripe
    await used(plane, await plane.tenant(metadata={"stripe_customer_id": "cus_1"}))
    exporter = UsageExporter(plane.control, sender, plane.events)
    assert (await exporter.run()).sent == 1
    await plane.sql("UPDATE tenancy.usage_records SET sent_at = NULL, due_at = now()")
    assert (await exporter.run()).sent == 1
    assert len(fake.requests) == 2 and len(fake.events) == 1


async def test_a_resource_without_a_meter_and_a_tenant_without_a_customer_are_not_billed(
    plane: QuotaPlane, stripe: tuple[FakeStripe, StripeMeterSender]
) -> None:
    """Stripe hears nothing of them."""
    fake, sender = stripe
    await used(plane, await plane.tenant("acme"))
    await used(plane, await plane.tenant("globex", metadata={"stripe_customer_id": "cus_2"}), 1, "jobs")
    assert (await UsageExporter(plane.control, sender, plane.events).run()).skipped == 2
    assert fake.requests == []


@pytest.mark.parametrize("status", [500, 429, 401])
async def test_stripes_bad_moments_are_waited_out(
    plane: QuotaPlane, stripe: tuple[FakeStripe, StripeMeterSender], status: int
) -> None:
    """Its errors, its rate limit, and a key that is wrong for the moment: tried again. No key in any message."""
    fake, sender = stripe
    await used(plane, await plane.tenant(metadata={"stripe_customer_id": "cus_1"}))
    fake.failures = [status]
    exporter = UsageExporter(plane.control, sender, plane.events)
    now = datetime.now(UTC)
    assert (await exporter.run(at=now)).retried == 1
    assert KEY not in plane.of(UsageExportFailed)[0].error and KEY not in repr(sender)
    assert (await exporter.run(at=now + timedelta(minutes=1))).sent == 1


async def test_what_stripe_will_never_take_is_set_aside(
    plane: QuotaPlane, stripe: tuple[FakeStripe, StripeMeterSender]
) -> None:
    """An unknown customer, and a period older than the 35 days it accepts."""
    fake, sender = stripe
    await used(plane, await plane.tenant("acme", metadata={"stripe_customer_id": "nonsense"}))
    old = await plane.tenant("globex", metadata={"stripe_customer_id": "cus_2"})
    await plane.quotas.consume(old, "calls", at=datetime.now(UTC) - timedelta(days=40))
    exporter = UsageExporter(plane.control, sender, plane.events)
    assert (await exporter.run()).failed == 2
    assert {reason.split(" (")[0].split(": ")[0] for _, reason in await exporter.failures()} == {
        "Stripe refused the record",
        "the record is older than the 35 days that Stripe accepts",
    }
    assert len(fake.requests) == 1


async def test_a_stripe_that_does_not_answer_is_tried_again(
    plane: QuotaPlane, stripe: tuple[FakeStripe, StripeMeterSender]
) -> None:
    """Within the exporter's own deadline."""
    fake, sender = stripe
    fake.silent = True
    await used(plane, await plane.tenant(metadata={"stripe_customer_id": "cus_1"}))
    assert (await UsageExporter(plane.control, sender, plane.events, timeout=0.3).run()).retried == 1
    assert fake.events == {}
