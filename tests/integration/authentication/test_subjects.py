"""What is known about people, tokens and sessions: changes that come at the wrong moment, and outages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from tenancy_orm.authentication.admission import Admission
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.errors import ControlUnavailableError, InvalidCredentialError
from tenancy_orm.events import DirectoryMissed, DirectoryUnavailable
from tests.support.control import ControlPlane, control_plane, follow
from tests.support.proxy import proxied
from tests.support.waiting import until

ADA = Credential("token", "ada", id="t-1", issued_at=datetime.now(UTC) - timedelta(minutes=1))
BY_CLAIM = Credential("token", "bob", id="t-2", tenants=("acme",), issued_at=datetime.now(UTC) - timedelta(minutes=1))


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[ControlPlane]:
    """A control plane with a tenant that ada is a member of. Changes are notified by hand."""
    async with control_plane(control_url, opened=False) as opened:
        await opened.tenant("acme")
        await sql(opened, "INSERT INTO tenancy.members SELECT id, 'ada', '{owner}' FROM tenancy.tenants")
        yield opened


async def sql(plane: ControlPlane, statement: str) -> None:
    """Change the control database."""
    async with plane.control.transaction() as connection:
        await connection.execute(text(statement))


async def admit(plane: ControlPlane, credential: Credential) -> Credential:
    """Admit a credential to its only tenant, as the middleware does."""
    subjects = plane.directory.subjects
    found = subjects.peek(credential, ())
    if found is None:
        allowed = await subjects.allowed(credential)
        found = subjects.admit(credential, allowed, allowed.memberships[0], ())
    return found


def admission_of(credential: Credential) -> Admission:
    """The admission that its requests have."""
    admission = credential.tenant.admission
    assert isinstance(admission, Admission)
    return admission


# --- a change while a request is admitted ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "known"),
    [("removed", True), ("removed", False), ("token", True), ("subject", True), ("everything", True), ("tenant", True)],
)
async def test_a_change_while_a_request_is_admitted_is_not_overlooked(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, change: str, known: bool
) -> None:
    """It comes after the person was read, and before the tenant is: nothing old is put back, and what is open ends."""
    credential = ADA if change in ("removed", "everything") else BY_CLAIM
    tenant = await plane.directory.tenant("acme")
    if known:
        await admit(plane, credential)
        plane.directory.subjects.invalidate(tenant.id)
    plane.directory._cache.invalidate_tenant(tenant.id)
    statements = {
        "removed": "DELETE FROM tenancy.members",
        "everything": "DELETE FROM tenancy.members",
        "token": "INSERT INTO tenancy.revocations (kind, value) VALUES ('token', 't-2')",
        "subject": "INSERT INTO tenancy.revocations (kind, value) VALUES ('subject', 'bob')",
        "tenant": "UPDATE tenancy.tenants SET status = 'suspended'",
    }

    async def make() -> None:
        monkeypatch.undo()
        await sql(plane, statements[change])
        if change == "everything":
            plane.directory.revalidate()
        elif change == "tenant":
            plane.directory.invalidate(tenant_id=tenant.id)
        elif change == "token":
            plane.directory.invalidate_subject(token_id="t-2")
        else:
            plane.directory.invalidate_subject(credential.subject)

    follow(monkeypatch, plane.directory._lookups._tenants, make)
    admitted = await admit(plane, credential)
    assert plane.directory.subjects.peek(credential, ()) is None
    await until(lambda: admission_of(admitted).ended)


async def test_a_listener_that_comes_back_while_a_request_is_admitted_is_not_overlooked(plane: ControlPlane) -> None:
    """All but a tenant is cached, and stale by then: of a member who was removed unnoticed, what is open ends."""
    another, _ = await plane.tenant("globex")
    await sql(
        plane, "INSERT INTO tenancy.members SELECT id, 'ada', '{owner}' FROM tenancy.tenants WHERE slug = 'globex'"
    )
    await admit(plane, ADA)
    plane.directory.subjects._admitted.entries.clear()
    plane.directory._cache.invalidate_tenant(another.id)
    await sql(plane, "DELETE FROM tenancy.members")
    asyncio.get_running_loop().call_soon(plane.directory.revalidate)
    admitted = await admit(plane, ADA)
    assert plane.directory.subjects.peek(ADA, ()) is None
    await until(lambda: admission_of(admitted).ended)


async def test_a_visitor_whose_tenant_is_suspended_while_it_is_looked_up_is_not_remembered(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for public pages."""
    tenant = await plane.directory.tenant("acme")
    plane.directory._cache.invalidate_tenant(tenant.id)

    async def make() -> None:
        monkeypatch.undo()
        await sql(plane, "UPDATE tenancy.tenants SET status = 'suspended'")
        plane.directory.invalidate(tenant_id=tenant.id)

    follow(monkeypatch, plane.directory._lookups._tenants, make)
    visitor = await plane.directory.subjects.anonymous("acme")
    await until(lambda: admission_of(visitor).ended)
    assert (await plane.directory.subjects.anonymous("acme")).tenant.status == "suspended"


# --- what cannot be looked up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["a\x00b", "\ud800", "x" * 256, "a\nb"])
async def test_what_postgresql_cannot_store_is_refused_without_a_look_up(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    """In one query with others it would fail theirs, and look like an outage of the control database to everyone."""
    if odd == "a\x00b":
        with monkeypatch.context() as off:
            off.setattr("tenancy_orm.authentication.subjects.is_name", lambda text: True)
            with pytest.raises(ControlUnavailableError):
                await plane.directory.subjects.allowed(Credential("session", "ada", id=odd))
        with pytest.raises(ControlUnavailableError):
            await plane.directory.subjects.allowed(ADA)
        assert plane.of(DirectoryUnavailable), "the attack must work"
        await until(lambda: plane.directory.statistics.control_available)
        plane.seen.clear()
    for credential in (Credential("session", odd), Credential("session", "ada", id=odd)):
        with pytest.raises(InvalidCredentialError) as caught:
            await plane.directory.subjects.allowed(credential)
        await plane.directory.report_refused(caught.value, None)
    assert (await plane.directory.subjects.allowed(Credential("token", "ada", tenants=(odd,)))).memberships == ()
    assert plane.directory.statistics.control_available
    assert plane.of(DirectoryUnavailable) == []
    # what is recorded of it can be written
    await plane.directory.flush()
    assert await plane.audit.events(action="credential.reject")


async def test_a_credential_with_thousands_of_tenants_is_refused(plane: ControlPlane) -> None:
    """It would be as many look-ups. A person may be a member of that many."""
    names = tuple(f"t{number}" for number in range(1_001))
    with pytest.raises(InvalidCredentialError):
        await plane.directory.subjects.allowed(Credential("token", "ada", tenants=names))
    found = await plane.directory.subjects.allowed(Credential("token", "ada", tenants=(*names[:999], "acme")))
    assert [one.tenant.slug for one in found.memberships] == ["acme"]
    assert len(plane.of(DirectoryMissed)) < 10


async def test_memory_is_bounded_whatever_credentials_come(control_url: str) -> None:
    """Rows, what was admitted, the index over both, and admissions: of new people, new tokens, and new names."""
    async with control_plane(control_url, opened=False, directory={"size": 5}) as plane:
        await plane.tenant("acme")
        for number in range(60):
            await admit(plane, Credential("token", f"p{number % 20}", id=f"t{number}", tenants=("acme",)))
            if number % 20 == 0:
                await plane.directory.subjects.anonymous("acme")
        subjects = plane.directory.subjects
        assert len(subjects._rows) == len(subjects) == 5
        # a person and a token of each row and of each that is admitted; and the tenant
        assert len(subjects._by_tag) <= 2 * (5 + 5) + 1
        assert len(plane.directory.admissions) <= 5 + 1
        plane.directory.subjects.clear()
        assert len(subjects._by_tag) == 0


async def test_a_slug_in_a_credential_is_whoever_has_it_and_an_id_is_one_tenant(plane: ControlPlane) -> None:
    """After a former slug has ceased to redirect, somebody else may take it."""
    tenant = await plane.directory.tenant("acme")

    async def slugs(*names: str | UUID) -> list[tuple[str, bool]]:
        plane.directory.invalidate()
        found = await plane.directory.subjects.allowed(Credential("session", "ada", tenants=names))
        return [(one.tenant.slug, one.tenant == tenant) for one in found.memberships]

    await plane.registry.rename(tenant.id, "acme-2", redirect_seconds=3_600)
    assert await slugs("acme") == await slugs(tenant.id) == [("acme-2", True)]
    await sql(plane, "UPDATE tenancy.former_slugs SET redirects_until = now()")
    assert (await slugs("acme"), await slugs(str(tenant.id))) == ([], [("acme-2", True)])
    await plane.tenant("acme")
    assert (await slugs("acme"), await slugs(tenant.id)) == ([("acme", False)], [("acme-2", True)])


# --- the control database away --------------------------------------------------------------------------------------


async def test_people_who_are_known_keep_access_for_the_grace_time_alone(control_url: str) -> None:
    """What is not known is not admitted, and what was refused does not come back; after that nobody is."""
    async with proxied(control_url) as proxy:
        options: dict[str, Any] = {"directory": {"ttl": 0.05, "grace": 0.6, "timeout": 0.5}}
        async with control_plane(control_url, through=proxy.url(control_url), opened=False, **options) as plane:
            await plane.tenant("acme")
            await sql(plane, "INSERT INTO tenancy.members SELECT id, 'ada', '{owner}' FROM tenancy.tenants")
            await sql(plane, "INSERT INTO tenancy.revocations (kind, value) VALUES ('subject', 'eve')")
            eve = Credential("session", "eve", tenants=("acme",))
            known = (ADA, BY_CLAIM)
            for credential in known:
                await admit(plane, credential)
            visitor = await plane.directory.subjects.anonymous("acme")
            with pytest.raises(InvalidCredentialError):
                await admit(plane, eve)
            proxy.refuse()
            for credential in known:
                await until(lambda: plane.directory.subjects.peek(credential, ()) is None)  # noqa: B023
                assert (await admit(plane, credential)).tenant.slug == "acme"
            assert (await plane.directory.subjects.anonymous("acme")).tenant == visitor.tenant
            with pytest.raises(InvalidCredentialError):
                await admit(plane, eve)
            with pytest.raises(ControlUnavailableError):
                await admit(plane, Credential("token", "new", tenants=("acme",)))

            async def is_refused(credential: Credential) -> bool:
                try:
                    await admit(plane, credential)
                except (ControlUnavailableError, InvalidCredentialError) as error:
                    return isinstance(error, ControlUnavailableError)
                return False

            for credential in (*known, eve):
                await until(lambda: is_refused(credential))  # noqa: B023
            with pytest.raises(ControlUnavailableError):
                await plane.directory.subjects.anonymous("acme")
            proxy.restore()
            await until(lambda: plane.directory.statistics.control_available)
            for credential in known:
                assert (await admit(plane, credential)).tenant.slug == "acme"
