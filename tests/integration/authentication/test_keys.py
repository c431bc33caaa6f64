"""Keys in the registry: issued, found, rotated, revoked and listed, each change with its audit entry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm.audit.actor import Actor
from tenancy_orm.authentication.keys import IssuedKey
from tenancy_orm.errors import (
    ApiKeyInactiveError,
    ApiKeyNotFoundError,
    ConfigurationError,
    ControlUnavailableError,
    InvalidCredentialError,
    TenantNotFoundError,
)
from tenancy_orm.events import KeyIssued, KeyRevoked
from tenancy_orm.tenant import Status
from tests.support.control import ControlPlane, control_plane
from tests.support.waiting import HANGS, until


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[ControlPlane]:
    """A control plane with a listening directory."""
    async with control_plane(control_url) as opened:
        yield opened


async def refused(plane: ControlPlane, key: str, source: str | None = None) -> str:
    """Present a key that must be refused, and return the reason that the caller never learns."""
    with pytest.raises(InvalidCredentialError) as caught:
        await plane.directory.authenticate(key, source=source)
    return caught.value.reason


async def waiting(plane: ControlPlane, count: int) -> bool:
    """Whether ``count`` sessions of this database wait for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    # a connection of its own: inside a transaction the view does not change
    async with plane.control.connect() as connection:
        return int(await connection.scalar(text(query))) == count


# --- issue ----------------------------------------------------------------------------------------------------------


async def test_an_issued_key_names_its_tenant(plane: ControlPlane) -> None:
    """With its scopes, networks and name."""
    tenant, _ = await plane.tenant("acme")
    issued = await plane.key("acme", name="ci", scopes=["notes:read", "notes:write"], networks=["10.0.0.0/8", "::1"])
    credential = await plane.directory.authenticate(issued.text, source="10.1.2.3")
    assert credential.tenant == tenant
    assert credential.tenant.slug == "acme"
    assert credential.id == issued.key_id
    assert credential.scopes == {"notes:read", "notes:write"}
    assert credential.networks == (ip_network("10.0.0.0/8"), ip_network("::1"))
    assert credential.name == "ci"


async def test_a_tenant_has_any_number_of_keys(plane: ControlPlane) -> None:
    """They are listed in order of issue, without their secrets."""
    tenant, first = await plane.tenant("acme")
    issued = [await plane.key(tenant, name=f"key {number}") for number in range(3)]
    listed = await plane.keys.list("acme")
    assert [key.name for key in listed] == ["default", "key 0", "key 1", "key 2"]
    assert {key.state for key in listed} == {"active"}
    for key in (first, *(key.text for key in issued)):
        assert (await plane.directory.authenticate(key)).tenant == tenant
        assert key not in repr(listed)


async def test_a_key_can_be_issued_with_another_configured_prefix(control_url: str) -> None:
    """Test keys can be told from live ones, by scanners and by the application."""
    async with control_plane(control_url, keys={"prefix": "acme_live", "prefixes": ("acme_test",)}) as plane:
        await plane.tenant("acme")
        issued = await plane.key("acme", prefix="acme_test")
        assert issued.text.startswith("acme_test_")
        assert (await plane.directory.authenticate(issued.text)).prefix == "acme_test"
        with pytest.raises(ConfigurationError, match="prefix"):
            await plane.key("acme", prefix="other")


async def test_a_key_made_for_another_prefix_is_another_key(control_url: str) -> None:
    """The prefix is part of what is digested: a test key does not become a live one by relabelling."""
    async with control_plane(control_url, keys={"prefix": "acme_live", "prefixes": ("acme_test",)}) as plane:
        await plane.tenant("acme")
        issued = await plane.key("acme", prefix="acme_test")
        from tenancy_orm.keys import format as key_format

        body = issued.text.replace("acme_test", "acme_live")[: -key_format.CHECKSUM_LENGTH]
        assert await refused(plane, body + key_format._checksum(body)) == "secret"


async def test_a_key_of_a_missing_tenant_is_not_issued(plane: ControlPlane) -> None:
    """Nor one for a purged tenant, although its tombstone exists."""
    with pytest.raises(TenantNotFoundError):
        await plane.key("nobody")
    tenant, _ = await plane.tenant("acme")
    await plane.registry.transition(tenant.id, Status.DELETED, action="tenant.delete")
    await plane.registry.begin_purge(tenant.id)
    await plane.registry.finish_purge(tenant.id)
    plane.directory.invalidate(tenant_id=tenant.id)
    with pytest.raises(TenantNotFoundError):
        await plane.key(tenant.id)


async def test_no_key_outlives_a_purge_that_the_directory_does_not_know_of(control_url: str) -> None:
    """The transaction that issues or rotates reads the tenant's row, whatever is cached."""
    async with control_plane(control_url, opened=False) as plane:
        tenant, _ = await plane.tenant("acme")
        issued = await plane.key(tenant)
        await plane.registry.transition(tenant.id, Status.DELETED, action="tenant.delete")
        await plane.registry.begin_purge(tenant.id)
        assert (await plane.directory.tenant(tenant)).status is Status.ACTIVE
        async with plane.control.transaction() as purging:
            # what the purge does, not yet committed
            for statement in (
                "SELECT 1 FROM tenancy.tenants WHERE id = :id FOR UPDATE",
                "DELETE FROM tenancy.api_keys WHERE tenant_id = :id",
                "UPDATE tenancy.tenants SET status = 'purged', sealed_password = NULL WHERE id = :id",
            ):
                await purging.execute(text(statement), {"id": tenant.id})
            attempts = [asyncio.create_task(plane.key(tenant)), asyncio.create_task(plane.keys.rotate(issued.key_id))]
            await until(lambda: waiting(plane, 2))
        outcomes = await asyncio.gather(*attempts, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [TenantNotFoundError, TenantNotFoundError]
        async with plane.control.connect() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM tenancy.api_keys")) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scopes": ["spaces are out"]}, "scope"),
        ({"scopes": "notes:read"}, "not one string"),
        ({"scopes": [f"s{number}" for number in range(101)]}, "at most 100"),
        ({"networks": ["10.0.0.1/8"]}, "CIDR"),
        ({"networks": "10.0.0.0/8"}, "not one string"),
        ({"networks": [f"10.0.0.{number}" for number in range(101)]}, "at most 100"),
        ({"name": "x" * 201}, "printable"),
        ({"name": "line\nbreak"}, "printable"),
        ({"expires_at": datetime.now(UTC) - timedelta(seconds=1)}, "past"),
        ({"expires_at": datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)}, "aware"),
    ],
)
async def test_a_malformed_argument_issues_nothing(plane: ControlPlane, options: dict[str, Any], message: str) -> None:
    """And writes nothing to the audit log."""
    await plane.tenant("acme")
    with pytest.raises(ConfigurationError, match=message):
        await plane.key("acme", **options)
    assert len(await plane.keys.list("acme")) == 1
    assert await plane.audit.events(action="key.issue") == []


async def test_issuing_is_audited_in_the_same_transaction(plane: ControlPlane) -> None:
    """Without anything of the secret."""
    tenant, _ = await plane.tenant("acme")
    operator = Actor("operator", "sam", request_id="r-1", source="192.0.2.1")
    issued = await plane.key("acme", name="ci", scopes=["a"], actor=operator)
    (entry,) = await plane.audit.events(action="key.issue")
    assert entry.tenant_id == tenant.id
    assert entry.slug == "acme"
    assert entry.actor == operator
    assert entry.after is not None
    assert entry.after["key_id"] == issued.key_id
    assert entry.after["name"] == "ci"
    assert issued.text[-20:] not in repr(entry.after)
    assert [event.key_id for event in plane.of(KeyIssued)] == [issued.key_id]  # type: ignore[attr-defined]


# --- expiry, networks -----------------------------------------------------------------------------------------------


async def test_an_expired_key_is_refused(plane: ControlPlane) -> None:
    """From its expiry on, by the database's clock, although it is cached."""
    await plane.tenant("acme")
    issued = await plane.key("acme", expires_at=datetime.now(UTC) + timedelta(seconds=0.5))
    await plane.directory.authenticate(issued.text)
    assert plane.directory.peek(issued.text) is not None
    await until(lambda: plane.directory.peek(issued.text) is None)
    assert await refused(plane, issued.text) == "expired"

    async def listed_as_expired() -> bool:
        return (await plane.keys.get(issued.key_id)).state == "expired"

    # a key that is remembered may end early by the time that its query took
    await until(listed_as_expired)


async def test_a_key_is_refused_from_outside_its_networks(plane: ControlPlane) -> None:
    """Also when the same key was just used from inside, and when the address is not known."""
    await plane.tenant("acme")
    issued = await plane.key("acme", networks=["192.0.2.0/24", "2001:db8::/32"])
    for inside in ("192.0.2.7", "2001:db8::1", "::ffff:192.0.2.9"):
        await plane.directory.authenticate(issued.text, source=inside)
        assert plane.directory.peek(issued.text, inside) is not None
    for outside in ("192.0.3.7", "2001:db9::1", "::ffff:10.0.0.1", "unix:", None):
        assert plane.directory.peek(issued.text, outside) is None
        assert await refused(plane, issued.text, outside) == "network"


# --- rotation -------------------------------------------------------------------------------------------------------


async def test_both_keys_work_during_the_overlap(plane: ControlPlane) -> None:
    """The new one has the old one's name, scopes and networks."""
    await plane.tenant("acme")
    old = await plane.key("acme", name="ci", scopes=["a"], networks=["127.0.0.0/8"])
    await plane.directory.authenticate(old.text, source="127.0.0.1")
    new = await plane.keys.rotate(old.key_id, overlap=timedelta(hours=1))
    for key in (old, new):
        assert (await plane.directory.authenticate(key.text, source="127.0.0.1")).tenant.slug == "acme"
    assert new.info.rotated_from == old.key_id
    assert (new.info.name, new.info.scopes, new.info.networks) == (old.info.name, old.info.scopes, old.info.networks)
    ending = (await plane.keys.get(old.key_id)).expires_at
    assert ending is not None
    assert timedelta(minutes=59) < ending - datetime.now(UTC) <= timedelta(hours=1)


async def test_the_old_key_ends_with_the_overlap(plane: ControlPlane) -> None:
    """An overlap of nothing ends it at once, though it is remembered."""
    await plane.tenant("acme")
    old = await plane.key("acme")
    await plane.directory.authenticate(old.text)
    new = await plane.keys.rotate(old.key_id, overlap=0)
    assert await refused(plane, old.text) == "expired"
    await plane.directory.authenticate(new.text)


async def test_rotation_never_lengthens_a_keys_life(plane: ControlPlane) -> None:
    """A key that was to expire within the overlap does; its successor lives as long as it was to."""
    await plane.tenant("acme")
    old = await plane.key("acme", expires_at=datetime.now(UTC) + timedelta(hours=1))
    new = await plane.keys.rotate(old.key_id, overlap=timedelta(days=1))
    assert (await plane.keys.get(old.key_id)).expires_at == old.info.expires_at
    assert new.info.expires_at is not None
    assert abs((new.info.expires_at - datetime.now(UTC)) - timedelta(hours=1)) < timedelta(seconds=10)


async def test_a_key_is_rotated_once(plane: ControlPlane) -> None:
    """Of two rotations at the same moment one is refused; so is rotating a revoked key."""
    await plane.tenant("acme")
    old = await plane.key("acme")
    async with plane.control.transaction() as connection:
        # neither can end before both have begun
        await connection.execute(text("LOCK TABLE tenancy.audit_head IN ACCESS EXCLUSIVE MODE"))
        rotations = [asyncio.create_task(plane.keys.rotate(old.key_id)) for _ in range(2)]
        await until(lambda: waiting(plane, 2))
    outcomes = await asyncio.gather(*rotations, return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ApiKeyInactiveError", "IssuedKey"]
    assert {outcome.state for outcome in outcomes if isinstance(outcome, ApiKeyInactiveError)} == {"rotated"}
    await plane.keys.revoke(old.key_id)
    with pytest.raises(ApiKeyInactiveError, match="revoked"):
        await plane.keys.rotate(old.key_id)
    with pytest.raises(ApiKeyNotFoundError):
        await plane.keys.rotate("0" * 16)
    with pytest.raises(ConfigurationError, match="overlap"):
        await plane.keys.rotate(old.key_id, overlap=-1)


async def test_a_key_without_an_expiry_is_replaced_by_one_without(plane: ControlPlane) -> None:
    """Also when the end of an earlier overlap is the only expiry it has: that is not what its life was meant to be."""
    await plane.tenant("acme")
    old = await plane.key("acme")
    first = await plane.keys.rotate(old.key_id, overlap=60)
    second = await plane.keys.rotate(first.key_id, overlap=60)
    for key in (first, second):
        await plane.keys.revoke(key.key_id)
    again = await plane.keys.rotate(old.key_id, overlap=60)
    assert (first.info.expires_at, second.info.expires_at, again.info.expires_at) == (None, None, None)


async def test_a_key_that_is_rotated_again_is_replaced_by_one_of_its_first_life(plane: ControlPlane) -> None:
    """Its own was cut short by the first rotation."""
    await plane.tenant("acme")
    old = await plane.key("acme", expires_at=datetime.now(UTC) + timedelta(days=90))
    await plane.keys.revoke((await plane.keys.rotate(old.key_id, overlap=60)).key_id)
    again = await plane.keys.rotate(old.key_id, overlap=60)
    assert again.info.expires_at is not None
    assert abs((again.info.expires_at - datetime.now(UTC)) - timedelta(days=90)) < timedelta(seconds=30)


@pytest.mark.parametrize("overlap", [float("inf"), float("nan"), 1e13, timedelta(days=999_999_999), -1.0])
async def test_an_overlap_out_of_bounds_rotates_nothing(plane: ControlPlane, overlap: float | timedelta) -> None:
    """It is reported as a mistake in the argument."""
    await plane.tenant("acme")
    old = await plane.key("acme")
    with pytest.raises(ConfigurationError, match="overlap"):
        await plane.keys.rotate(old.key_id, overlap=overlap)
    assert len(await plane.keys.list("acme")) == 2


async def test_what_cannot_be_an_id_is_no_key(plane: ControlPlane) -> None:
    """Also what PostgreSQL takes for no text at all; and a reason that it would not take is kept without that."""
    await plane.tenant("acme")
    for key_id in ("a\x00b", "\ud800" * 16, "", "0" * 17):
        for act in (plane.keys.get, plane.keys.rotate, plane.keys.revoke):
            with pytest.raises(ApiKeyNotFoundError):
                await act(key_id)
    issued = await plane.key("acme")
    assert (await plane.keys.revoke(issued.key_id, "a\x00b")).revoked_reason == "a\N{REPLACEMENT CHARACTER}b"


async def test_a_key_that_ends_is_forgotten_here_without_hearing_of_it(control_url: str) -> None:
    """The process that rotates or revokes does not wait for its own notification."""
    async with control_plane(control_url, opened=False) as plane:
        await plane.tenant("acme")
        rotated, revoked = await plane.key("acme"), await plane.key("acme")
        for issued in (rotated, revoked):
            await plane.directory.authenticate(issued.text)
        await plane.keys.rotate(rotated.key_id, overlap=0)
        await plane.keys.revoke(revoked.key_id)
        assert await refused(plane, rotated.text) == "expired"
        assert await refused(plane, revoked.text) == "revoked"


async def test_rotation_is_audited(plane: ControlPlane) -> None:
    """Both keys by their ids."""
    await plane.tenant("acme")
    old = await plane.key("acme")
    new = await plane.keys.rotate(old.key_id)
    (entry,) = await plane.audit.events(action="key.rotate")
    assert entry.before is not None
    assert entry.after is not None
    assert entry.before["key_id"] == old.key_id
    assert entry.after["key_id"] == new.key_id


# --- revocation -----------------------------------------------------------------------------------------------------


async def test_a_revoked_key_is_refused(plane: ControlPlane) -> None:
    """At once, with the reason kept for operators."""
    await plane.tenant("acme")
    issued = await plane.key("acme")
    await plane.directory.authenticate(issued.text)
    info = await plane.keys.revoke(issued.key_id, "leaked")
    assert info.state == "revoked"
    assert plane.directory.peek(issued.text) is None
    assert await refused(plane, issued.text) == "revoked"
    assert (await plane.keys.get(issued.key_id)).revoked_reason == "leaked"
    (entry,) = await plane.audit.events(action="key.revoke")
    assert entry.after is not None
    assert entry.after["revoked_reason"] == "leaked"
    assert len(plane.of(KeyRevoked)) == 1


async def test_revoking_twice_changes_nothing(plane: ControlPlane) -> None:
    """The first reason and time stay, and one entry is written."""
    await plane.tenant("acme")
    issued = await plane.key("acme")
    first = await plane.keys.revoke(issued.key_id, "leaked")
    assert await plane.keys.revoke(issued.key_id, "again") == first
    assert len(await plane.audit.events(action="key.revoke")) == 1
    with pytest.raises(ApiKeyNotFoundError):
        await plane.keys.revoke("0" * 16)


async def test_a_change_whose_audit_entry_fails_does_not_happen(plane: ControlPlane) -> None:
    """The entry and the change are one transaction."""
    await plane.tenant("acme")
    issued = await plane.key("acme")
    async with plane.control.transaction() as connection:
        await connection.execute(text("ALTER FUNCTION tenancy.audit_append RENAME TO audit_append_away"))
    with pytest.raises(Exception, match="audit_append"):
        await plane.keys.revoke(issued.key_id)
    assert (await plane.keys.get(issued.key_id)).state == "active"
    await plane.directory.authenticate(issued.text)


# --- tenants' statuses ----------------------------------------------------------------------------------------------


async def test_a_deleted_tenants_keys_are_refused_and_work_again_when_it_is_restored(plane: ControlPlane) -> None:
    """A suspended tenant's keys still name it: the answer to those is another one."""
    tenant, key = await plane.tenant("acme")
    await plane.directory.authenticate(key)
    await plane.registry.transition(tenant.id, Status.SUSPENDED, action="tenant.suspend")
    plane.directory.invalidate(tenant_id=tenant.id)
    assert (await plane.directory.authenticate(key)).tenant.status is Status.SUSPENDED
    await plane.registry.transition(tenant.id, Status.DELETED, action="tenant.delete")
    plane.directory.invalidate(tenant_id=tenant.id)
    assert await refused(plane, key) == "tenant deleted"
    await plane.registry.transition(tenant.id, None, action="tenant.restore")
    plane.directory.invalidate(tenant_id=tenant.id)
    assert (await plane.directory.authenticate(key)).tenant.status is Status.SUSPENDED


# --- last use -------------------------------------------------------------------------------------------------------


async def last_used(plane: ControlPlane, key_id: str) -> datetime | None:
    """What the registry says."""
    return (await plane.keys.get(key_id)).last_used_at


async def test_the_time_of_last_use_is_written_in_the_background(control_url: str) -> None:
    """Not with the request: once per interval, and at close."""
    async with control_plane(control_url, keys={"usage_interval": 0.05}) as plane:
        await plane.tenant("acme")
        issued = await plane.key("acme")
        await plane.directory.authenticate(issued.text)
        await until(lambda: last_used(plane, issued.key_id))
        used = await last_used(plane, issued.key_id)
        assert used is not None
        assert abs(used - datetime.now(UTC)) < timedelta(seconds=5)


async def test_the_time_of_last_use_is_written_at_close(control_url: str) -> None:
    """What was used last is not lost with the process."""
    async with control_plane(control_url) as plane:
        await plane.tenant("acme")
        issued = await plane.key("acme")
        await plane.directory.authenticate(issued.text)
        assert await last_used(plane, issued.key_id) is None
    async with control_plane(control_url, initialise=False) as plane:
        assert await last_used(plane, issued.key_id) is not None


async def test_a_use_that_could_not_be_written_is_kept(plane: ControlPlane) -> None:
    """The next flush writes it; a hit in between is not counted twice."""
    await plane.tenant("acme")
    issued = await plane.key("acme")
    await plane.directory.authenticate(issued.text)
    async with plane.control.transaction() as connection:
        await connection.execute(text("ALTER TABLE tenancy.api_keys RENAME COLUMN last_used_at TO elsewhere"))
    with pytest.raises(Exception, match="last_used_at"):
        await plane.directory.flush()
    async with plane.control.transaction() as connection:
        await connection.execute(text("ALTER TABLE tenancy.api_keys RENAME COLUMN elsewhere TO last_used_at"))
    plane.directory.peek(issued.text)
    assert len(plane.directory._journal._used) == 1
    await plane.directory.flush()
    assert await last_used(plane, issued.key_id) is not None


async def test_of_many_processes_one_writes_the_time_of_last_use(plane: ControlPlane, control_url: str) -> None:
    """A time that is as old as half an interval says as much."""
    await plane.tenant("acme")
    issued = await plane.key("acme")
    async with control_plane(control_url, initialise=False) as other:
        await plane.directory.authenticate(issued.text)
        await plane.directory.flush()
        written = await last_used(plane, issued.key_id)
        assert written is not None
        await other.directory.authenticate(issued.text)
        await other.directory.flush()
        assert await last_used(plane, issued.key_id) == written


async def test_the_keys_noted_as_used_are_bounded(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing can be written, and when what could not be is put back."""
    monkeypatch.setattr("tenancy_orm.authentication.journal._MAX_PENDING", 3)
    await plane.tenant("acme")
    issued = [await plane.key("acme") for _ in range(5)]
    for key in issued:
        await plane.directory.authenticate(key.text)
    journal = plane.directory._journal
    assert len(journal._used) == 3

    async def use_all_and_fail(*_: object) -> None:
        for key in issued:
            plane.directory.peek(key.text)
        raise ControlUnavailableError("away")

    monkeypatch.setattr(plane.directory._journal._control, "transaction", lambda: Failing(use_all_and_fail))
    with pytest.raises(ControlUnavailableError):
        await plane.directory.flush()
    assert len(journal._used) == 3
    assert all(key.use_queued for key in journal._used)


class Failing:
    """A transaction that does something, and cannot be begun."""

    def __init__(self, act: Callable[[], Awaitable[None]]) -> None:
        self._act = act

    async def __aenter__(self) -> None:
        await self._act()

    async def __aexit__(self, *_: object) -> None:
        raise AssertionError("it was not begun")


async def test_writing_last_uses_does_not_wait_for_a_locked_key(plane: ControlPlane) -> None:
    """It is passed over, so that processes that write the same keys cannot deadlock."""
    await plane.tenant("acme")
    locked, free = await plane.key("acme"), await plane.key("acme")
    for issued in (locked, free):
        await plane.directory.authenticate(issued.text)
    async with plane.control.transaction() as connection:
        await connection.execute(
            text("SELECT 1 FROM tenancy.api_keys WHERE id = :id FOR UPDATE"), {"id": locked.key_id}
        )
        async with asyncio.timeout(HANGS):
            await plane.directory.flush()
    assert await last_used(plane, free.key_id) is not None
    assert await last_used(plane, locked.key_id) is None


# --- peppers --------------------------------------------------------------------------------------------------------


async def version(plane: ControlPlane, key_id: str) -> tuple[str, bytes]:
    """The stored digest and its version."""
    async with plane.control.connect() as connection:
        query = text("SELECT digest_version, digest FROM tenancy.api_keys WHERE id = :id")
        row = (await connection.execute(query, {"id": key_id})).one()
        return row.digest_version, row.digest


async def test_peppers_can_be_introduced_and_rotated(control_url: str) -> None:
    """Old digests keep verifying, and are replaced under the newest pepper when the key is next used."""
    first, second = b"1" * 32, b"2" * 32
    async with control_plane(control_url) as plane:
        await plane.tenant("acme")
        issued = await plane.key("acme")
        assert (await version(plane, issued.key_id))[0] == "0"
    for peppers, expected in (({"a": first}, "a"), ({"a": first, "b": second}, "b")):
        async with control_plane(control_url, initialise=False, keys={"peppers": peppers}) as plane:
            before = await version(plane, issued.key_id)
            await plane.directory.authenticate(issued.text)
            await plane.directory.flush()
            after = await version(plane, issued.key_id)
            assert after[0] == expected
            assert after[1] != before[1]
            assert (await plane.directory.authenticate(issued.text)).tenant.slug == "acme"
    async with control_plane(control_url, initialise=False, keys={"peppers": {"b": second}}) as plane:
        # the first pepper can go
        assert (await plane.directory.authenticate(issued.text)).tenant.slug == "acme"


async def test_a_key_whose_pepper_is_missing_is_refused(control_url: str) -> None:
    """Also where its plain digest would match: a missing pepper never weakens the check."""
    async with control_plane(control_url, keys={"peppers": {"a": b"1" * 32}}) as plane:
        await plane.tenant("acme")
        issued = await plane.key("acme")
    async with control_plane(control_url, initialise=False) as plane:
        assert await refused(plane, issued.text) == "pepper"


@pytest.mark.parametrize(
    ("before", "newer"), [({"a": b"1" * 32}, {"a": b"1" * 32, "b": b"2" * 32}), (None, {"a": b"1" * 32})]
)
async def test_a_newer_pepper_is_accepted_everywhere_before_it_is_used(
    control_url: str, before: dict[str, bytes] | None, newer: dict[str, bytes]
) -> None:
    """So old and new processes can run side by side: nobody is refused, and no digest is taken back."""
    old_version, new_version = ["0", *newer][-2:]
    none: dict[str, Any] = {"initialise": False}
    versions: list[str] = []
    async with (
        control_plane(control_url, keys={"peppers": before}) as old,
        control_plane(control_url, **none, keys={"peppers": newer, "pepper_current": old_version}) as accepting,
    ):
        await old.tenant("acme")
        keys = [await plane.key("acme") for plane in (old, accepting)]
        await use(keys, versions, old, accepting)
        assert versions == [old_version]
        await old.directory.close()
        async with control_plane(control_url, **none, keys={"peppers": newer}) as using:
            keys.append(await using.key("acme"))
            for _ in range(3):
                await use(keys, versions, using, accepting)
                await use(keys, versions, accepting, using)
    assert versions == [old_version, new_version]


async def use(keys: list[IssuedKey], versions: list[str], *planes: ControlPlane) -> None:
    """Use every key in every process, and add the version that the first one's digest has after each if it changed."""
    for plane in planes:
        plane.directory.invalidate()
        for key in keys:
            assert (await plane.directory.authenticate(key.text)).tenant.slug == "acme"
        await plane.directory.flush()
        found, _ = await version(plane, keys[0].key_id)
        if versions[-1:] != [found]:
            versions.append(found)


async def test_without_that_processes_with_the_older_pepper_refuse_keys(control_url: str) -> None:
    """What the setting is for."""
    first, second = b"1" * 32, b"2" * 32
    async with (
        control_plane(control_url, keys={"peppers": {"a": first}}) as old,
        control_plane(control_url, initialise=False, keys={"peppers": {"a": first, "b": second}}) as new,
    ):
        await old.tenant("acme")
        issued = await new.key("acme")
        assert await refused(old, issued.text) == "pepper"


async def test_a_digest_that_another_process_replaced_meanwhile_is_left_alone(control_url: str) -> None:
    """What is to be replaced is the digest that was verified, not whatever is there now."""
    peppers = {"a": b"1" * 32, "b": b"2" * 32}
    async with control_plane(control_url, opened=False) as plane:
        await plane.tenant("acme")
        issued = await plane.key("acme")
    async with control_plane(control_url, initialise=False, opened=False, keys={"peppers": peppers}) as plane:
        await plane.directory.authenticate(issued.text)
        async with plane.control.transaction() as connection:
            query = "UPDATE tenancy.api_keys SET digest_version = 'a', digest = :digest WHERE id = :id"
            await connection.execute(text(query), {"id": issued.key_id, "digest": b"x" * 32})
        await plane.directory.flush()
        assert await version(plane, issued.key_id) == ("a", b"x" * 32)


async def test_a_digest_that_could_not_be_written_is_kept(control_url: str) -> None:
    """The next flush writes it; nobody has to present the key again."""
    async with control_plane(control_url, opened=False) as plane:
        await plane.tenant("acme")
        issued = await plane.key("acme")
    async with control_plane(control_url, initialise=False, opened=False, keys={"peppers": {"a": b"1" * 32}}) as plane:
        await plane.directory.authenticate(issued.text)
        async with plane.control.transaction() as connection:
            await connection.execute(text("ALTER TABLE tenancy.api_keys RENAME COLUMN digest_version TO elsewhere"))
        with pytest.raises(Exception, match="digest_version"):
            await plane.directory.flush()
        async with plane.control.transaction() as connection:
            await connection.execute(text("ALTER TABLE tenancy.api_keys RENAME COLUMN elsewhere TO digest_version"))
        await plane.directory.flush()
        assert (await version(plane, issued.key_id))[0] == "a"


async def test_refusals_that_could_not_be_written_are_kept(plane: ControlPlane) -> None:
    """Refused keys and cross-tenant requests alike: the next flush writes them, with those of the meantime."""
    _, key = await plane.tenant("acme")
    credential = await plane.directory.authenticate(key)
    await refused(plane, "not a key", "192.0.2.1")
    plane.directory.report_cross_tenant(credential, "globex", "header", "192.0.2.1")
    rename = "ALTER FUNCTION tenancy.{} RENAME TO {}"
    async with plane.control.transaction() as connection:
        await connection.execute(text(rename.format("audit_append", "away")))
    with pytest.raises(Exception, match="audit_append"):
        await plane.directory.flush()
    async with plane.control.transaction() as connection:
        await connection.execute(text(rename.format("away", "audit_append")))
    await refused(plane, "not a key", "192.0.2.1")
    await plane.directory.flush()
    (rejected,) = await plane.audit.events(action="credential.reject")
    (crossed,) = await plane.audit.events(action="request.cross_tenant")
    assert rejected.detail == {"reason": "malformed", "count": 2}
    assert crossed.detail == {"named": "globex", "resolver": "header", "count": 1}


async def test_refusals_are_told_apart_in_the_audit_log(plane: ControlPlane) -> None:
    """By reason, source and key id, counted, and attributed to the tenant where the secret was right."""
    tenant, key = await plane.tenant("acme")
    issued = await plane.key("acme")
    await plane.keys.revoke(issued.key_id)
    for _ in range(3):
        await refused(plane, issued.text, "192.0.2.1")
    await refused(plane, "not a key", "192.0.2.2")
    await plane.directory.flush()
    entries = {
        str(entry.detail and entry.detail["reason"]): entry
        for entry in await plane.audit.events(action="credential.reject")
    }
    assert set(entries) == {"revoked", "malformed"}
    assert entries["revoked"].detail == {"reason": "revoked", "count": 3}
    assert entries["revoked"].tenant_id == tenant.id
    assert entries["revoked"].actor == Actor("key", issued.key_id, source="192.0.2.1")
    assert entries["malformed"].actor == Actor("key", None, source="192.0.2.2")
    assert key not in repr([entry.detail for entry in entries.values()])
