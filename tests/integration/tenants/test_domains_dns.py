"""TXT records looked up over the wire, from a name server on loopback; claims that expire, domains that lapse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import dns.rcode
import dns.resolver
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import DomainConfig
from tenancy_orm.errors import ConfigurationError, CrossTenantError, DomainError
from tenancy_orm.events import DomainFailing, DomainLapsed, TenantEvent
from tenancy_orm.tenants.domain_upkeep import DomainReport
from tenancy_orm.tenants.domains import ConfiguredTextRecords, DnsTextRecords
from tests.support.nameserver import NameServer, name_server
from tests.support.waiting import HANGS


@pytest.fixture
async def server() -> AsyncIterator[NameServer]:
    """A name server of this test's own."""
    async with name_server() as server:
        yield server


# --- look-ups -------------------------------------------------------------------------------------------------------


async def test_published_texts_are_found(server: NameServer) -> None:
    """A record of several strings is one text."""
    server.texts["_tenancy-challenge.acme.example"] = ['"first part " "second part"', '"other"']
    records = DnsTextRecords(nameservers=[server.address], timeout=1.0)
    assert sorted(await records.lookup("_tenancy-challenge.acme.example")) == ["first part second part", "other"]


async def test_a_name_without_a_record_has_no_texts(server: NameServer) -> None:
    """It does not exist, or has records of other kinds only."""
    server.codes["other.example"] = dns.rcode.NOERROR
    records = DnsTextRecords(nameservers=[server.address], timeout=1.0)
    assert await records.lookup("_tenancy-challenge.globex.example") == []
    assert await records.lookup("other.example") == []


async def test_a_failing_name_server_is_an_error_within_the_deadline(server: NameServer) -> None:
    """Not an absent record: the claim is not judged."""
    server.silent.add("silent.example")
    server.codes |= {"failed.example": dns.rcode.SERVFAIL, "refused.example": dns.rcode.REFUSED}
    records = DnsTextRecords(nameservers=[server.address], timeout=1.0)
    async with asyncio.timeout(HANGS):
        for name in ("silent.example", "failed.example", "refused.example"):
            with pytest.raises(DomainError, match="cannot be looked up"):
                await records.lookup(name)


async def test_a_system_without_name_servers_judges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container without a resolv.conf; the error names the setting."""

    def refuse(self: object, path: object) -> None:
        raise dns.resolver.NoResolverConfiguration("cannot open it")  # type: ignore[no-untyped-call]

    monkeypatch.setattr(dns.resolver.BaseResolver, "read_resolv_conf", refuse)
    with pytest.raises(DomainError, match=r"domains\.nameservers"):
        await ConfiguredTextRecords(DomainConfig()).lookup("acme.example")


@pytest.mark.parametrize("bad", ["dns.example", "1.2.3.4:0", "1.2.3.4:99999", "::1:53:x"])
def test_what_is_no_name_server_is_refused(bad: str) -> None:
    """When the configuration is read."""
    assert DomainConfig(nameservers=("9.9.9.9", "127.0.0.1:5353", "::1", "[::1]:53")).nameservers
    with pytest.raises(ConfigurationError):
        TenancyConfig(control_url="postgresql://x/y").replace(domains={"nameservers": [bad]})


# --- time -----------------------------------------------------------------------------------------------------------

CHALLENGE = "_tenancy-challenge.acme.example"


@pytest.fixture
async def tenancy(tenancy_config: TenancyConfig, server: NameServer) -> AsyncIterator[Tenancy]:
    """One that asks the name server, with the default times."""
    opened = Tenancy(tenancy_config.replace(domains={"nameservers": [server.address]}))
    await opened.open(initialise=True)
    try:
        yield opened
    finally:
        await opened.close()


async def pass_days(tenancy: Tenancy, days: float) -> None:
    """Turn the times of all domains back."""
    columns = ("created_at", "verified_at", "checked_at", "failing_since", "lapsed_at")
    moved = ", ".join(f"{column} = {column} - CAST(:span AS interval)" for column in columns)
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text(f"UPDATE tenancy.domains SET {moved}"), {"span": timedelta(days=days)})


async def check(tenancy: Tenancy, days: float = 1.1) -> DomainReport:
    """Let time pass, and do what is due."""
    await pass_days(tenancy, days)
    report = await tenancy.run_housekeeping()
    assert report.errors == ()
    found: DomainReport = report.chores["verify_domains"]
    return found


async def verified(tenancy: Tenancy, server: NameServer) -> None:
    """Make acme.example the domain of acme."""
    await tenancy.tenants.create("acme")
    claimed = await tenancy.domains.claim("acme", "acme.example")
    server.texts[CHALLENGE] = [f'"{claimed.token}"']
    await tenancy.domains.verify("acme", "acme.example")


async def test_a_claim_that_is_not_verified_expires(tenancy: Tenancy, server: NameServer) -> None:
    """It can then be claimed again, with another token; housekeeping removes it. A verified domain has no such end."""
    await verified(tenancy, server)
    claimed = await tenancy.domains.claim("acme", "other.example")
    assert claimed.expires_at == claimed.created_at + timedelta(days=7)
    await pass_days(tenancy, 6.9)
    assert (await tenancy.run_housekeeping()).chores["expire_claims"] == ()
    assert (await tenancy.domains.claim("acme", "other.example")).token == claimed.token
    await pass_days(tenancy, 0.2)
    server.texts[claimed.challenge] = [f'"{claimed.token}"']
    with pytest.raises(DomainError, match="has expired: claim it again"):
        await tenancy.domains.verify("acme", "other.example")
    again = await tenancy.domains.claim("acme", "other.example")
    assert again.token != claimed.token and again.created_at > claimed.created_at
    await pass_days(tenancy, 7.1)
    assert (await tenancy.run_housekeeping()).chores["expire_claims"] == ("other.example",)
    assert [domain.domain for domain in await tenancy.domains.list("acme")] == ["acme.example"]
    [entry] = await tenancy.audit.events(tenant="acme", action="domain.expire")
    assert entry.before == {"domain": "other.example"}


async def test_a_domain_without_its_record_lapses_after_a_grace_time(tenancy: Tenancy, server: NameServer) -> None:
    """Warned of at first; until the end of the grace time it is the tenant's, and then anybody's to verify."""
    await verified(tenancy, server)
    seen: list[TenantEvent] = []
    tenancy.events.subscribe(TenantEvent, seen.append)
    assert await check(tenancy) == DomainReport(published=1)
    assert seen == []
    asked = len(server.asked)
    assert await check(tenancy, days=0.5) == DomainReport()
    assert len(server.asked) == asked

    token = server.texts.pop(CHALLENGE)
    assert await check(tenancy) == DomainReport(failing=("acme.example",))
    [warning] = seen
    assert isinstance(warning, DomainFailing) and warning.domain == "acme.example"
    assert await check(tenancy) == DomainReport(failing=("acme.example",))
    assert len(seen) == 1
    [shown] = await tenancy.domains.list("acme")
    assert shown.failing_since is not None and shown.verified_at is not None
    assert "acme.example" in (await tenancy.tenants.get("acme")).aliases

    # other texts are no token either
    server.texts[CHALLENGE] = ['"v=spf1 -all"']
    assert await check(tenancy, days=14) == DomainReport(lapsed=("acme.example",))
    assert isinstance(seen[-1], DomainLapsed)
    assert (await tenancy.tenants.get("acme")).aliases == frozenset()
    actions = [entry.action for entry in await tenancy.audit.events(tenant="acme", action="domain.")]
    assert actions == ["domain.lapse", "domain.fail", "domain.verify", "domain.claim"]
    await tenancy.tenants.create("globex")
    other = await tenancy.domains.claim("globex", "acme.example")
    # as a claim it can be verified again, for the time of a claim
    server.texts[CHALLENGE] = [*token, f'"{other.token}"']
    assert (await tenancy.domains.verify("acme", "acme.example")).failing_since is None
    with pytest.raises(DomainError, match="another tenant"):
        await tenancy.domains.verify("globex", "acme.example")


async def test_one_answer_is_never_enough(tenancy: Tenancy, server: NameServer) -> None:
    """Not after a month without housekeeping, nor where no name server answers; the record's return ends the grace."""
    await verified(tenancy, server)
    token = server.texts.pop(CHALLENGE)
    assert (await check(tenancy, days=60)).failing == ("acme.example",)
    # the attack: what cannot be looked up, counted as missing, would lapse here
    server.codes[CHALLENGE] = dns.rcode.SERVFAIL
    for _ in range(4):
        assert await check(tenancy, days=30) == DomainReport(unanswered=1)
    assert "acme.example" in (await tenancy.tenants.get("acme")).aliases
    del server.codes[CHALLENGE]
    assert (await check(tenancy)).failing == ("acme.example",)  # the second
    server.texts[CHALLENGE] = token
    assert await check(tenancy) == DomainReport(published=1)
    assert (await tenancy.audit.events(tenant="acme", action="domain."))[0].action == "domain.recover"
    del server.texts[CHALLENGE]
    assert (await check(tenancy, days=60)).failing == ("acme.example",)  # again the first


async def test_the_grace_time_stops_while_no_name_server_answers(tenancy: Tenancy, server: NameServer) -> None:
    """A customer whose name servers are away for weeks cannot publish the record in that time."""
    await verified(tenancy, server)
    del server.texts[CHALLENGE]
    for _ in range(2):
        assert (await check(tenancy)).failing == ("acme.example",)
    server.codes[CHALLENGE] = dns.rcode.SERVFAIL
    for _ in range(3):
        assert await check(tenancy, days=7) == DomainReport(unanswered=1)
    del server.codes[CHALLENGE]
    assert (await check(tenancy)).failing == ("acme.example",)
    assert (await check(tenancy, days=11)).failing == ("acme.example",)
    assert (await check(tenancy)).lapsed == ("acme.example",)


async def test_two_runs_look_each_domain_up_once(tenancy: Tenancy, server: NameServer) -> None:
    """Or two runs at once would count one answer twice."""
    await verified(tenancy, server)
    del server.texts[CHALLENGE]
    await pass_days(tenancy, 1.1)
    reports = await asyncio.gather(*(tenancy.run_housekeeping() for _ in range(3)))
    assert sorted(len(report.chores["verify_domains"].failing) for report in reports) == [0, 0, 1]
    async with tenancy.scope("acme"):
        with pytest.raises(CrossTenantError):
            await tenancy.run_housekeeping()
