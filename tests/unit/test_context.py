"""The current tenant: bound, inherited, never switched."""

from __future__ import annotations

import asyncio
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import replace
from uuid import UUID

import pytest

from tenancy_orm.context import (
    as_reference,
    bind,
    current_tenant,
    current_tenant_or_none,
    refuse_other_tenant,
    set_current,
)
from tenancy_orm.deadlines import current_deadline, reset_deadline, set_deadline
from tenancy_orm.errors import AdmissionEndedError, CrossTenantError, InvalidSlugError, NoTenantError
from tenancy_orm.tenant import Placement, Status, Tenant, parse_id
from tenancy_orm.tenants.fields import check_slug, is_slug

ACME = Tenant(
    id=UUID(int=1),
    slug="acme",
    status=Status.ACTIVE,
    tier="free",
    placement=Placement("default", "db", "role", b"sealed-bytes"),
    metadata={"a": 1},
)
GLOBEX = Tenant(id=UUID(int=2), slug="globex", status=Status.ACTIVE, tier="free")


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("00000000-0000-0000-0000-00000000000a", True),
        ("00000000-0000-0000-0000-00000000000A", True),
        ("0000000000000000000000000000000a", True),
        ("{00000000-0000-0000-0000-00000000000a}", False),
        ("urn:uuid:00000000-0000-0000-0000-00000000000a", False),
        ("0000-0000000000000000000000000000-000a", False),
        ("00000000-0000-0000-0000-00000000000a\n", False),
        ("acme", False),
        ("", False),
    ],
)
def test_an_id_is_what_reads_as_one_in_every_part(text: str, is_id: bool) -> None:
    """``uuid.UUID`` reads more; what it reads besides is a name here, and nobody's."""
    assert parse_id(text) == (UUID(int=10) if is_id else None)
    assert as_reference(text) == (UUID(int=10) if is_id else text)


def test_no_slug_reads_as_an_id() -> None:
    """It would be looked up as one."""
    slug = "a" * 32
    assert is_slug(slug[1:]) and not is_slug(slug)
    with pytest.raises(InvalidSlugError):
        check_slug(slug)


def test_without_a_binding_there_is_no_tenant() -> None:
    """The default is none, and asking for it raises with the remedy."""
    with pytest.raises(NoTenantError, match=r"tenancy\.scope"):
        current_tenant()
    assert current_tenant_or_none() is None


def test_a_binding_ends_with_its_body() -> None:
    """Also when the body raises."""

    def fail() -> None:
        with bind(ACME):
            assert current_tenant() is ACME
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert current_tenant_or_none() is None


def test_a_binding_cannot_be_switched() -> None:
    """Binding the same tenant again is allowed, another is refused."""
    with bind(ACME), bind(ACME):
        with pytest.raises(CrossTenantError) as caught, bind(GLOBEX):
            pass
        assert current_tenant() is ACME
    assert (caught.value.bound, caught.value.requested) == ("acme", "globex")


class Ended:
    """An admission that has ended."""

    def check(self) -> None:
        """Refuse."""
        raise AdmissionEndedError("revoked", credential_id="key")


def test_a_scope_inside_a_request_ends_with_the_request_s_admission() -> None:
    """Whatever tenant is given: one that was looked up by name has no admission."""
    admission = Ended()
    with bind(replace(ACME, admission=admission)), bind(ACME), bind(replace(ACME, admission=None)) as bound:
        assert bound.admission is admission
        assert current_tenant().admission is admission
        with pytest.raises(AdmissionEndedError):
            refuse_other_tenant("acme")
        with pytest.raises(CrossTenantError):
            refuse_other_tenant("globex")
    with bind(ACME):
        assert current_tenant().admission is None
        refuse_other_tenant("acme")


def test_an_admission_is_no_part_of_a_tenant() -> None:
    """It is not compared, shown or pickled."""
    admitted = replace(ACME, admission=Ended())
    assert admitted == ACME
    assert repr(admitted) == repr(ACME)
    assert hash(admitted) == hash(ACME)
    assert pickle.loads(pickle.dumps(admitted)).admission is None  # noqa: S301


async def test_tasks_and_to_thread_inherit_the_binding() -> None:
    """They copy the context of the code that starts them."""

    async def ask() -> Tenant:
        return current_tenant()

    with bind(ACME):
        assert await asyncio.create_task(ask()) is ACME
        assert await asyncio.to_thread(current_tenant) is ACME
    with bind(GLOBEX):
        assert await asyncio.create_task(ask()) is GLOBEX


async def test_plain_threads_and_executors_see_none() -> None:
    """They begin with an empty context: NoTenantError, not another caller's tenant."""
    seen: list[Tenant | None] = []
    with bind(ACME), ThreadPoolExecutor(1) as executor:
        thread = threading.Thread(target=lambda: seen.append(current_tenant_or_none()))
        thread.start()
        thread.join()
        seen.append(await asyncio.get_running_loop().run_in_executor(executor, current_tenant_or_none))
    assert seen == [None, None]


async def test_concurrent_tasks_keep_their_own() -> None:
    """Interleaved tasks never see each other's tenant."""

    async def work(tenant: Tenant) -> bool:
        with bind(tenant):
            for _ in range(20):
                await asyncio.sleep(0)
                if current_tenant() is not tenant:
                    return False
        return True

    assert all(await asyncio.gather(*(work(ACME if i % 2 else GLOBEX) for i in range(20))))


def test_a_tenant_can_be_pickled_and_is_equal_by_id() -> None:
    """Jobs pass tenants on; a copy is equal to its tenant."""
    copy = pickle.loads(pickle.dumps(ACME))  # noqa: S301 - our own bytes
    assert copy == ACME and hash(copy) == hash(ACME)
    assert dict(copy.metadata) == {"a": 1}
    assert copy != GLOBEX


def test_a_tenants_repr_has_no_secret() -> None:
    """Not even the sealed one."""
    assert "sealed" not in repr(ACME)
    assert "sealed" not in repr(ACME.placement)


def test_set_current_overrides_what_leaked() -> None:
    """The middleware binds "none" whatever was bound before."""
    token = set_current(ACME)
    assert token.old_value is not ACME
    set_current(None)
    with pytest.raises(NoTenantError):
        current_tenant()


def test_a_deadline_that_ends_in_another_context_does_nothing() -> None:
    """As a binding does: the event loop may close an async generator in one."""
    reset_deadline(Context().run(set_deadline, 1.0))
    assert current_deadline() == math.inf
