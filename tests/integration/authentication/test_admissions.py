"""The directory's admissions: what it lets in is found again, whatever it remembers, and verified."""

from __future__ import annotations

import gc
import pickle
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text

from tenancy_orm.authentication.admission import Admission, tenant_for_source
from tenancy_orm.errors import AdmissionEndedError, InvalidCredentialError
from tenancy_orm.tenant import Tenant
from tests.support.control import ControlPlane, control_plane, follow
from tests.support.proxy import proxied
from tests.support.waiting import until


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[ControlPlane]:
    """A control plane with a listening directory."""
    async with control_plane(control_url) as opened:
        yield opened


def admission_of(tenant: Tenant) -> Admission:
    """The admission that a tenant was bound with."""
    assert isinstance(tenant.admission, Admission)
    return tenant.admission


async def test_a_revoked_key_ends_what_it_has_let_in(plane: ControlPlane) -> None:
    """What was remembered of it is forgotten by then."""
    _, key = await plane.tenant("acme")
    credential = await plane.directory.authenticate(key)
    admission_of(credential.tenant).check()
    await plane.keys.revoke(credential.id)
    await until(lambda: admission_of(credential.tenant).ended)
    with pytest.raises(AdmissionEndedError) as caught:
        admission_of(credential.tenant).check()
    assert caught.value.reason == "revoked"


async def test_a_key_that_is_not_remembered_any_more_ends_what_it_has_let_in(control_url: str) -> None:
    """It was evicted by others, and what it let in goes on."""
    async with control_plane(control_url, directory={"size": 1}) as plane:
        _, key = await plane.tenant("acme")
        _, other = await plane.tenant("globex")
        credential = await plane.directory.authenticate(key)
        await plane.directory.authenticate(other)
        assert plane.directory.peek(key) is None
        await plane.keys.revoke(credential.id)
        await until(lambda: admission_of(credential.tenant).ended)


async def test_who_is_let_in_while_the_key_is_revoked_is_found(
    control_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-up had its answer before the revocation, and its caller after it."""
    # without a listener: it would tell of the revocation once more
    async with control_plane(control_url, opened=False) as plane:
        _, key = await plane.tenant("acme")
        key_id = (await plane.directory.authenticate(key)).id
        await plane.directory.flush()  # what was used is remembered until it is written down
        plane.directory.invalidate()
        revoked = False

        async def revoke() -> None:
            nonlocal revoked
            if not revoked:
                revoked = True
                await plane.keys.revoke(key_id)

        follow(monkeypatch, plane.directory._lookups._keys, revoke)
        credential = await plane.directory.authenticate(key)
        await until(lambda: admission_of(credential.tenant).ended)
        with pytest.raises(InvalidCredentialError):
            await plane.directory.authenticate(key)


async def test_a_change_that_was_not_received_ends_it_once_the_listener_is_back(plane: ControlPlane) -> None:
    """What is watched at once; the rest when it is used."""
    (_, first), (_, second) = await plane.tenant("acme"), await plane.tenant("globex")
    watched = admission_of((await plane.directory.authenticate(first)).tenant)
    used = admission_of((await plane.directory.authenticate(second)).tenant)
    watched.watch(lambda ended: None)
    async with plane.control.transaction() as connection:
        await connection.execute(text("SET LOCAL session_replication_role = replica"))  # no trigger, no notification
        await connection.execute(text("UPDATE tenancy.api_keys SET revoked_at = now()"))
    plane.directory.revalidate()
    await until(lambda: watched.ended)
    assert used.ended is None
    used.check()
    await until(lambda: used.ended)


async def test_what_could_not_be_verified_is_once_the_control_database_is_back(
    control_url: str, plane: ControlPlane
) -> None:
    """Until then it goes on."""
    async with (
        proxied(control_url) as proxy,
        control_plane(
            control_url,
            initialise=False,
            through=proxy.url(control_url),
            directory={"timeout": 0.5},
            control={"listen_url": control_url},
        ) as other,
    ):
        _, key = await plane.tenant("acme")
        credential = await other.directory.authenticate(key)
        admission = admission_of(credential.tenant)
        proxy.refuse()
        await plane.keys.revoke(credential.id)
        await until(lambda: not other.directory.statistics.control_available)
        admission.check()
        proxy.restore()
        await until(lambda: admission.ended)


async def test_each_source_of_a_key_that_is_bound_to_networks_is_judged_by_itself(plane: ControlPlane) -> None:
    """One that is admitted no longer ends, the other does not."""
    tenant, _ = await plane.tenant("acme")
    issued = await plane.key(tenant, networks=["192.0.2.0/24", "198.51.100.0/24"])
    here = await plane.directory.authenticate(issued.text, source="192.0.2.1")
    there = await plane.directory.authenticate(issued.text, source="198.51.100.1")
    assert plane.directory.peek(issued.text, "192.0.2.1") is here
    assert plane.directory.peek(issued.text, "198.51.100.1") is there
    async with plane.control.transaction() as connection:
        await connection.execute(
            text("UPDATE tenancy.api_keys SET networks = '{192.0.2.0/24}' WHERE id = :id"), {"id": issued.key_id}
        )
    await until(lambda: admission_of(there.tenant).ended)
    admission_of(here.tenant).check()


async def test_a_tenant_that_is_asked_for_by_name_has_no_admission(plane: ControlPlane) -> None:
    """Jobs do not end with whatever key was used last; and nothing of one is pickled."""
    _, key = await plane.tenant("acme")
    credential = await plane.directory.authenticate(key)
    assert (await plane.directory.tenant("acme")).admission is None
    assert (await plane.directory.tenant(credential.tenant)).admission is None
    assert pickle.loads(pickle.dumps(credential.tenant)).admission is None  # noqa: S301
    assert credential.tenant == await plane.directory.tenant("acme")
    assert "dmission" not in repr(credential)


async def test_nothing_is_left_of_what_is_forgotten(plane: ControlPlane) -> None:
    """An admission lives as long as its entry, and as whoever was let in with it."""
    tenant, key = await plane.tenant("acme")
    credential = await plane.directory.authenticate(key)
    for _ in range(100):
        credential = await plane.directory.authenticate(key)
        tenant_for_source(credential.tenant, "192.0.2.1")
        plane.directory.invalidate(tenant_id=tenant.id)
    await plane.directory.flush()  # what was used is remembered until it is written down
    gc.collect()
    assert len(plane.directory.admissions) == 1
    del credential
    await until(lambda: len(plane.directory.admissions) == 0)
