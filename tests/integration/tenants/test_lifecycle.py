"""What time does to a tenant: renames that redirect, schedules, trials, retention, and domains of its own."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from tenancy_orm import Limit, Status, Tenancy, TenancyConfig, Tier, TierPolicy
from tenancy_orm.errors import (
    ConfigurationError,
    DomainError,
    InvalidSlugError,
    InvalidTransitionError,
    TenantExistsError,
    TenantMaintenanceError,
    TenantNotFoundError,
)
from tenancy_orm.protocols import UsageRecord
from tenancy_orm.tenants.domains import DomainManager, check_domain


def ago(seconds: float) -> datetime:
    """A time in the past."""
    return datetime.now(UTC) - timedelta(seconds=seconds)


# --- rename ---------------------------------------------------------------------------------------------------------


async def test_a_renamed_tenant_is_found_by_both_slugs(tenancy: Tenancy) -> None:
    """The old slug leads to it; its database keeps its name and its rows."""
    created = await tenancy.tenants.create("acme")
    await tenancy.execute("INSERT INTO notes (body) VALUES ('kept')", tenant="acme")
    renamed = await tenancy.tenants.rename("acme", "acme-corp")
    assert renamed.slug == "acme-corp"
    assert renamed.placement == created.tenant.placement
    for slug in ("acme", "acme-corp"):
        assert (await tenancy.tenants.get(slug)).id == created.id
        assert await tenancy.fetch_value("SELECT body FROM notes", tenant=slug) == "kept"
    assert "acme" in (await tenancy.tenants.get_by_api_key(created.api_key)).aliases


async def test_a_former_slug_is_nobody_elses_while_it_redirects(tenancy: Tenancy) -> None:
    """Another customer cannot receive what is sent to the old address."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.rename("acme", "acme-corp")
    await tenancy.tenants.create("globex")
    with pytest.raises(TenantExistsError, match="still redirects to"):
        await tenancy.tenants.create("acme")
    with pytest.raises(TenantExistsError, match="still redirects to"):
        await tenancy.tenants.rename("globex", "acme")


async def test_a_former_slug_is_free_after_the_redirect_period(tenancy: Tenancy) -> None:
    """From then on it leads nowhere, until somebody takes it."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.rename("acme", "acme-corp", redirect_seconds=0)
    with pytest.raises(TenantNotFoundError):
        await tenancy.tenants.get("acme")
    other = await tenancy.tenants.create("acme")
    assert (await tenancy.tenants.get("acme")).id == other.id


async def test_a_tenant_can_take_its_former_slug_back(tenancy: Tenancy) -> None:
    """The reservation is against others."""
    created = await tenancy.tenants.create("acme")
    await tenancy.tenants.rename("acme", "acme-corp")
    await tenancy.tenants.rename("acme-corp", "acme")
    found = await tenancy.tenants.get("acme")
    assert found.slug == "acme"
    assert found.aliases == {"acme-corp"}
    assert (await tenancy.tenants.get("acme-corp")).id == created.id


async def test_rename_refuses_a_taken_or_malformed_slug(tenancy: Tenancy) -> None:
    """Nothing changes."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.create("globex")
    with pytest.raises(TenantExistsError):
        await tenancy.tenants.rename("acme", "globex")
    with pytest.raises(InvalidSlugError):
        await tenancy.tenants.rename("acme", "No Slug")
    assert (await tenancy.tenants.get("acme")).slug == "acme"


async def test_giving_up_and_taking_a_slug_at_once_never_shares_it(tenancy: Tenancy) -> None:
    """A rename away from a slug and creations of it at the same moment: the slug never names two tenants."""
    for round_number in range(5):
        slug = f"acme-{round_number}"
        first = await tenancy.tenants.create(slug)
        await tenancy.tenants.create(f"other-{round_number}")
        await asyncio.gather(
            tenancy.tenants.rename(slug, f"{slug}-new"),
            tenancy.tenants.rename(f"other-{round_number}", slug),
            return_exceptions=True,
        )
        assert (await tenancy.tenants.get(slug)).id == first.id


# --- schedules ------------------------------------------------------------------------------------------------------


async def test_a_scheduled_suspension_takes_place(tenancy: Tenancy) -> None:
    """At its time, for the reason given; before, nothing."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.schedule_suspension("acme", datetime.now(UTC) + timedelta(days=1), reason="notice given")
    assert (await tenancy.run_housekeeping()).suspended == ()
    await tenancy.tenants.schedule_suspension("acme", ago(1), reason="notice given")
    assert (await tenancy.run_housekeeping()).suspended == ("acme",)
    suspended = await tenancy.tenants.get("acme")
    assert (suspended.status, suspended.reason) == (Status.SUSPENDED, "notice given")
    await tenancy.tenants.activate("acme")
    assert (await tenancy.run_housekeeping()).suspended == ()


async def test_a_schedule_can_be_called_off(tenancy: Tenancy) -> None:
    """None cancels it."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.schedule_suspension("acme", ago(1))
    await tenancy.tenants.schedule_suspension("acme", None)
    assert (await tenancy.run_housekeeping()).suspended == ()


async def test_a_trial_that_ended_is_suspended(tenancy: Tenancy) -> None:
    """And one that has not is left alone."""
    await tenancy.tenants.create("over", status="trial", trial_ends_at=ago(1))
    await tenancy.tenants.create("running", status="trial", trial_ends_at=datetime.now(UTC) + timedelta(days=1))
    await tenancy.tenants.create("endless", status="trial")
    assert (await tenancy.run_housekeeping()).suspended == ("over",)
    assert (await tenancy.tenants.get("over")).reason == "the trial has ended"
    assert (await tenancy.tenants.get("running")).status is Status.TRIAL


async def test_a_deleted_tenant_is_purged_after_its_retention(tenancy: Tenancy) -> None:
    """Not before; a time of its own comes first."""
    for slug in ("old", "young", "early"):
        await tenancy.tenants.create(slug)
        await tenancy.tenants.delete(slug)
    with pytest.raises(Exception, match="deleted_at"):
        # the column follows the status, by trigger and check; time is turned back with the trigger off
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text("UPDATE tenancy.tenants SET deleted_at = NULL"))
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(
            text("UPDATE tenancy.tenants SET deleted_at = now() - interval '31 days' WHERE slug = 'old'")
        )
    await tenancy.tenants.schedule_purge("early", ago(1))
    report = await tenancy.run_housekeeping()
    assert sorted(report.purged) == ["early", "old"]
    assert (await tenancy.tenants.get("young")).status is Status.DELETED


async def test_only_a_deleted_tenant_can_be_scheduled_for_a_purge(tenancy: Tenancy) -> None:
    """A running tenant cannot lose its data by a timer."""
    await tenancy.tenants.create("acme")
    with pytest.raises(InvalidTransitionError):
        await tenancy.tenants.schedule_purge("acme", ago(1))
    with pytest.raises(ConfigurationError, match="aware"):
        await tenancy.tenants.schedule_suspension("acme", datetime(2030, 1, 1))  # noqa: DTZ001 - the mistake under test


async def test_housekeeping_can_run_many_times_at_once(tenancy: Tenancy) -> None:
    """Each due tenant is dealt with by one of the runs, and no run fails."""
    for i in range(4):
        await tenancy.tenants.create(f"t{i}")
        await tenancy.tenants.schedule_suspension(f"t{i}", ago(1))
    reports = await asyncio.gather(*(tenancy.run_housekeeping() for _ in range(3)))
    assert sorted(slug for report in reports for slug in report.suspended) == ["t0", "t1", "t2", "t3"]
    assert [report.errors for report in reports] == [(), (), ()]


class Collector:
    """A receiver of usage that knows whether it was closed."""

    def __init__(self) -> None:
        self.received: list[UsageRecord] = []
        self.closed = False

    async def send(self, record: UsageRecord) -> bool:
        self.received.append(record)
        return True

    async def close(self) -> None:
        self.closed = True


async def test_housekeeping_exports_usage_and_applies_policies(tenancy_config: TenancyConfig) -> None:
    """Where the configuration has a sender and policies; the sender is closed with the ``Tenancy``."""
    collector = Collector()
    tiers = {name: Tier(name, {"calls": Limit(100, "day"), "seats": limit}) for name, limit in (("s", 1), ("m", 9))}
    policy = TierPolicy(resource="seats", sustained=timedelta(0), apply=True)
    config = tenancy_config.replace(
        tiers=tiers,
        default_tier="s",
        metering={"usage_sender": collector, "tier_policies": (policy,)},
        retention={"tenant_seconds": 0},
    )
    tenancy = Tenancy(config)
    await tenancy.open(initialise=True)
    async with tenancy:
        tenant = (await tenancy.tenants.create("acme")).tenant
        await tenancy.quotas.consume(tenant, "seats")
        await tenancy.quotas.consume(tenant, "calls", 7, at=ago(2 * 86_400))
        report = await tenancy.run_housekeeping()
        assert report.errors == ()
        assert [(record.slug, record.quantity) for record in collector.received] == [("acme", 7)]
        assert [found.proposed for found in report.chores["evaluate_tier_policies"]] == ["m"]
        assert (await tenancy.tenants.get("acme")).tier == "m"
        assert (
            await tenancy.internals.tier_policies.evaluate(),
            (await tenancy.internals.usage_exporter.run()).sent,
        ) == (
            [],
            0,
        )
    assert collector.closed


async def test_there_is_no_exporter_without_a_sender(tenancy: Tenancy) -> None:
    """Nor a chore; the error says what to give."""
    with pytest.raises(ConfigurationError, match="usage_sender"):
        _ = tenancy.internals.usage_exporter
    assert "export_usage" not in (await tenancy.run_housekeeping()).chores


async def test_operators_pass_maintenance(tenancy: Tenancy) -> None:
    """A tenant in maintenance refuses sessions but an operator's."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.start_maintenance("acme", reason="moving")
    with pytest.raises(TenantMaintenanceError, match="moving"):
        async with tenancy.session("acme"):
            pass
    async with tenancy.session("acme", operator=True) as session:
        assert await session.scalar(text("SELECT 1")) == 1


# --- domains --------------------------------------------------------------------------------------------------------


class Zone:
    """TXT records as a domain's owner publishes them, in place of the DNS."""

    def __init__(self) -> None:
        self.records: dict[str, list[str]] = {}

    async def lookup(self, name: str) -> list[str]:
        """Return what is published."""
        return self.records.get(name, [])


async def test_a_domain_names_its_tenant_once_it_is_verified(tenancy: Tenancy) -> None:
    """A claim gives nothing; the published token does."""
    acme = (await tenancy.tenants.create("acme")).tenant
    zone = Zone()
    domains = DomainManager(tenancy.internals.control, tenancy.audit, zone)
    claimed = await domains.claim(acme, "App.Acme.Example.")
    assert claimed.domain == "app.acme.example"
    assert (await tenancy.tenants.get("acme")).aliases == frozenset()
    with pytest.raises(DomainError, match="no TXT record"):
        await domains.verify(acme, "app.acme.example")
    zone.records[claimed.challenge] = ["something else", f" {claimed.token} "]
    verified = await domains.verify(acme, "app.acme.example")
    assert verified.verified_at is not None
    assert (await tenancy.tenants.get("acme")).aliases == {"app.acme.example"}
    await domains.release(acme, "app.acme.example")
    assert (await tenancy.tenants.get("acme")).aliases == frozenset()


async def test_a_domain_is_the_tenants_whose_token_was_published(tenancy: Tenancy) -> None:
    """Others may claim it too, as often as they like: that blocks nobody, and gives them nothing."""
    acme = (await tenancy.tenants.create("acme")).tenant
    globex = (await tenancy.tenants.create("globex")).tenant
    zone = Zone()
    domains = DomainManager(tenancy.internals.control, tenancy.audit, zone)
    claimed = await domains.claim(acme, "acme.example")
    zone.records[claimed.challenge] = [claimed.token]
    squatted = await domains.claim(globex, "acme.example")
    assert squatted.token != claimed.token
    assert await domains.claim(acme, "acme.example") == claimed
    with pytest.raises(DomainError, match="no TXT record"):
        await domains.verify(globex, "acme.example")
    await domains.verify(acme, "acme.example")
    with pytest.raises(DomainError, match="another tenant"):
        await domains.claim(globex, "acme.example")
    # even with a published record
    zone.records[claimed.challenge].append(squatted.token)
    with pytest.raises(DomainError, match="another tenant"):
        await domains.verify(globex, "acme.example")
    assert (await tenancy.tenants.get("globex")).aliases == frozenset()
    await domains.release(acme, "acme.example")
    await domains.verify(globex, "acme.example")
    assert (await tenancy.tenants.get("globex")).aliases == {"acme.example"}


async def test_of_two_that_verify_a_domain_at_once_one_gets_it(tenancy: Tenancy) -> None:
    """PostgreSQL decides, whatever each of them has read before."""
    tenants = [(await tenancy.tenants.create(slug)).tenant for slug in ("acme", "globex")]
    zone = Zone()
    domains = DomainManager(tenancy.internals.control, tenancy.audit, zone)
    claims = [await domains.claim(tenant, "acme.example") for tenant in tenants]
    zone.records[claims[0].challenge] = [claim.token for claim in claims]
    outcomes = await asyncio.gather(
        *(domains.verify(tenant, "acme.example") for tenant in tenants), return_exceptions=True
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Domain", "DomainError"]


@pytest.mark.parametrize(
    "domain", ["", "localhost", "a..b", "-a.example", "a_b.example", "1.2.3.4", "x" * 64 + ".example"]
)
def test_what_is_no_domain_name_is_refused(domain: str) -> None:
    """Addresses and single labels too."""
    with pytest.raises(DomainError):
        check_domain(domain)
