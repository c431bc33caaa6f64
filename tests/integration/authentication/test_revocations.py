"""Revocations: log out everywhere, or one token; for all tenants, in every process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

from tenancy_orm import Tenancy
from tenancy_orm.audit.actor import Actor
from tenancy_orm.authentication.admission import Admission, AdmissionEnd
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.authentication.revocations import Revocation
from tenancy_orm.context import bind
from tenancy_orm.control.notifications import Change, Listener
from tenancy_orm.errors import ConfigurationError, CrossTenantError, InvalidCredentialError, InvalidSubjectError
from tenancy_orm.events import CredentialRevoked, EventBus
from tests.support.control import ControlPlane, control_plane
from tests.support.waiting import until

ADA = Actor("operator", "ada")


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[ControlPlane]:
    async with control_plane(control_url, opened=False) as opened:
        yield opened


def soon(**delta: float) -> datetime:
    return datetime.now(UTC) + timedelta(**delta)


async def test_a_subject_and_a_token_are_revoked_and_restored(plane: ControlPlane) -> None:
    """With a reason, an entry and an event each; taking back what is not there says so."""
    end = soon(hours=1)
    subject = await plane.revocations.add(subject="alice", reason="laptop\x00 lost", actor=ADA)
    token = await plane.revocations.add(token_id="t-1", expires_at=end, actor=ADA)
    assert (subject.kind, subject.value, subject.expires_at) == ("subject", "alice", None)
    assert subject.reason == "laptop\N{REPLACEMENT CHARACTER} lost"
    assert abs(subject.revoked_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert token == Revocation("token", "t-1", token.revoked_at, end)
    assert await plane.revocations.list() == [token, subject]
    assert await plane.revocations.list(limit=1) == [token]
    assert await plane.revocations.remove(subject="t-1") is False
    assert await plane.revocations.remove(token_id="t-1", actor=ADA) is True
    assert await plane.revocations.remove(token_id="t-1") is False
    assert await plane.revocations.list() == [subject]
    entries = list(reversed(await plane.audit.events(action=["credential.revoke", "credential.restore"])))
    assert [entry.action for entry in entries] == ["credential.revoke", "credential.revoke", "credential.restore"]
    assert {(entry.actor, entry.tenant_id) for entry in entries} == {(ADA, None)}
    assert entries[0].after is not None and entries[0].after["subject"] == "alice"
    assert entries[2].before is not None and entries[2].before["token"] == "t-1"
    assert plane.of(CredentialRevoked) == [
        CredentialRevoked(subject="alice"),
        CredentialRevoked(credential_id="t-1"),
    ]


async def test_revoking_again_moves_the_time_and_shortens_nothing(plane: ControlPlane) -> None:
    """Whoever logs out everywhere a second time has logged in between."""
    first = await plane.revocations.add(subject="alice", expires_at=soon(days=2))
    second = await plane.revocations.add(subject="alice", expires_at=soon(hours=1), reason="again")
    assert second.revoked_at > first.revoked_at
    assert (second.expires_at, second.reason) == (first.expires_at, "again")
    later = soon(days=9)
    assert (await plane.revocations.add(subject="alice", expires_at=later)).expires_at == later
    assert (await plane.revocations.add(subject="alice")).expires_at is None
    assert (await plane.revocations.add(subject="alice", expires_at=later)).expires_at is None
    assert len(await plane.revocations.list()) == 1
    await asyncio.gather(*(plane.revocations.add(subject="bob") for _ in range(8)))
    assert len(await plane.revocations.list()) == 2


async def test_a_malformed_revocation_is_refused(plane: ControlPlane) -> None:
    """One of the two names, printable, and a time to come."""
    mistakes: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, ConfigurationError, "give either subject or token_id"),
        ({"subject": "alice", "token_id": "t"}, ConfigurationError, "give either subject or token_id"),
        ({"subject": ""}, InvalidSubjectError, "a subject must be 1 to 255"),
        *(({"token_id": bad}, InvalidSubjectError, "a token_id must be 1 to 255") for bad in ("a\x00", "t" * 256)),
        ({"subject": "a", "expires_at": soon(days=9).replace(tzinfo=None)}, ConfigurationError, "aware datetime"),
        ({"subject": "a", "expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, ConfigurationError, "in the past"),
    ]
    for arguments, error, message in mistakes:
        with pytest.raises(error, match=message):
            await plane.revocations.add(**arguments)
    assert await plane.revocations.list() == []


async def test_a_bound_tenant_revokes_nothing(plane: ControlPlane) -> None:
    """A revocation reaches every tenant; a removal would undo another one's."""
    acme, _ = await plane.tenant("acme")
    await plane.revocations.add(subject="alice")
    with bind(acme):
        for call in (
            plane.revocations.add(subject="bob"),
            plane.revocations.remove(subject="alice"),
            plane.revocations.list(),
            plane.revocations.prune(),
        ):
            with pytest.raises(CrossTenantError):
                await call
    assert [each.value for each in await plane.revocations.list()] == ["alice"]


async def test_every_process_learns_of_it(plane: ControlPlane) -> None:
    """By the subject or the token; what is pruned has ended everywhere by itself, and nobody needs to learn of it."""
    received: list[Change] = []
    listener = Listener(plane.control.dsn, on_change=received.append, on_connected=lambda: None, events=EventBus())
    await listener.open()
    try:
        await plane.revocations.add(token_id="short", expires_at=soon(hours=1))
        async with plane.control.transaction() as connection:
            await connection.exec_driver_sql("ALTER TABLE tenancy.revocations DISABLE TRIGGER revocations_notify")
            await connection.exec_driver_sql("UPDATE tenancy.revocations SET expires_at = now() - interval '1 hour'")
            await connection.exec_driver_sql("ALTER TABLE tenancy.revocations ENABLE TRIGGER revocations_notify")
        assert await plane.revocations.list() == []
        assert (await plane.revocations.prune(), await plane.revocations.prune()) == (1, 0)
        await plane.revocations.add(subject="alice")
        await plane.revocations.remove(subject="alice")
        await until(lambda: len(received) == 3)
        alice = Change(None, None, "revocation", subject="alice")
        assert received == [Change(None, None, "revocation", token_id="short"), alice, alice]
    finally:
        await listener.close()


async def test_a_revocation_takes_effect_here_without_hearing_of_it(plane: ControlPlane) -> None:
    """Of what was issued before, and of what does not say when; of a token, the one. Taking it back is the reverse."""
    subjects = plane.directory.subjects
    before = Credential("token", "alice", id="t-1", issued_at=soon(hours=-1))
    undated = Credential("session", "alice", id="s-1")
    later = Credential("token", "alice", id="t-2", issued_at=soon(hours=1))

    async def refused(*credentials: Credential) -> bool:
        outcomes = []
        for credential in credentials:
            try:
                await subjects.allowed(credential)
            except InvalidCredentialError as error:
                outcomes.append(error.reason)
        assert outcomes in ([], ["revoked"] * len(credentials)), outcomes
        return bool(outcomes)

    assert not await refused(before, undated, later)
    await plane.revocations.add(subject="alice")
    assert await refused(before, undated) and not await refused(later)
    await plane.revocations.remove(subject="alice")
    await plane.revocations.add(token_id="t-1")
    assert await refused(before) and not await refused(undated, later)
    await plane.revocations.remove(token_id="t-1")
    assert not await refused(before, undated, later)


async def test_a_token_is_refused_for_its_leeway_after_the_revocations_end(plane: ControlPlane) -> None:
    """Its ``exp`` is the end that people give, and it is accepted for its leeway longer; the clocks may differ too."""
    refused = []
    for revoked in ({"token_id": "t-1"}, {"subject": "alice"}):
        await plane.revocations.add(**revoked, expires_at=soon(hours=1))  # type: ignore[arg-type]
        for ago in ("5 minutes", "11 minutes"):
            async with plane.control.transaction() as connection:
                await connection.exec_driver_sql(
                    f"UPDATE tenancy.revocations SET expires_at = now() - interval '{ago}'"
                )
            plane.directory.invalidate()
            listed = await plane.revocations.list()
            try:
                await plane.directory.subjects.allowed(Credential("token", "alice", id="t-1"))
            except InvalidCredentialError as error:
                refused.append((error.reason, len(listed), await plane.revocations.prune()))
            else:
                refused.append(("", len(listed), await plane.revocations.prune()))
    assert refused == [("revoked", 1, 0), ("", 0, 1)] * 2


async def test_housekeeping_prunes_what_has_ended(tenancy: Tenancy) -> None:
    """Revocations, and invitations that ended long ago."""
    await tenancy.tenants.create("acme")
    kept = await tenancy.revocations.add(subject="alice")
    await tenancy.revocations.add(token_id="t", expires_at=soon(hours=1))
    await tenancy.members.invite("acme", expires_in=1)
    async with tenancy.internals.control.transaction() as connection:
        for table in ("revocations", "invitations"):
            await connection.exec_driver_sql(
                f"UPDATE tenancy.{table} SET expires_at = now() - interval '31 days' WHERE expires_at IS NOT NULL"
            )
    chores = (await tenancy.run_housekeeping()).chores
    assert (chores["prune_revocations"], chores["prune_invitations"]) == (1, 1)
    assert await tenancy.revocations.list() == [kept]


@pytest.mark.parametrize("listening", [True, False], ids=["notified", "listener lost"])
async def test_what_is_open_in_another_process_ends(control_url: str, listening: bool) -> None:
    """When a member is removed or gets fewer roles, and by revocation; also of what the listener has missed."""
    async with (
        control_plane(control_url) as here,
        control_plane(control_url, initialise=False) as there,
    ):
        await here.tenant("acme")
        ends: dict[str, Callable[[str], Awaitable[object]]] = {
            "remove": lambda who: here.members.remove("acme", who),
            "demote": lambda who: here.members.add("acme", who, ["member"]),
            "revoke": lambda who: here.revocations.add(subject=who),
            "revoke one": lambda who: here.revocations.add(token_id=f"{who}-id"),
        }
        subjects = there.directory.subjects
        ended: dict[str, AdmissionEnd] = {}
        people = [*ends, "stays"]
        for who in people:
            await here.members.add("acme", who, ["owner"])
            credential = Credential("session", who, id=f"{who}-id", issued_at=soon(hours=-1))
            allowed = await subjects.allowed(credential)
            admission = subjects.admit(credential, allowed, allowed.memberships[0], ()).tenant.admission
            assert isinstance(admission, Admission)
            assert admission.watch(partial(ended.__setitem__, who)) is None
        if not listening:
            async with here.control.transaction() as connection:
                lost = await connection.exec_driver_sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND application_name LIKE 'tenancy-listener%'"
                )
                assert lost.rowcount == 2
        for who, end in ends.items():
            await end(who)
        await until(lambda: len(ended) == len(ends))
        assert {who: end.reason for who, end in ended.items()} == {
            "remove": "revoked",
            "demote": "scope",
            "revoke": "revoked",
            "revoke one": "revoked",
        }
