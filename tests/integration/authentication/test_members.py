"""Members of tenants: added, changed, removed and listed, each change with its entry, event and notification."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tenancy_orm import Tenancy
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.audit.actor import Actor
from tenancy_orm.authentication import subjects as subject_directory
from tenancy_orm.authentication.credential import Credential, Membership
from tenancy_orm.context import bind
from tenancy_orm.control.notifications import Change, Listener
from tenancy_orm.errors import (
    ConfigurationError,
    CrossTenantError,
    InvalidCredentialError,
    InvalidSubjectError,
    TenantNotFoundError,
    UnknownRoleError,
)
from tenancy_orm.events import EventBus, MemberAdded, MemberChanged, MemberRemoved, TenantEvent
from tenancy_orm.tenant import Status, Tenant
from tests.support.asgi import request
from tests.support.control import ControlPlane, control_plane
from tests.support.waiting import until

ADA = Actor("operator", "ada")


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[ControlPlane]:
    async with control_plane(control_url, opened=False) as opened:
        yield opened


@pytest.fixture
async def acme(plane: ControlPlane) -> Tenant:
    return (await plane.tenant("acme"))[0]


async def entries(plane: ControlPlane) -> list[tuple[str, Any, Any]]:
    """The entries about members, oldest first."""
    found = await plane.audit.events(action=["member.add", "member.change", "member.remove"])
    assert {(entry.slug, entry.actor) for entry in found} <= {("acme", ADA)}
    return [(entry.action, entry.before, entry.after) for entry in reversed(found)]


async def test_a_member_is_added_changed_and_removed(plane: ControlPlane, acme: Tenant) -> None:
    """By any name of the tenant. What changes nothing leaves no entry, and removing twice says so."""
    added = await plane.members.add("acme", "alice", actor=ADA)
    assert added.roles == {"member"}
    assert (added.tenant_id, added.subject) == (acme.id, "alice")
    assert await plane.members.add(acme, "alice", actor=ADA) == added
    changed = await plane.members.add(str(acme.id), "alice", ["owner", "member", "owner"], actor=ADA)
    assert changed.roles == {"owner", "member"}
    assert changed.created_at == added.created_at
    assert await plane.members.list(acme.id) == [changed]
    assert await plane.members.remove(acme, "alice", actor=ADA) is True
    assert await plane.members.remove(acme, "alice", actor=ADA) is False
    assert await plane.members.list("acme") == []
    member, owner = ({"subject": "alice", "roles": roles} for roles in (["member"], ["member", "owner"]))
    assert await entries(plane) == [
        ("member.add", None, member),
        ("member.change", member, owner),
        ("member.remove", owner, None),
    ]
    common: dict[str, Any] = {"tenant_id": acme.id, "slug": "acme", "subject": "alice"}
    assert [event for event in plane.seen if isinstance(event, TenantEvent)] == [
        MemberAdded(**common, roles=("member",)),
        MemberChanged(**common, roles=("member", "owner"), before=("member",)),
        MemberRemoved(**common),
    ]


async def test_members_are_listed_by_age_and_tenants_by_slug(plane: ControlPlane, acme: Tenant) -> None:
    """Of every status, with the subject's roles in each; a subject that nobody has added is in no tenant."""
    globex, _ = await plane.tenant("globex")
    for tenant, subject, roles in (
        ("globex", "bob", ["member"]),
        ("globex", "alice", ["member"]),
        ("acme", "alice", ["owner", "admin"]),
    ):
        await plane.members.add(tenant, subject, roles)
    assert [member.subject for member in await plane.members.list("globex")] == ["bob", "alice"]
    await plane.registry.transition(globex.id, Status.SUSPENDED, action="tenant.suspend")
    found = await plane.members.tenants_of("alice")
    assert found == [
        Membership(acme, frozenset({"owner", "admin"})),
        Membership(await plane.registry.get(globex.id), frozenset({"member"})),
    ]
    assert found[1].tenant.status is Status.SUSPENDED
    assert await plane.members.tenants_of("Alice") == []


async def test_a_purged_tenant_has_no_members_and_gets_none(plane: ControlPlane, acme: Tenant) -> None:
    await plane.members.add(acme, "alice")
    await plane.registry.transition(acme.id, Status.DELETED, action="tenant.delete")
    await plane.registry.begin_purge(acme.id)
    await plane.registry.erase_secrets(acme.id)
    assert await plane.members.tenants_of("alice") == []
    await plane.registry.finish_purge(acme.id)
    with pytest.raises(TenantNotFoundError):
        await plane.members.add(acme, "alice")


async def test_a_malformed_subject_is_refused_everywhere(plane: ControlPlane, acme: Tenant) -> None:
    """A claim of a token may be anything; the error does not repeat it."""
    members = plane.members
    bad: list[Any] = ["", "a" * 256, "a\x00b", "a\nb", "\ud800", "\u202ealice", None, 7, b"alice"]
    for subject in bad:
        for call in (members.add(acme, subject), members.remove(acme, subject), members.tenants_of(subject)):
            with pytest.raises(InvalidSubjectError, match="a subject must be 1 to 255 printable characters"):
                await call
    assert await members.list(acme) == []


async def test_a_malformed_credential_takes_nobody_else_with_it(plane: ControlPlane, acme: Tenant) -> None:
    """PostgreSQL refuses some texts, with all look-ups of one query, which would count as an outage."""
    await plane.members.add(acme, "alice")
    subjects = plane.directory.subjects
    malformed = [Credential("session", text) for text in ("", "\ud800", "a" * 256, "a\nb")]
    malformed += [Credential("session", "bob", id=text) for text in ("a\x00", "\ud800", "a" * 256)]
    alice, *refused = await asyncio.gather(
        *(subjects.allowed(each) for each in (Credential("session", "alice"), *malformed)), return_exceptions=True
    )
    assert [str(one.reason) for one in refused if isinstance(one, InvalidCredentialError)] == [
        *["subject"] * 4,
        *["id"] * 3,
    ]
    assert not isinstance(alice, BaseException) and [one.tenant for one in alice.memberships] == [acme]
    assert plane.directory.statistics.control_available
    number: Any = 7
    for wrong in ({"subject": number}, {"subject": "bob", "id": number}):
        with pytest.raises(ConfigurationError, match=r"pass str\(user.id\)"):
            Credential("session", **wrong)


async def test_a_member_of_every_tenant_does_not_make_everybody_wait(
    plane: ControlPlane, acme: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tenants are looked up some at a time, and others' look-ups in between."""
    monkeypatch.setattr(subject_directory, "_PAGE", 2)
    await plane.members.add(acme, "alice")
    for number in range(5):
        tenant, _ = await plane.tenant(f"t-{number}")
        await plane.members.add(tenant, "staff")
    plane.directory.invalidate()
    batch, asked = plane.directory._lookups._tenants, []
    load = batch._load

    async def recorded(wanted: list[Any]) -> Any:
        asked.append(len(wanted))
        return await load(wanted)

    monkeypatch.setattr(batch, "_load", recorded)
    found = await plane.directory.subjects.allowed(Credential("session", "staff"))
    assert (len(found.memberships), asked) == (5, [2, 2, 1])

    # nor does what is cached of it grow with the number of its tenants, for each of them
    subjects, credential = plane.directory.subjects, Credential("session", "staff")
    for most, tagged in ((5, 5), (4, 1)):
        monkeypatch.setattr(subject_directory, "_MAX_TAGGED", most)
        subjects.clear()
        allowed = await subjects.allowed(credential)
        chosen = allowed.memberships[3]
        assert subjects.admit(credential, allowed, chosen, ("t-3",)).memberships == allowed.memberships
        assert len([tag for tag in subjects._by_tag if isinstance(tag, UUID)]) == tagged
        assert subjects.peek(credential, ("t-3",)) is not None
        assert (await subjects.allowed(credential)).memberships is allowed.memberships  # one list for all its tenants
        plane.directory.invalidate(chosen.tenant.id)
        assert subjects.peek(credential, ("t-3",)) is None


async def test_any_printable_subject_is_taken_as_it_is(plane: ControlPlane, acme: Tenant) -> None:
    """Providers' subjects have bars, spaces, quotes and every script; they are compared exactly."""
    subjects = ["auth0|5f7c", "'; DROP TABLE tenancy.members; --", " alice", "alice ", "Ünïcode 用户", "😀" * 255]
    for subject in subjects:
        await plane.members.add(acme, subject)
    assert [member.subject for member in await plane.members.list(acme)] == subjects
    assert len(await plane.members.tenants_of("alice ")) == 1
    assert await plane.members.tenants_of("alice") == []


async def test_an_unknown_role_is_refused_with_those_that_are_known(plane: ControlPlane, acme: Tenant) -> None:
    with pytest.raises(
        UnknownRoleError, match=r"unknown roles: 'boss', 'king'; .* 'owner', 'admin', 'member'"
    ) as caught:
        await plane.members.add(acme, "alice", ["boss", "owner", "king"])
    assert (caught.value.roles, caught.value.known) == (("boss", "king"), ("owner", "admin", "member"))
    anything: list[Any] = [{"role": "owner"}, "x" * 10_000, *map(str, range(1_000))]
    with pytest.raises(UnknownRoleError) as caught:
        await plane.members.add(acme, "alice", anything)
    assert caught.value.roles[:2] == ("{'role': 'owner'}", "x" * 64) and len(str(caught.value)) < 500
    for roles, message in (("owner", "not one string"), ((), "at least one role")):
        with pytest.raises(ConfigurationError, match=message):
            await plane.members.add(acme, "alice", roles)
    assert await plane.members.list(acme) == []


async def test_roles_are_the_configured_ones(control_url: str) -> None:
    """A member with a role that is not configured any more stays one, and has no scopes of it."""
    async with control_plane(control_url, opened=False) as before:
        await before.tenant("acme")
        await before.members.add("acme", "alice", ["owner"])
    roles = {"editor": ["docs:write"]}
    async with control_plane(control_url, initialise=False, opened=False, members={"roles": roles}) as after:
        (member,) = await after.members.list("acme")
        assert after.config.members.scopes_of(member.roles) == frozenset()
        with pytest.raises(UnknownRoleError):
            await after.members.add("acme", "bob", ["member"])
        assert (await after.members.add("acme", "alice", ["editor"])).roles == {"editor"}


async def test_the_same_member_added_at_once_is_one(plane: ControlPlane, acme: Tenant) -> None:
    """Two calls insert, or one changes what the other has inserted; none fails, and none is lost."""
    roles = [["owner"], ["admin"], ["member"], ["owner"]] * 3
    outcomes = await asyncio.gather(*(plane.members.add(acme, "alice", each) for each in roles))
    assert {frozenset(outcome.roles) for outcome in outcomes} == {frozenset(each) for each in roles}
    (member,) = await plane.members.list(acme)
    chain = await plane.audit.events(action=["member.add", "member.change"])
    assert [entry.action for entry in chain][-1] == "member.add"
    assert chain[0].after == {"subject": "alice", "roles": sorted(member.roles)}
    for newer, older in itertools.pairwise(chain):
        assert newer.before == older.after


async def test_a_bound_tenant_manages_its_own_members_alone(plane: ControlPlane, acme: Tenant) -> None:
    """A request of one tenant's owner cannot add, list or remove another's, nor ask where else somebody is."""
    globex, _ = await plane.tenant("globex")
    await plane.members.add(globex, "bob")
    with bind(acme):
        await plane.members.add("acme", "alice", ["owner"])
        assert [member.subject for member in await plane.members.list(acme)] == ["alice"]
        for call in (
            plane.members.add(globex, "alice"),
            plane.members.remove("globex", "bob"),
            plane.members.list(globex.id),
            plane.members.tenants_of("alice"),
        ):
            with pytest.raises(CrossTenantError):
                await call
        assert await plane.members.remove(acme.id, "alice")
    assert [member.subject for member in await plane.members.list(globex)] == ["bob"]


async def test_every_process_learns_of_every_change(plane: ControlPlane, acme: Tenant) -> None:
    """With the tenant and the subject; a purge and a change by hand are received as well."""
    changes: list[Change] = []
    listener = Listener(plane.control.dsn, on_change=changes.append, on_connected=lambda: None, events=EventBus())
    await listener.open()
    change = Change(acme.id, None, "member", subject="alice")
    try:
        await plane.members.add(acme, "alice")
        await plane.members.add(acme, "alice", ["owner"])
        await plane.members.remove(acme, "alice")
        await until(lambda: len(changes) == 3)
        assert changes == [change] * 3
        await plane.members.add(acme, "alice")
        async with plane.control.transaction() as connection:
            await connection.exec_driver_sql("UPDATE tenancy.members SET subject = 'bob'")
        await until(lambda: len(changes) == 6)
        assert changes[3:] == [change, change, Change(acme.id, None, "member", subject="bob")]
    finally:
        await listener.close()


async def test_a_change_takes_effect_here_without_hearing_of_it(plane: ControlPlane, acme: Tenant) -> None:
    """The process that makes it does not wait for its own notification; that of an invitation is one of them."""
    subjects = plane.directory.subjects

    async def roles_of(subject: str) -> list[frozenset[str]]:
        return [one.roles for one in (await subjects.allowed(Credential("session", subject))).memberships]

    assert (await roles_of("alice"), await roles_of("bob")) == ([], [])
    await plane.members.add(acme, "alice")
    assert await roles_of("alice") == [{"member"}]
    await plane.members.add(acme, "alice", ["owner"])
    assert await roles_of("alice") == [{"owner"}]
    await plane.members.remove(acme, "alice")
    assert await roles_of("alice") == []
    invitation = await plane.members.invite(acme, roles=["admin"])
    await plane.members.accept(invitation.text or "", "bob")
    assert await roles_of("bob") == [{"admin"}]


class _Login:
    """Whoever the header says, as a login of the application would."""

    async def authenticate(self, connection: HTTPConnection) -> Credential | None:
        who = connection.headers.get("x-login")
        return None if who is None else Credential("session", who)


async def test_a_person_joins_works_and_leaves(tenancy: Tenancy) -> None:
    """From the invitation to the end of it, by requests: each step takes effect with the next request."""
    await tenancy.tenants.create("acme")
    invitation = await tenancy.members.invite("acme", roles=["admin"])

    async def join(incoming: Request) -> JSONResponse:
        member = await tenancy.members.accept((await incoming.body()).decode(), incoming.scope["tenancy"].subject)
        return JSONResponse(sorted(member.roles))

    async def work(incoming: Request) -> JSONResponse:
        credential = incoming.scope["tenancy"]
        return JSONResponse([credential.tenant.slug, sorted(credential.roles), sorted(credential.scopes)])

    async def leave(incoming: Request) -> JSONResponse:
        await tenancy.revocations.add(subject=incoming.scope["tenancy"].subject)
        return JSONResponse({})

    routes = [Route(path, call, methods=["POST"]) for path, call in (("/join", join), ("/leave", leave), ("/", work))]
    app = TenancyMiddleware(
        Starlette(routes=routes),
        tenancy=tenancy,
        authenticators=[_Login()],
        without_tenant=["/join", "/leave"],
    )

    async def post(path: str, who: str, body: str | None = "") -> tuple[int, Any]:
        answer = await request(app, path, [("X-Login", who)], method="POST", body=(body or "").encode())
        return answer.status, answer.json()

    assert (await post("/", "bob"))[0] == 403
    assert await post("/join", "bob", invitation.text) == (200, ["admin"])
    assert await post("/", "bob") == (200, ["acme", ["admin"], ["*"]])
    assert await tenancy.members.remove("acme", "bob")
    assert (await post("/", "bob"))[0] == 403
    await tenancy.members.add("acme", "bob")
    assert await post("/", "bob") == (200, ["acme", ["member"], []])
    assert await post("/leave", "bob") == (200, {})
    # a session that does not say when it began is refused until the revocation is taken back
    assert [(await post(path, "bob"))[0] for path in ("/", "/join")] == [401, 401]
    await tenancy.revocations.remove(subject="bob")
    assert (await post("/", "bob"))[0] == 200
