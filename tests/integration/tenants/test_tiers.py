"""The tiers in force are those that were applied, not those of whoever opened the control database last."""

from __future__ import annotations

import pytest

from tenancy_orm import Actor, Limit, Tenancy, TenancyConfig, Tier
from tenancy_orm.errors import QuotaExceededError, UnknownTierError
from tenancy_orm.tenants.tiers import differing


def tiers(*given: Tier) -> dict[str, Tier]:
    """By name, in their order."""
    return {tier.name: tier for tier in given}


SMALL = tiers(Tier("s", {"seats": 1}), Tier("m", {"seats": 5}))


async def opened(config: TenancyConfig, *, initialise: bool) -> Tenancy:
    """An open ``Tenancy``."""
    return await Tenancy(config).open(initialise=initialise)


async def test_opening_changes_no_limit(tenancy_config: TenancyConfig, caplog: pytest.LogCaptureFixture) -> None:
    """A command from another directory, or an old process that restarts, leaves what customers may do as it is."""
    application = await opened(tenancy_config.replace(tiers=SMALL, default_tier="s"), initialise=True)
    stranger = Tenancy(tenancy_config.replace(tiers=tiers(Tier("s", {"seats": 99})), default_tier="s"))
    try:
        tenant = (await application.tenants.create("acme")).tenant
        before = await application.tiers.in_force()
        await stranger.open()
        assert differing(await stranger.tiers.in_force(), stranger.config.tiers) == ("s",)
        assert "tenancy tiers apply" in caplog.text
        assert await application.tiers.in_force() == before
        await application.quotas.consume(tenant, "seats")
        with pytest.raises(QuotaExceededError):
            await application.quotas.consume(tenant, "seats")
    finally:
        await stranger.close()
        await application.close()


async def test_applying_is_one_audited_change(tenancy_config: TenancyConfig) -> None:
    """In force at once; a tier that nobody has any more goes, one that somebody has stays, behind the others."""
    async with await opened(tenancy_config.replace(tiers=SMALL, default_tier="s"), initialise=True) as tenancy:
        tenant = (await tenancy.tenants.create("acme", tier="s")).tenant
        wanted = tiers(Tier("l", {"seats": Limit(50)}))
        changes = await tenancy.tiers.apply(wanted, actor=Actor("operator", "mara"))
        assert (changes.added, changes.changed, changes.removed, changes.kept) == (("l",), (), ("m",), ("s",))
        assert list(await tenancy.tiers.in_force()) == ["l", "s"]
        assert (await tenancy.quotas.limits(tenant))["seats"].amount == 1
        [event] = await tenancy.audit.events(action="tiers.apply", limit=1)
        assert event.actor.id == "mara"
        assert (event.before or {}).keys() == {"s", "m"} and (event.after or {}).keys() == {"l", "s"}
        entries = len(await tenancy.audit.events(action="tiers.apply"))
        assert not await tenancy.tiers.apply(wanted)
        assert len(await tenancy.audit.events(action="tiers.apply")) == entries
        changed = await tenancy.tiers.apply({**wanted, "s": Tier("s", {"seats": 2})})
        assert changed.changed == ("s",)
        assert (await tenancy.quotas.limits(tenant))["seats"].amount == 2


async def test_a_tenant_cannot_have_a_tier_that_is_not_in_force(tenancy_config: TenancyConfig) -> None:
    """A process with a newer configuration is refused, by the database, until its tiers were applied."""
    async with await opened(tenancy_config.replace(tiers=SMALL, default_tier="s"), initialise=True):
        newer = await opened(tenancy_config.replace(tiers=tiers(Tier("xl")), default_tier="xl"), initialise=False)
        async with newer:
            with pytest.raises(UnknownTierError, match="tenancy tiers apply"):
                await newer.tenants.create("acme")
            await newer.tiers.apply(newer.config.tiers)
            assert (await newer.tenants.create("acme")).tenant.tier == "xl"
