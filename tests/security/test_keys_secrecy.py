"""Keys are guessed by nobody, read from nowhere, and refused without a hint why."""

from __future__ import annotations

import asyncio
import hmac
import logging
import traceback
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm.audit.actor import Actor
from tenancy_orm.authentication import lockout
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.errors import InvalidCredentialError, TooManyAttemptsError
from tenancy_orm.events import CredentialLockedOut, CrossTenantRequest, DirectoryMissed, IntrusionSuspected
from tenancy_orm.keys import format as key_format
from tenancy_orm.keys.format import generate_key
from tests.support.control import Clock, ControlPlane, control_plane
from tests.support.waiting import until


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[ControlPlane]:
    """A control plane with a pepper."""
    async with control_plane(control_url, keys={"peppers": {"1": b"p" * 32}}) as opened:
        yield opened


def with_secret(key: str, secret_of: str) -> str:
    """A well-formed key with the id of ``key`` and the secret of another."""
    body = key.rsplit("_", 1)[0] + "_" + secret_of.rsplit("_", 1)[1][:43]
    return body + key_format._checksum(body)


def looked_up(plane: ControlPlane) -> int:
    """How many keys were asked of the control database."""
    return sum(event.keys for event in plane.seen if isinstance(event, DirectoryMissed))


async def refusal(plane: ControlPlane, key: str, source: str | None = None) -> InvalidCredentialError:
    """Present a key that must be refused."""
    with pytest.raises(InvalidCredentialError) as caught:
        await plane.directory.authenticate(key, source=source)
    return caught.value


# --- one answer -----------------------------------------------------------------------------------------------------


async def test_an_unknown_id_and_a_wrong_secret_take_the_same_path(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query, one digest, one comparison in constant time, one message."""
    _, key = await plane.tenant("acme")
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def spy(left: Any, right: Any) -> bool:
        compared.append((len(left), len(right)))
        return compare(left, right)

    monkeypatch.setattr("tenancy_orm.keys.format.hmac.compare_digest", spy)
    outcomes = []
    for presented in (generate_key("ten_live").text, with_secret(key, generate_key("ten_live").text)):
        queries = len(plane.of(DirectoryMissed))
        error = await refusal(plane, presented)
        outcomes.append((str(error), len(plane.of(DirectoryMissed)) - queries, tuple(compared)))
        compared.clear()
    assert outcomes[0] == outcomes[1] == ("the credential is not valid", 1, ((32, 32),))


async def test_a_digest_does_not_fit_another_row(plane: ControlPlane) -> None:
    """Whoever can write to the registry cannot give one tenant's key to another by moving its digest."""
    _, key = await plane.tenant("acme")
    _, other = await plane.tenant("globex")
    await plane.directory.authenticate(key)
    ids = [key_format.parse_key(one, "ten_live").key_id for one in (key, other)]
    async with plane.control.transaction() as connection:
        query = text("SELECT digest FROM tenancy.api_keys WHERE id = :id")
        digests = [await connection.scalar(query, {"id": key_id}) for key_id in ids]
        for key_id, digest in zip(ids, reversed(digests), strict=True):
            statement = text("UPDATE tenancy.api_keys SET digest = :digest WHERE id = :id")
            await connection.execute(statement, {"digest": digest, "id": key_id})
    plane.directory.invalidate()
    for presented in (key, other, with_secret(other, key), with_secret(key, other)):
        assert (await refusal(plane, presented)).reason == "secret"


async def test_a_copy_of_the_registry_does_not_verify_a_key(control_url: str) -> None:
    """Without a pepper a stolen digest tells whether a guess is right; with one it does not."""
    for peppers, tells in ((None, True), ({"1": b"p" * 32}, False)):
        async with control_plane(control_url, keys={"peppers": peppers}) as plane:
            tenant, _ = await plane.tenant(f"acme-{tells}".lower())
            issued = await plane.key(tenant)
            async with plane.control.connect() as connection:
                query = text("SELECT digest FROM tenancy.api_keys WHERE id = :id")
                digest = await connection.scalar(query, {"id": issued.key_id})
            assert key_format.KeyDigester().matches(issued.text, digest, "0") is tells


# --- nowhere in the clear -------------------------------------------------------------------------------------------


async def dump(plane: ControlPlane) -> str:
    """Every row of every table of the registry, as text."""
    query = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'tenancy'"
    rows: list[str] = []
    async with plane.control.connect() as connection:
        for table in (await connection.scalars(text(query))).all():
            rows.extend(await connection.scalars(text(f'SELECT t::text FROM tenancy."{table}" t')))
    return "\n".join(rows)


async def test_no_issued_secret_is_anywhere_but_in_the_answer(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in the registry, the audit log, DEBUG logs, events, reprs or tracebacks."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, logger="sqlalchemy.engine")
    tenant, key = await plane.tenant("acme")
    issued = await plane.key(tenant, scopes=["a"])
    rotated = await plane.keys.rotate(issued.key_id)
    shown = []
    for presented in (key, issued.text, rotated.text):
        credential = await plane.directory.authenticate(presented, source="192.0.2.1")
        shown += [repr(credential), str(credential)]
    await plane.keys.revoke(rotated.key_id)
    for presented in (rotated.text, rotated.text[:-1] + "!", with_secret(rotated.text, key)):
        error = await refusal(plane, presented, "192.0.2.1")
        shown += ["".join(traceback.format_exception(error)), repr(error.__dict__)]
    await plane.directory.flush()
    shown += [repr(issued), str(issued), f"{issued}", repr(plane.seen), repr(plane.directory), repr(plane.config)]
    shown += [repr(vars(plane.directory)), repr(await plane.keys.list(tenant)), await dump(plane), caplog.text]
    # the search finds what is there
    assert issued.key_id in shown[-2]
    assert "UPDATE tenancy.api_keys" in caplog.text
    for presented in (key, issued.text, rotated.text):
        secret = presented.rsplit("_", 1)[1][:43]
        assert [text_ for text_ in shown if secret in text_] == []


# --- lock-out -------------------------------------------------------------------------------------------------------


async def attempts(plane: ControlPlane, count: int, source: str | None) -> list[type[Exception]]:
    """Present ``count`` unknown keys, and return how each was refused."""
    outcomes: list[type[Exception]] = []
    for _ in range(count):
        try:
            await plane.directory.authenticate(generate_key("ten_live").text, source=source)
        except (InvalidCredentialError, TooManyAttemptsError) as error:
            outcomes.append(type(error))
    return outcomes


async def test_a_source_that_keeps_failing_is_slowed_down(control_url: str) -> None:
    """Its further attempts reach no database; with lock-out off, every one of them does."""
    async with control_plane(control_url, lockout={"failures": 0}) as plane:
        assert await attempts(plane, 30, "192.0.2.1") == [InvalidCredentialError] * 30
        assert len(plane.of(DirectoryMissed)) == 30
    async with control_plane(control_url, lockout={"failures": 5}) as plane:
        assert await attempts(plane, 30, "192.0.2.1") == [InvalidCredentialError] * 5 + [TooManyAttemptsError] * 25
        assert len(plane.of(DirectoryMissed)) == 5
        (event,) = plane.of(CredentialLockedOut)
        assert isinstance(event, CredentialLockedOut)
        assert (event.source, event.credential_id, event.failures) == ("192.0.2.1", None, 5)


async def test_a_token_of_another_system_is_no_guess(control_url: str) -> None:
    """It is refused, but locks nobody out; a text that begins as a key does counts, whatever follows."""
    async with control_plane(control_url, lockout={"failures": 5}) as plane:
        _, key = await plane.tenant("acme")
        for token in ("eyJhbGciOiJSUzI1NiJ9.e30.c2ln", "", "ten_lives_x", "x" * 5_000) * 10:
            with pytest.raises(InvalidCredentialError):
                await plane.directory.authenticate(token, source="192.0.2.1")
        assert plane.of(CredentialLockedOut) == plane.of(DirectoryMissed) == []
        assert (await plane.directory.authenticate(key, source="192.0.2.1")).tenant.slug == "acme"
        outcomes = []
        for _ in range(6):
            with pytest.raises((InvalidCredentialError, TooManyAttemptsError)) as caught:
                await plane.directory.authenticate("ten_live_nonsense", source="192.0.2.2")
            outcomes.append(caught.type)
        assert outcomes == [InvalidCredentialError] * 5 + [TooManyAttemptsError]


async def test_a_lock_out_of_a_source_spares_others_and_keys_in_use(control_url: str) -> None:
    """Everybody behind one proxy has its address: one of them must not shut the others out."""
    async with control_plane(control_url, lockout={"failures": 5}) as plane:
        tenant, key = await plane.tenant("acme")
        new = await plane.key(tenant)
        await plane.directory.authenticate(key, source="192.0.2.1")
        await attempts(plane, 30, "192.0.2.1")
        assert plane.directory.peek(key, "192.0.2.1") is not None
        plane.directory.revalidate()
        assert (await plane.directory.authenticate(key, source="192.0.2.1")).tenant == tenant
        with pytest.raises(TooManyAttemptsError) as caught:
            await plane.directory.authenticate(new.text, source="192.0.2.1")
        assert 0 < caught.value.retry_after <= 60
        assert (await plane.directory.authenticate(new.text, source="192.0.2.2")).tenant == tenant


async def test_a_lock_out_of_a_source_spares_keys_in_use_that_are_to_be_looked_up_again(control_url: str) -> None:
    """A change of the tenant or of the key makes it be looked up, and not be locked out; until it works no more."""
    async with control_plane(control_url, opened=False, lockout={"failures": 5}) as plane:
        tenant, key = await plane.tenant("acme")
        new = await plane.key(tenant)
        credential = await plane.directory.authenticate(key, source="192.0.2.1")
        await attempts(plane, 30, "192.0.2.1")
        changes: list[dict[str, Any]] = [{"tenant_id": tenant.id}, {"key_id": credential.id}, {}]
        for change in changes:
            plane.directory.invalidate(**change)
            assert (await plane.directory.authenticate(key, source="192.0.2.1")).tenant == tenant
            with pytest.raises(TooManyAttemptsError):
                await plane.directory.authenticate(new.text, source="192.0.2.1")
        await plane.keys.revoke(credential.id)
        assert (await refusal(plane, key, "192.0.2.1")).reason == "revoked"
        plane.directory.invalidate()
        with pytest.raises(TooManyAttemptsError):
            await plane.directory.authenticate(key, source="192.0.2.1")


async def test_the_memory_of_keys_that_a_lock_out_spares_is_bounded(control_url: str) -> None:
    """And a key with a secret that is wrong by now is not in it."""
    async with control_plane(control_url, opened=False, directory={"size": 3}) as plane:
        tenant, _ = await plane.tenant("acme")
        issued = [await plane.key(tenant) for _ in range(5)]
        for one in issued:
            await plane.directory.authenticate(one.text)
        assert len(plane.directory._cache.proven) == 3
        async with plane.control.transaction() as connection:
            await connection.execute(text("UPDATE tenancy.api_keys SET digest = sha256(digest)"))
        plane.directory.invalidate()
        for one in issued:
            assert (await refusal(plane, one.text)).reason == "secret"
        assert len(plane.directory._cache.proven) == 0


async def test_guesses_made_at_once_are_no_more_than_guesses_made_in_turn(control_url: str) -> None:
    """Or a source would have as many look-ups as it can open connections, and again whenever a pause ends."""
    clock = Clock()
    async with control_plane(control_url, opened=False, clock=clock, lockout={"failures": 5}) as plane:

        async def at_once(count: int) -> tuple[int, int]:
            """How many were refused after a look-up, and how many look-ups there were."""
            before = looked_up(plane)
            outcomes = await asyncio.gather(*(attempts(plane, 1, "192.0.2.9") for _ in range(count)))
            return outcomes.count([InvalidCredentialError]), looked_up(plane) - before

        assert await at_once(300) == (5, 5)
        for pause in (1, 2, 4):
            assert await at_once(50) == (0, 0)
            clock.now += pause
            assert await at_once(50) == (1, 1)


async def test_good_keys_at_once_from_one_source_all_work(control_url: str) -> None:
    """A process starts behind a proxy, and sees only the proxy's address."""
    async with control_plane(control_url, opened=False, lockout={"failures": 5}) as plane:
        tenant, _ = await plane.tenant("acme")
        issued = [await plane.key(tenant) for _ in range(40)]
        presented = [key.text for key in issued for _ in range(5)]
        found = await asyncio.gather(*(plane.directory.authenticate(key, source="192.0.2.1") for key in presented))
        assert {credential.id for credential in found} == {key.key_id for key in issued}
        assert len(plane.directory._lockout.attempts) == 0


async def test_malformed_keys_count_as_failures_of_their_source(control_url: str) -> None:
    """If they begin as keys do: they cost no look-up, and show a guesser all the same."""
    async with control_plane(control_url, lockout={"failures": 5}) as plane:
        for _ in range(5):
            assert (await refusal(plane, "ten_live_nonsense", "192.0.2.1")).reason == "malformed"
        assert await attempts(plane, 1, "192.0.2.1") == [TooManyAttemptsError]


async def test_a_wrong_secret_is_looked_up_once(plane: ControlPlane) -> None:
    """As an unknown id is: repeating it reaches no database."""
    _, key = await plane.tenant("acme")
    wrong = with_secret(key, generate_key("ten_live").text)
    for _ in range(3):
        assert (await refusal(plane, wrong)).reason == "secret"
    assert looked_up(plane) == 1


async def test_a_whole_ipv6_site_is_one_source(control_url: str) -> None:
    """A new address for every attempt does not help."""
    async with control_plane(control_url, lockout={"failures": 5}) as plane:
        outcomes = []
        for number in range(10):
            outcomes += await attempts(plane, 1, f"2001:db8:0:1::{number:x}")
        assert outcomes == [InvalidCredentialError] * 5 + [TooManyAttemptsError] * 5
        assert await attempts(plane, 1, "2001:db8:0:2::1") == [InvalidCredentialError]


async def test_guesses_at_one_key_id_are_answered_slowly_and_its_owner_at_once(
    control_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From however many sources they come; the id is public, so a lock must not be a way to shut its owner out."""
    pauses: list[float] = []
    over = asyncio.Event()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await over.wait()

    monkeypatch.setattr(lockout, "asyncio", SimpleNamespace(sleep=pause))
    async with control_plane(control_url, lockout={"failures": 3}) as plane:
        _, key = await plane.tenant("acme")

        async def guess(number: int) -> None:
            await refusal(plane, with_secret(key, generate_key("ten_live").text), f"192.0.2.{number}")

        for number in range(2):
            await guess(number)
        assert pauses == []
        third = asyncio.create_task(guess(2))
        await until(lambda: len(pauses) == 1)
        (event,) = plane.of(CredentialLockedOut)
        assert isinstance(event, CredentialLockedOut)
        assert event.credential_id == key_format.parse_key(key, "ten_live").key_id
        guesses = [third, *(asyncio.create_task(guess(number)) for number in range(3, 60))]
        await until(lambda: len(pauses) == len(guesses))
        await plane.directory.authenticate(key, source="192.0.2.200")
        assert not any(task.done() for task in guesses)
        assert set(pauses) == {1.0}
        over.set()
        await asyncio.gather(*guesses)


async def test_the_refusals_held_back_are_bounded(control_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond, the answer comes at once: waiting requests are memory as well."""
    monkeypatch.setattr("tenancy_orm.authentication.lockout._MAX_DELAYED", 2)
    async with control_plane(control_url, lockout={"failures": 1}) as plane:
        _, key = await plane.tenant("acme")
        guess = with_secret(key, generate_key("ten_live").text)
        guesses = [asyncio.create_task(refusal(plane, guess)) for _ in range(5)]
        await until(lambda: sum(task.done() for task in guesses) >= 3)
        assert sum(task.done() for task in guesses) == 3
        assert plane.directory._lockout._delayed == 2
        await asyncio.gather(*guesses)
        assert plane.directory._lockout._delayed == 0


# --- one key that names others --------------------------------------------------------------------------------------


async def test_a_key_that_names_several_other_tenants_is_suspected(plane: ControlPlane) -> None:
    """One other may be a mistake, however often; several are a search. It is recorded either way."""
    tenant, key = await plane.tenant("acme")
    credential = await plane.directory.authenticate(key)
    for _ in range(10):
        plane.directory.report_cross_tenant(credential, "globex", "header", "192.0.2.1")
    assert len(plane.of(CrossTenantRequest)) == 10
    assert plane.of(IntrusionSuspected) == []
    for named in ("initech", "umbrella"):
        plane.directory.report_cross_tenant(credential, named, "header", "192.0.2.1")
    (event,) = plane.of(IntrusionSuspected)
    assert isinstance(event, IntrusionSuspected)
    assert event.named == ("globex", "initech", "umbrella")
    assert (event.slug, event.credential_id, event.source) == ("acme", credential.id, "192.0.2.1")
    await plane.directory.flush()
    entries = await plane.audit.events(action="request.cross_tenant", tenant=tenant)
    assert sorted(str(entry.detail and entry.detail["named"]) for entry in entries) == ["globex", "initech", "umbrella"]
    assert max(int(entry.detail["count"]) for entry in entries if entry.detail) == 10


async def test_one_key_raises_few_intrusion_events_however_many_it_names(plane: ControlPlane) -> None:
    """At three others, and at each doubling: a pager must not be flooded with one valid key."""
    _, key = await plane.tenant("acme")
    credential = await plane.directory.authenticate(key)
    for number in range(500):
        for _ in range(2):
            plane.directory.report_cross_tenant(credential, f"t{number}", "header")
    events = plane.of(IntrusionSuspected)
    assert [len(event.named) for event in events if isinstance(event, IntrusionSuspected)] == [3, 6, 12, 24, 48, 96]
    assert len(plane.directory._intrusions._named["key", credential.id]) == 100


async def test_names_of_more_than_an_hour_ago_are_no_suspicion(control_url: str) -> None:
    """One mistake a day is none."""
    clock = Clock()
    async with control_plane(control_url, opened=False, clock=clock) as plane:
        _, key = await plane.tenant("acme")
        credential = await plane.directory.authenticate(key)
        for named in ("globex", "initech", "umbrella", "hooli"):
            plane.directory.report_cross_tenant(credential, named, "header")
            clock.now += 1_801.0
        assert plane.of(IntrusionSuspected) == []
        plane.directory.report_cross_tenant(credential, "acme-2", "header")
        plane.directory.report_cross_tenant(credential, "acme-3", "header")
        (event,) = plane.of(IntrusionSuspected)
        assert isinstance(event, IntrusionSuspected)
        assert event.named == ("hooli", "acme-2", "acme-3")


async def test_the_keys_that_named_others_are_remembered_in_bounded_memory(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with the oldest last request are dropped."""
    monkeypatch.setattr("tenancy_orm.authentication.intrusions._MAX_CREDENTIALS", 3)
    tenant, _ = await plane.tenant("acme")
    for number in range(5):
        plane.directory.report_cross_tenant(Credential("key", str(number), bound=tenant), "globex", "header")
    assert list(plane.directory._intrusions._named) == [("key", "2"), ("key", "3"), ("key", "4")]


async def test_noise_does_not_keep_a_cross_tenant_request_out_of_the_audit_log(control_url: str) -> None:
    """Neither keys that are not valid nor another key's requests: it is recorded with its tenant and its key."""
    async with control_plane(control_url, opened=False, lockout={"failures": 0}) as plane:
        acme, key = await plane.tenant("acme")
        globex, other = await plane.tenant("globex")
        quiet, noisy = [await plane.directory.authenticate(one) for one in (key, other)]
        await attempts(plane, 1_100, "198.51.100.7")
        for number in range(1_100):
            for _ in range(2):
                plane.directory.report_cross_tenant(noisy, f"t{number}", "header", "198.51.100.7")
        plane.directory.report_cross_tenant(quiet, "globex", "header", "192.0.2.66")
        await plane.directory.flush()
        (entry,) = await plane.audit.events(action="request.cross_tenant", tenant=acme)
        assert entry.actor == Actor("key", quiet.id)
        assert entry.detail is not None
        assert entry.detail["count"] == 1
        told = await plane.audit.events(action="request.cross_tenant", tenant=globex)
        assert len(told) == 21
        assert sum(int(one.detail["count"]) for one in told if one.detail) == 2_200


async def test_a_flood_of_refusals_writes_little_to_the_audit_log(plane: ControlPlane) -> None:
    """The most frequent ones by name, the rest as a number: the log cannot be flooded through the front door."""
    for number in range(3_000):
        await refusal(plane, "malformed", f"10.0.{number // 256}.{number % 256}")
    await plane.directory.flush()
    entries = await plane.audit.events(action="credential.reject", limit=1_000)
    assert len(entries) <= 21
    assert sum(int(entry.detail["count"]) for entry in entries if entry.detail) == 3_000
