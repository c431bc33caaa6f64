"""What is known about people, tokens and sessions: changes that come at the wrong moment, and outages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from tenancy_orm.authentication.admission import Admission
from tenancy_orm.authentication.credential import Credential
from tests.support.control import ControlPlane, control_plane, follow
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
