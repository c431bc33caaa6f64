"""Invitations: a text makes one subject a member, once; nothing else does, whatever is forged or edited."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy_orm.audit.actor import Actor
from tenancy_orm.authentication import refusal_log
from tenancy_orm.authentication.invitation_rows import Invitation
from tenancy_orm.authentication.invitation_text import InvitationSigner, InvitationText, Signed, parse_invitation
from tenancy_orm.authentication.members import MemberManager
from tenancy_orm.authentication.refusals import MAX_WRITTEN
from tenancy_orm.context import bind
from tenancy_orm.errors import (
    ConfigurationError,
    ControlUnavailableError,
    CrossTenantError,
    InvalidInvitationError,
    InvalidSubjectError,
    InvitationAcceptedError,
    InvitationNotFoundError,
    TenantDeletedError,
    UnknownRoleError,
)
from tenancy_orm.events import InvitationRefused, MemberAdded, MemberChanged
from tenancy_orm.tenant import Status, Tenant
from tests.support.control import ControlPlane, control_plane
from tests.support.waiting import HANGS, until

ADA = Actor("operator", "ada")


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[ControlPlane]:
    async with control_plane(control_url, opened=False) as opened:
        yield opened


@pytest.fixture
async def acme(plane: ControlPlane) -> Tenant:
    return (await plane.tenant("acme"))[0]


async def invite(plane: ControlPlane, **options: Any) -> tuple[Invitation, str]:
    """An invitation to acme, and its text."""
    made = await plane.members.invite("acme", **options)
    assert made.text is not None
    return made, made.text


async def sql(plane: ControlPlane, statement: str, **parameters: Any) -> None:
    """Edit the control database by hand."""
    async with plane.control.transaction() as connection:
        assert (await connection.execute(text(statement), parameters)).rowcount == 1


async def refused(plane: ControlPlane, invitation: str, subject: str = "mallory") -> str:
    """Accept an invitation that must be refused; returns the reason, which the caller never learns."""
    before = await plane.members.tenants_of(subject)
    with pytest.raises(InvalidInvitationError) as read:
        await plane.members.get_invitation(invitation)
    with pytest.raises(InvalidInvitationError) as caught:
        await plane.members.accept(invitation, subject)
    assert (read.value.reason, read.value.__context__) == (caught.value.reason, None)
    assert str(caught.value) == "the invitation is not valid; ask for another one"
    assert caught.value.__context__ is None
    assert await plane.members.tenants_of(subject) == before
    return caught.value.reason


def signer_of(plane: ControlPlane, keys: dict[str, bytes]) -> MemberManager:
    """Members of a process with other encryption keys."""
    signer = InvitationSigner(plane.control.installation, keys)
    return MemberManager(plane.control, plane.config.members, plane.directory, plane.audit, plane.events, signer)


# --- the way that it is meant to go -----------------------------------------------------------------------------------


async def test_an_invitation_makes_its_bearer_a_member(plane: ControlPlane, acme: Tenant) -> None:
    """The text is shown once; the database has a digest of its secret, and the audit log neither it nor the address."""
    made, secret = await invite(plane, roles=["admin"], email="bob@example.com", actor=ADA)
    assert made.state == "pending"
    assert abs(made.expires_at - datetime.now(UTC) - timedelta(days=7)) < timedelta(minutes=1)
    assert secret not in repr(made) and secret.startswith("invite_")
    (listed,) = await plane.members.invitations("acme")
    assert listed.text is None
    assert listed.roles == {"admin"}
    assert (listed.id, listed.email) == (made.id, "bob@example.com")
    member = await plane.members.accept(secret, "bob")
    assert member.roles == {"admin"}
    assert (member.tenant_id, member.subject) == (acme.id, "bob")
    (used,) = await plane.members.invitations(acme)
    assert (used.state, used.accepted_by) == ("accepted", "bob")
    created, accepted = reversed(await plane.audit.events(action=["invitation.create", "invitation.accept"]))
    assert (created.actor, created.tenant_id, created.slug) == (ADA, acme.id, "acme")
    assert created.after is not None and created.after["invitation_id"] == str(made.id)
    assert (accepted.actor.kind, accepted.actor.id, accepted.before) == ("session", "bob", None)
    assert accepted.after == {"subject": "bob", "roles": ["admin"]}
    assert accepted.detail == {"invitation_id": str(made.id)}
    (event,) = plane.of(MemberAdded)
    assert isinstance(event, MemberAdded) and event.invitation_id == made.id
    parsed = parse_invitation(secret)
    assert parsed is not None
    stored = {}
    async with plane.control.connect() as connection:
        for table in ("invitations", "audit_log"):
            rows = await connection.scalars(text(f"SELECT to_jsonb(t)::text FROM tenancy.{table} t"))
            stored[table] = "".join(rows)
    for hidden in (secret, parsed.secret.hex(), base64.b64encode(parsed.secret).decode()):
        assert hidden not in stored["invitations"] + stored["audit_log"]
    assert "bob@example.com" not in stored["audit_log"]


async def test_a_member_who_accepts_keeps_the_roles_it_has(plane: ControlPlane, acme: Tenant) -> None:
    """An owner who follows a link for members is no less an owner."""
    await plane.members.add(acme, "alice", ["owner"])
    for roles in (["member"], ["owner"]):
        _, secret = await invite(plane, roles=roles)
        assert (await plane.members.accept(secret, "alice")).roles == {"owner", "member"}
    (event,) = plane.of(MemberChanged)
    assert isinstance(event, MemberChanged) and (event.before, event.roles) == (("owner",), ("member", "owner"))


async def test_accepting_again_answers_as_before(plane: ControlPlane, acme: Tenant) -> None:
    """A second click, or a retry after a lost answer, changes nothing; after a removal it is used up."""
    _, secret = await invite(plane)
    first = await plane.members.accept(secret, "bob")
    assert await plane.members.accept(secret, "bob") == first
    assert len(await plane.audit.events(action="invitation.accept")) == 1
    await plane.members.add(acme, "bob", ["admin"])
    assert (await plane.members.accept(secret, "bob")).roles == {"admin"}
    await plane.members.remove(acme, "bob")
    assert await refused(plane, secret, "bob") == "accepted"


async def test_a_text_can_be_read_before_it_is_accepted(plane: ControlPlane, acme: Tenant) -> None:
    """To show what it is for; that leaves it as it was, and needs no login."""
    made, secret = await invite(plane, roles=["admin"], email="bob@example.com")
    for _ in range(2):
        read = await plane.members.get_invitation(secret)
        assert read == replace(made, text=None)
    await plane.members.accept(secret, "bob")
    assert await refused(plane, secret) == "accepted"


async def test_an_invitation_is_withdrawn(plane: ControlPlane, acme: Tenant) -> None:
    """Twice is once; one that was accepted names the member to remove instead."""
    made, secret = await invite(plane)
    withdrawn = await plane.members.withdraw(str(made.id), actor=ADA)
    assert withdrawn.state == "withdrawn"
    assert await plane.members.withdraw(made.id) == withdrawn
    assert await refused(plane, secret) == "withdrawn"
    (entry,) = await plane.audit.events(action="invitation.withdraw")
    assert (entry.actor, entry.tenant_id) == (ADA, acme.id)
    other, secret = await invite(plane)
    await plane.members.accept(secret, "bob")
    with pytest.raises(InvitationAcceptedError, match="accepted by 'bob'; remove that member"):
        await plane.members.withdraw(other.id)
    for unknown in (uuid4(), str(uuid4()), "nonsense", "", None, 7, f"{{{made.id}}}"):
        with pytest.raises(InvitationNotFoundError):
            await plane.members.withdraw(unknown)  # type: ignore[arg-type]


async def test_a_malformed_invitation_is_not_made(plane: ControlPlane, acme: Tenant) -> None:
    """Each argument has its bounds, and the error names it."""
    mistakes: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"roles": ["boss"]}, UnknownRoleError, "unknown roles: 'boss'"),
        ({"roles": []}, ConfigurationError, "at least one role"),
        *(({"email": bad}, ConfigurationError, "email must be") for bad in ("", "a\x00@example.com", "a" * 321)),
        *(({"expires_in": bad}, ConfigurationError, "expires_in must be") for bad in (0, -1, float("nan"), 1e12)),
        ({"expires_in": timedelta(days=3_661)}, ConfigurationError, "expires_in must be"),
    ]
    for options, error, message in mistakes:
        with pytest.raises(error, match=message):
            await plane.members.invite(acme, **options)
    assert await plane.members.invitations(acme) == []


# --- refusals: one answer for the caller, a reason for operators ------------------------------------------------------


async def test_what_is_no_longer_valid_is_refused_alike(plane: ControlPlane, acme: Tenant) -> None:
    """The reasons are in the audit log and in the events, with the invitation's tenant where the text is genuine."""
    _, accepted = await invite(plane)
    await plane.members.accept(accepted, "bob")
    made, withdrawn = await invite(plane)
    await plane.members.withdraw(made.id)
    made, expired = await invite(plane, expires_in=0.001)
    forged = InvitationText(made.id, b"s" * 32, b"m" * 32)
    unknown = InvitationText(uuid4(), b"s" * 32, b"m" * 32)
    texts = {"accepted": accepted, "withdrawn": withdrawn, "expired": expired}
    texts |= {"secret": str(forged), "unknown": str(unknown), "malformed": "invite_"}
    for reason, each in texts.items():
        assert await refused(plane, each) == reason
    await plane.members.close()
    entries = await plane.audit.events(action="invitation.refuse")
    known = {"accepted", "withdrawn", "expired"}
    assert {(e.detail or {})["reason"]: e.tenant_id for e in entries} == {
        reason: acme.id if reason in known else None for reason in texts
    }
    assert {(e.actor.kind, e.actor.id) for e in entries} == {("session", "mallory"), ("anonymous", None)}
    events = [event for event in plane.seen if isinstance(event, InvitationRefused)]
    assert {event.reason: event.slug for event in events} == {r: "acme" if r in known else None for r in texts}


async def test_a_tenant_that_admits_nobody_gets_no_member(plane: ControlPlane, acme: Tenant) -> None:
    """While it is suspended or deleted; the invitation is not used up by the attempt, and a purge removes it."""
    _, secret = await invite(plane)
    for status in (Status.SUSPENDED, Status.DELETED):
        await plane.registry.transition(acme.id, status, action="tenant.test")
        assert await refused(plane, secret) == f"tenant {status}"
    with pytest.raises(TenantDeletedError):
        await plane.members.invite("acme")
    for back in (None, Status.ACTIVE):
        await plane.registry.transition(acme.id, back, action="tenant.test")
    await plane.members.accept(secret, "bob")
    _, left = await invite(plane)
    await plane.registry.transition(acme.id, Status.DELETED, action="tenant.delete")
    await plane.registry.begin_purge(acme.id)
    await plane.registry.erase_secrets(acme.id)
    assert await refused(plane, left) == "unknown"


async def test_a_flood_of_texts_is_counted(plane: ControlPlane, acme: Tenant) -> None:
    """Each entry takes the lock of the log: the first is written at once, and the others together."""
    _, secret = await invite(plane)
    await plane.members.accept(secret, "bob")
    await asyncio.gather(*(refused(plane, secret, f"subject {number % 30}") for number in range(90)))
    await plane.members.close()
    entries = await plane.audit.events(action="invitation.refuse")
    assert len(entries) < MAX_WRITTEN + 12
    assert sum((entry.detail or {})["count"] for entry in entries) == 2 * 90


async def test_a_refusal_is_recorded_whoever_stops_waiting(plane: ControlPlane, acme: Tenant) -> None:
    """Its caller gets the answer without waiting for the log, and closing interrupts what is being written."""

    async def waiting() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        async with plane.control.connect() as connection:
            return int(await connection.scalar(text(query))) == 1

    async with plane.control.transaction() as connection:
        await connection.exec_driver_sql("SELECT FROM tenancy.audit_head FOR UPDATE")
        async with asyncio.timeout(HANGS):
            with pytest.raises(InvalidInvitationError):
                await plane.members.accept("forged", "mallory")
        await until(waiting)
        closing = asyncio.create_task(plane.members.close())
        await asyncio.sleep(0)
    await closing
    (entry,) = await plane.audit.events(action="invitation.refuse")
    assert (entry.actor.id, entry.detail) == ("mallory", {"reason": "malformed", "count": 1})


async def test_a_refusal_is_written_when_the_log_can_be_again(
    plane: ControlPlane, acme: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is refused any more."""
    monkeypatch.setattr(refusal_log, "_WRITE_SECONDS", 0.05)
    with monkeypatch.context() as away:
        away.setattr(plane.audit, "append", AsyncMock(side_effect=ControlUnavailableError("away")))
        with pytest.raises(InvalidInvitationError):
            await plane.members.accept("forged", "mallory")
        await until(lambda: plane.audit.append.await_count == 2)  # type: ignore[attr-defined]

    async def written() -> bool:
        return len(await plane.audit.events(action="invitation.refuse")) == 1

    await until(written)
    await plane.members.close()
    assert await written()


async def test_what_is_no_text_of_an_invitation_is_refused(plane: ControlPlane, acme: Tenant) -> None:
    """Whatever a body of JSON may hold, without a query; and a malformed subject is a mistake of the application's."""
    texts: list[Any] = ["", "invite_", "x" * 115, "invite_" + "é" * 108, "invite_" + "A" * 108, None, 7, "\x00"]
    for bad in texts:
        assert await refused(plane, bad) == "malformed"
        with pytest.raises(InvalidSubjectError):
            await plane.members.accept(bad, "")


async def test_while_another_tenant_is_bound_it_is_refused(plane: ControlPlane, acme: Tenant) -> None:
    """Also what is listed and withdrawn; within its own tenant all of it works."""
    globex, _ = await plane.tenant("globex")
    made, secret = await invite(plane)
    with bind(globex):
        for call in (
            plane.members.accept(secret, "bob"),
            plane.members.get_invitation(secret),
            plane.members.withdraw(made.id),
            plane.members.invitations(acme),
            plane.members.invite(acme),
            plane.members.prune_invitations(),
        ):
            with pytest.raises(CrossTenantError):
                await call
        with pytest.raises(InvalidInvitationError):
            await plane.members.accept(str(InvitationText(made.id, b"s" * 32, b"m" * 32)), "bob")
    assert (await plane.members.invitations(acme))[0].state == "pending"
    with bind(acme):
        await plane.members.accept(secret, "bob")
        with pytest.raises(InvitationAcceptedError):
            await plane.members.withdraw(made.id)


# --- single use -------------------------------------------------------------------------------------------------------


async def test_without_its_lock_two_could_accept_one_invitation(
    plane: ControlPlane, acme: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack: both read it before either writes. The test below does the same with the lock."""
    genuine, both = MemberManager._genuine, asyncio.Barrier(2)

    async def unlocked(self: MemberManager, connection: AsyncConnection, text: InvitationText, **lock: bool) -> Any:
        row = await genuine(self, connection, text)
        await both.wait()
        return row

    monkeypatch.setattr(MemberManager, "_genuine", unlocked)
    _, secret = await invite(plane)
    await asyncio.gather(plane.members.accept(secret, "bob"), plane.members.accept(secret, "mallory"))
    assert len(await plane.members.list(acme)) == 2


async def test_two_processes_that_accept_at_once_make_one_member(control_url: str) -> None:
    """Any number of subjects; the others get the same answer as for any other invitation that is used up."""
    async with (
        control_plane(control_url, opened=False) as plane,
        control_plane(control_url, initialise=False, opened=False) as other,
    ):
        await plane.tenant("acme")
        _, secret = await invite(plane)
        calls = [each.members.accept(secret, f"{n}-{i}") for n in range(6) for i, each in enumerate((plane, other))]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        accepted = [one for one in outcomes if not isinstance(one, BaseException)]
        reasons = [one.reason for one in outcomes if isinstance(one, InvalidInvitationError)]
        assert (len(accepted), reasons) == (1, ["accepted"] * 11)
        assert await plane.members.list("acme") == accepted


async def test_a_second_click_at_once_is_answered_as_the_first(plane: ControlPlane, acme: Tenant) -> None:
    _, secret = await invite(plane)
    outcomes = await asyncio.gather(*(plane.members.accept(secret, "bob") for _ in range(4)))
    assert outcomes == await plane.members.list(acme) * 4
    assert len(await plane.audit.events(action="invitation.accept")) == 1


async def test_accepting_and_withdrawing_at_once_agree(plane: ControlPlane, acme: Tenant) -> None:
    """Whichever is first: there is a member exactly if the withdrawal failed."""
    for number in range(4):
        made, secret = await invite(plane)
        accepted, withdrawn = await asyncio.gather(
            plane.members.accept(secret, f"bob {number}"),
            plane.members.withdraw(made.id),
            return_exceptions=True,
        )
        assert isinstance(accepted, InvalidInvitationError) is not isinstance(withdrawn, InvitationAcceptedError)


# --- the signature ----------------------------------------------------------------------------------------------------

EDITS = {
    "roles raised": "UPDATE tenancy.invitations SET roles = '{owner}'",
    "a role added": "UPDATE tenancy.invitations SET roles = roles || '{owner}'",
    "another tenant": "UPDATE tenancy.invitations SET tenant_id = :globex",
    "a later end": "UPDATE tenancy.invitations SET expires_at = now() + interval '1 year'",
    "another id": "UPDATE tenancy.invitations SET id = :id",
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
async def test_a_row_that_was_edited_makes_nobody_a_member(
    plane: ControlPlane, acme: Tenant, edit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack: without the signature it works. Then the same text is refused, by every process."""
    globex, _ = await plane.tenant("globex")
    made, secret = await invite(plane, expires_in=3_600)
    id_of_row = uuid4() if ":id" in edit else made.id
    await sql(plane, edit, **{k: v for k, v in (("globex", globex.id), ("id", id_of_row)) if f":{k}" in edit})
    parsed = parse_invitation(secret)
    assert parsed is not None
    shown = str(InvitationText(id_of_row, parsed.secret, parsed.signature))
    with monkeypatch.context() as off:
        off.setattr(InvitationSigner, "verify", lambda self, text, signed: True)
        await plane.members.accept(shown, "mallory")
        (membership,) = await plane.members.tenants_of("mallory")
        await plane.members.remove(membership.tenant, "mallory")
        await sql(plane, "UPDATE tenancy.invitations SET accepted_at = NULL, accepted_by = NULL")
    assert await refused(plane, shown) == "signature"


async def test_a_row_that_was_added_makes_nobody_a_member(plane: ControlPlane, acme: Tenant) -> None:
    """Who can write the table knows a secret of its digest, and not the key: no text fits."""
    invitation_id, expires_at = uuid4(), datetime.now(UTC) + timedelta(days=1)
    own = InvitationSigner(plane.control.installation, {"1": b"guess" + bytes(27)})
    forged = own.issue(Signed(invitation_id, acme.id, ["owner"], expires_at))
    await sql(
        plane,
        "INSERT INTO tenancy.invitations (id, tenant_id, roles, digest, expires_at) "
        "VALUES (:id, :tenant, '{owner}', :digest, :end)",
        id=invitation_id,
        tenant=acme.id,
        digest=sha256(forged.secret).digest(),
        end=expires_at,
    )
    assert await refused(plane, str(forged)) == "signature"
    # the attack needs the key alone
    attacker = signer_of(plane, {"1": b"guess" + bytes(27)})
    assert (await attacker.accept(str(forged), "mallory")).roles == {"owner"}


async def test_every_bit_of_a_text_counts(plane: ControlPlane, acme: Tenant) -> None:
    """Version, id, secret and signature; nor does another spelling of the same bytes pass."""
    _, secret = await invite(plane)
    raw = bytearray(base64.urlsafe_b64decode(secret.removeprefix("invite_")))
    for position in range(0, len(raw), 9):
        flipped = bytearray(raw)
        flipped[position] ^= 1
        await refused(plane, "invite_" + base64.urlsafe_b64encode(flipped).decode())
    for spelling in (secret + "=", secret.upper(), f" {secret}", "invite_" + base64.b64encode(b"\xff" * 81).decode()):
        assert await refused(plane, spelling) == "malformed"
    await plane.members.accept(secret, "bob")


async def test_keys_are_rotated_and_other_installations_are_strangers(plane: ControlPlane, acme: Tenant) -> None:
    """Any configured key verifies and the last one signs; an invitation ends with the key that signed it."""
    old, new = {"1": b"k" * 32}, {"2": b"n" * 32}
    both = signer_of(plane, {**old, **new})
    texts = [(await each.invite("acme")).text or "" for each in (plane.members, both)]
    with pytest.raises(InvalidInvitationError) as caught:
        await signer_of(plane, new).accept(texts[0], "bob")
    assert caught.value.reason == "signature"
    with pytest.raises(InvalidInvitationError):
        await signer_of(plane, old).accept(texts[1], "bob")
    for number, each in enumerate(texts):
        await both.accept(each, f"bob {number}")
    signer = InvitationSigner(UUID(int=1), old)
    signed = Signed(uuid4(), acme.id, ["member"], datetime.now(UTC))
    issued = signer.issue(signed)
    assert signer.verify(issued, signed)
    assert not InvitationSigner(UUID(int=2), old).verify(issued, signed)
    tried = signer.keys.ids
    assert not await signer.keys.has_any_besides(tried)
    await signer.keys.add(new)
    assert await signer.keys.has_any_besides(tried), "another caller has read them since"
    assert signer.verify(issued, signed) and signer.verify(signer.issue(signed), signed)
    assert not InvitationSigner(UUID(int=1), old).verify(signer.issue(signed), signed)
    assert "k" * 32 not in repr(signer) and issued.secret.hex() not in repr(issued)


# --- upkeep -----------------------------------------------------------------------------------------------------------


async def test_old_invitations_are_removed_after_thirty_days(plane: ControlPlane, acme: Tenant) -> None:
    """With the addresses in them; the list shows until then what became of each."""
    for _ in range(2):
        await plane.members.invite(acme, expires_in=0.001, email="bob@example.com")
    pending, _ = await invite(plane)
    for column in ("accepted_at", "withdrawn_at"):
        made, secret = await invite(plane, expires_in=timedelta(days=3_000))
        await (plane.members.accept(secret, "bob") if column == "accepted_at" else plane.members.withdraw(made.id))
        assert await plane.members.prune_invitations() == 0
        await sql(
            plane,
            f"UPDATE tenancy.invitations SET {column} = now() - interval '31 days' WHERE id = :id",
            id=made.id,
        )
        assert await plane.members.prune_invitations() == 1
    assert await plane.members.prune_invitations() == 0
    assert [each.state for each in await plane.members.invitations(acme)] == ["expired", "expired", "pending"]
    async with plane.control.transaction() as connection:
        await connection.exec_driver_sql(
            "UPDATE tenancy.invitations SET expires_at = expires_at - interval '30 days' WHERE email IS NOT NULL"
        )
    assert await plane.members.prune_invitations() == 2
    assert [each.id for each in await plane.members.invitations(acme)] == [pending.id]
