"""Stripe, played by a local server, counts each usage record once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from tenancy_orm.errors import UsageExportError
from tenancy_orm.events import UsageExportFailed
from tenancy_orm.integrations.stripe_billing import StripeMeterSender
from tenancy_orm.metering.usage import UsageExporter
from tenancy_orm.protocols import UsageRecord
from tests.integration.metering.test_billing import plane, used, yesterday
from tests.support.quotas import QuotaPlane
from tests.support.stripe_server import FakeStripe, fake_stripe

__all__ = ["plane"]

KEY = "sk_test_of_the_fake"

# the stripe library gives httpx its body in a way that httpx would rather not have
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
async def stripe(plane: QuotaPlane) -> AsyncIterator[tuple[FakeStripe, StripeMeterSender]]:
    async with fake_stripe(KEY) as fake:
        sender = StripeMeterSender(KEY, meters={"calls": "acme_calls"}, base_url=fake.url, timeout=5)
        try:
            yield fake, sender
        finally:
            await sender.close()


async def test_stripe_receives_a_meter_event(plane: QuotaPlane, stripe: tuple[FakeStripe, StripeMeterSender]) -> None:
    """Customer, value, the last second of the period, and the key: as identifier, and in the header of this attempt."""
    fake, sender = stripe
    await used(plane, await plane.tenant(metadata={"stripe_customer_id": "cus_1"}))
    assert (await UsageExporter(plane.control, sender, plane.events).run()).sent == 1
    [event] = fake.events.values()
    end = yesterday().replace(hour=0) + timedelta(days=1)
    assert event["event_name"] == "acme_calls"
    assert (event["payload[stripe_customer_id]"], event["payload[value]"]) == ("cus_1", "7")
    assert int(event["timestamp"]) == int(end.timestamp()) - 1
    assert fake.requests[0]["idempotency-key"] == f"{event['identifier']}-1"


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


async def test_a_resource_without_a_meter_and_a_tenant_that_is_not_billed_are_left_out(
    plane: QuotaPlane, stripe: tuple[FakeStripe, StripeMeterSender]
) -> None:
    """Nothing is sent to Stripe for them."""
    fake, sender = stripe
    await used(plane, await plane.tenant("acme", metadata={"stripe_customer_id": None}))
    await used(plane, await plane.tenant("globex", metadata={"stripe_customer_id": "cus_2"}), 1, "jobs")
    assert (await UsageExporter(plane.control, sender, plane.events).run()).skipped == 2
    assert fake.requests == []


async def test_a_customer_that_was_forgotten_is_billed_once_it_is_known(
    plane: QuotaPlane, stripe: tuple[FakeStripe, StripeMeterSender]
) -> None:
    """The record is set aside, not taken for one that is not to be billed."""
    fake, sender = stripe
    tenant = await plane.tenant()
    await used(plane, tenant)
    exporter = UsageExporter(plane.control, sender, plane.events)
    assert (await exporter.run()).failed == 1
    [(record, reason)] = await exporter.failures()
    assert "stripe_customer_id" in reason
    await plane.registry.change(tenant.id, action="tenant.update", metadata={"stripe_customer_id": "cus_1"})
    assert await exporter.retry([record.id]) == 1
    assert (await exporter.run()).sent == 1
    assert [event["payload[stripe_customer_id]"] for event in fake.events.values()] == ["cus_1"]


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


async def test_an_event_whose_acceptance_was_not_told_is_counted_once(
    plane: QuotaPlane, stripe: tuple[FakeStripe, StripeMeterSender]
) -> None:
    """Stripe said that it had failed, and had not."""
    fake, sender = stripe
    fake.lost = True
    await used(plane, await plane.tenant(metadata={"stripe_customer_id": "cus_1"}))
    exporter = UsageExporter(plane.control, sender, plane.events)
    now = datetime.now(UTC)
    assert (await exporter.run(at=now)).retried == 1
    assert (await exporter.run(at=now + timedelta(minutes=1))).sent == 1
    assert len(fake.events) == 1


async def test_a_record_is_sent_after_what_was_wrong_with_it_is_mended(
    plane: QuotaPlane, stripe: tuple[FakeStripe, StripeMeterSender]
) -> None:
    """Though Stripe would repeat its first answer for a day."""
    fake, sender = stripe
    tenant = await plane.tenant(metadata={"stripe_customer_id": "nonsense"})
    await used(plane, tenant)
    exporter = UsageExporter(plane.control, sender, plane.events)
    assert (await exporter.run()).failed == 1
    await plane.registry.change(tenant.id, action="tenant.update", metadata={"stripe_customer_id": "cus_1"})
    [(record, _)] = await exporter.failures()
    assert await exporter.retry([record.id]) == 1
    assert (await exporter.run()).sent == 1
    assert [event["payload[stripe_customer_id]"] for event in fake.events.values()] == ["cus_1"]


@pytest.mark.parametrize(
    ("message", "code", "arrived"),
    [
        ("An event already exists with identifier {key}.", None, True),
        ("a wording of tomorrow", "duplicate_meter_event", True),
        ("An event already exists with identifier another.", None, False),
        ("A meter already exists with this name.", None, False),
    ],
)
async def test_only_the_refusal_of_this_very_event_tells_that_it_arrived(
    stripe: tuple[FakeStripe, StripeMeterSender],
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    code: str | None,
    arrived: bool,
) -> None:
    """By Stripe's code, or by a message that names its identifier."""
    fake, sender = stripe
    end = datetime.now(UTC) - timedelta(hours=1)
    record = UsageRecord(
        id=1,
        tenant_id=UUID(int=1),
        slug="acme",
        metadata={"stripe_customer_id": "cus_1"},
        resource="calls",
        period="day",
        period_start=end - timedelta(days=1),
        period_end=end,
        quantity=7,
        idempotency_key="k" * 64,
        attempts=1,
    )
    error = {"type": "invalid_request_error", "message": message.format(key=record.idempotency_key), "code": code}
    monkeypatch.setattr(fake, "_execute", lambda form: (400, {"error": error}))
    if arrived:
        assert await sender.send(record)
    else:
        with pytest.raises(UsageExportError) as caught:
            await sender.send(record)
        assert caught.value.permanent


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
