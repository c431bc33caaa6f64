"""Admissions: what ends one, who is called, and when the control database is queried."""

from __future__ import annotations

import asyncio
import gc
import inspect
import warnings
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import replace
from ipaddress import ip_network
from typing import Any
from uuid import UUID

import pytest

from tenancy_orm.authentication import admission as admission_module
from tenancy_orm.authentication.admission import Admission, AdmissionEnd, CredentialState, tenant_for_source
from tenancy_orm.authentication.admissions import Admissions
from tenancy_orm.errors import (
    AdmissionEndedError,
    ControlUnavailableError,
    TenancyError,
    TenantDeletedError,
    TenantMaintenanceError,
    TenantNotFoundError,
    TenantSuspendedError,
)
from tenancy_orm.tenant import Status, Tenant
from tests.support.control import Clock
from tests.support.waiting import until

ACME = Tenant(UUID(int=1), "acme", Status.ACTIVE, "free")
GRACE = 100.0
HERE, THERE = ip_network("192.0.2.0/24"), ip_network("198.51.100.0/24")


def state(**more: Any) -> CredentialState:
    """Return the state of a valid key."""
    fields: dict[str, Any] = {"credential_id": "key", "tenant": ACME, "read_at": 1_000.0, "secret": ("1", b"digest")}
    return CredentialState(**{**fields, **more})


class Registry:
    """A control database: the states that it returns, and the look-ups that it got."""

    def __init__(self) -> None:
        self.known: dict[str, CredentialState] = {}
        self.asked: list[str] = []
        self.unavailable = False
        self.listening = True
        self.contexts: list[object] = []

    async def look_up(self, granted: CredentialState) -> CredentialState | None:
        """Return the state."""
        credential_id = granted.credential_id
        self.asked.append(credential_id)
        self.contexts.append(_ambient.get())
        await asyncio.sleep(0)
        if self.unavailable:
            raise ControlUnavailableError("unavailable")
        return self.known.get(credential_id)


_ambient: ContextVar[object] = ContextVar("ambient", default=None)


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def admissions(registry: Registry, clock: Clock) -> AsyncIterator[Admissions]:
    opened = Admissions(registry.look_up, is_listening=lambda: registry.listening, ttl=0.01, grace=GRACE, clock=clock)
    opened.open()
    yield opened
    await opened.close()


def refusal(admission: Admission) -> TenancyError | None:
    """Return the error that it raises, if any."""
    try:
        admission.check()
    except TenancyError as error:
        return error
    return None


# --- what ends one --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granted", "now", "reason"),
    [
        ({}, None, "unknown"),
        ({}, {"revoked": True}, "revoked"),
        ({}, {"expires": 1_000.0}, "expired"),
        ({"expires": 2_000.0}, {"expires": 999.0}, "expired"),
        ({}, {"tenant": replace(ACME, id=UUID(int=2))}, "tenant"),
        ({}, {"secret": ("1", b"another")}, "secret"),
        ({"scopes": frozenset({"a", "b"})}, {"scopes": frozenset({"a"})}, "scope"),
        ({"scopes": frozenset({"*"})}, {"scopes": frozenset({"a"})}, "scope"),
        ({}, {"networks": (HERE,)}, "network"),
    ],
)
async def test_a_credential_that_does_not_hold_ends_it(
    admissions: Admissions, granted: dict[str, Any], now: dict[str, Any] | None, reason: str
) -> None:
    """Its use raises one error; only operators get the reason."""
    admission = admissions.admit(state(**granted))
    assert refusal(admission) is None
    admission.verify(None if now is None else state(**now))
    error = refusal(admission)
    assert isinstance(error, AdmissionEndedError)
    assert (error.reason, error.credential_id) == (reason, "key")
    assert reason not in str(error) or reason == "tenant"
    assert "its own context" in str(error)
    assert refusal(admission) is not error, "two must not share a traceback"


@pytest.mark.parametrize(
    ("granted", "now"),
    [
        ({}, {}),
        ({}, {"tenant": replace(ACME, slug="renamed", tier="pro", status=Status.TRIAL)}),
        ({"scopes": frozenset({"a"})}, {"scopes": frozenset({"a", "b"})}),
        ({"scopes": frozenset({"a"})}, {"scopes": frozenset({"*"})}),
        ({}, {"secret": ("2", b"another")}),
        ({"expires": 2_000.0}, {"expires": 3_000.0}),
        ({"expires": 2_000.0}, {"expires": None}),
        ({"networks": (HERE,)}, {"networks": (HERE,)}),
        ({"networks": (HERE,)}, {"networks": ()}),
    ],
)
async def test_what_still_holds_goes_on(admissions: Admissions, granted: dict[str, Any], now: dict[str, Any]) -> None:
    """Whatever else changed of the credential or of its tenant."""
    admission = admissions.admit(state(**granted))
    admission.verify(state(**now))
    assert refusal(admission) is None


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (Status.SUSPENDED, TenantSuspendedError),
        (Status.DELETED, TenantDeletedError),
        (Status.MAINTENANCE, TenantMaintenanceError),
        (Status.PURGED, TenantNotFoundError),
    ],
)
async def test_a_tenants_status_ends_it(admissions: Admissions, status: Status, error: type[TenancyError]) -> None:
    """By the error that its sessions are refused with."""
    admission = admissions.admit(state())
    admission.verify(state(tenant=replace(ACME, status=status)))
    assert type(refusal(admission)) is error
    assert admission.ended is not None
    assert (admission.ended.reason, admission.ended.by_status) == (status.value, True)


async def test_who_was_let_in_during_maintenance_is_an_operator(admissions: Admissions) -> None:
    """Nobody else is."""
    admission = admissions.admit(state(tenant=replace(ACME, status=Status.MAINTENANCE)))
    admission.verify(state(tenant=replace(ACME, status=Status.MAINTENANCE)))
    assert refusal(admission) is None
    admission.verify(state(tenant=replace(ACME, status=Status.SUSPENDED)))
    assert isinstance(refusal(admission), TenantSuspendedError)


async def test_networks_count_for_each_source(admissions: Admissions) -> None:
    """A shared admission ends as soon as its source matters."""
    shared = admissions.admit(state())
    here, there = shared.for_source("192.0.2.1"), shared.for_source("198.51.100.1")
    assert here.for_source("192.0.2.1") is here
    for admission in (shared, here, there):
        admission.verify(state(networks=(HERE,)))
    assert [admission.ended is None for admission in (shared, here, there)] == [False, True, False]
    here.verify(state(networks=(THERE,)))
    assert here.ended is not None


async def test_an_upgraded_digest_is_the_secret_from_then_on(admissions: Admissions) -> None:
    """Another digest of that version is another secret."""
    admission = admissions.admit(state())
    admission.verify(state(secret=("2", b"same secret")))
    assert refusal(admission) is None
    admission.verify(state(secret=("2", b"another")))
    assert refusal(admission) is not None


async def test_an_older_answer_says_nothing(admissions: Admissions) -> None:
    """What was asked before it was granted cannot end it."""
    admission = admissions.admit(state())
    admission.verify(state(read_at=999.0, revoked=True))
    assert refusal(admission) is None


async def test_its_time_ends_it_when_it_is_used(admissions: Admissions, clock: Clock) -> None:
    """Nothing notifies that, and no timer runs for what nobody watches."""
    admission = admissions.admit(state(expires=1_010.0))
    assert refusal(admission) is None
    clock.now = 1_010.0
    error = refusal(admission)
    assert isinstance(error, AdmissionEndedError)
    assert error.reason == "expired"


async def test_one_source_s_admission_ends_where_all_have(admissions: Admissions) -> None:
    """A websocket that opens with what has ended by then is refused."""
    admission = admissions.admit(state())
    admission.verify(None)
    tenant = tenant_for_source(replace(ACME, admission=admission), "192.0.2.1")
    assert tenant.admission is not admission
    with pytest.raises(AdmissionEndedError):
        assert tenant.admission is not None
        tenant.admission.check()
    assert tenant_for_source(ACME, "192.0.2.1") is ACME


# --- who is called --------------------------------------------------------------------------------------------------


async def test_watchers_are_called_once(admissions: Admissions) -> None:
    """One that fails does not keep the others open, and nothing of them is left."""
    admission = admissions.admit(state())
    called: list[str] = []

    def failing(ended: AdmissionEnd) -> None:
        raise ZeroDivisionError

    assert admission.watch(failing) is None
    admission.watch(lambda ended: called.append(ended.reason))
    assert admissions.watched == 1
    admission.verify(state(revoked=True))
    admission.verify(None)
    assert called == ["revoked"]
    assert (admissions.watched, admission.watched) == (0, False)


async def test_whoever_watches_too_late_is_answered_why(admissions: Admissions, clock: Clock) -> None:
    """Between look-up and registration it may have ended."""
    revoked, expired = admissions.admit(state()), admissions.admit(state(expires=1_010.0))
    revoked.verify(state(revoked=True))
    clock.now = 1_010.0
    assert [ended and ended.reason for ended in (revoked.watch(print), expired.watch(print))] == ["revoked", "expired"]
    assert admissions.watched == 0


async def test_what_is_watched_ends_at_its_time(admissions: Admissions, clock: Clock) -> None:
    """Also where that time was changed while it was watched."""
    admission = admissions.admit(state(expires=1_000.02))
    called: list[str] = []
    admission.watch(lambda ended: called.append(ended.reason))
    admission.verify(state(expires=1_000.01))
    clock.now = 1_000.01
    await until(lambda: called == ["expired"])


async def test_nothing_is_left_of_what_was_watched(admissions: Admissions) -> None:
    """Neither a registration nor a timer."""
    admission = admissions.admit(state(expires=5_000.0))
    watchers = [lambda ended: None for _ in range(3)]
    for watcher in watchers:
        admission.watch(watcher)
    for watcher in watchers:
        admission.unwatch(watcher)
    assert admissions.watched == 0
    del admission
    gc.collect()
    assert len(admissions) == 0


# --- what is asked --------------------------------------------------------------------------------------------------


async def test_a_change_is_asked_about_for_what_is_in_use(admissions: Admissions, registry: Registry) -> None:
    """By credential or by tenant, once for all that share it, and in nobody's context."""
    token = _ambient.set("a request's")
    first = admissions.admit(state())
    second = admissions.admit(state())
    admissions.admit(state(credential_id="gone"))
    other = admissions.admit(state(credential_id="other", tenant=replace(ACME, id=UUID(int=2))))
    admissions.verify("key")
    admissions.verify("gone")
    admissions.verify(UUID(int=9))
    await until(lambda: first.ended and second.ended)
    assert registry.asked == ["key"]
    admissions.verify(UUID(int=2))
    await until(lambda: other.ended)
    assert registry.asked == ["key", "other"]
    assert registry.contexts == [None, None]
    _ambient.reset(token)


async def test_what_holds_is_asked_about_again(admissions: Admissions, registry: Registry) -> None:
    """Each change counts, also one that comes while the answer to another is awaited."""
    registry.known["key"] = state()
    admission = admissions.admit(state())
    admissions.verify("key")
    await until(lambda: registry.asked)
    registry.known["key"] = state(revoked=True)
    admissions.verify("key")
    await until(lambda: admission.ended)


async def test_without_an_answer_it_goes_on_and_is_asked_about_later(
    admissions: Admissions, registry: Registry
) -> None:
    """Nobody can revoke anything while the control database does not answer."""
    registry.unavailable = True
    admission = admissions.admit(state())
    admissions.verify("key")
    await until(lambda: registry.asked)
    assert refusal(admission) is None
    registry.unavailable = False
    await until(lambda: admission.ended)


async def asked_again(registry: Registry) -> None:
    """Wait until failed verifications were tried again; ``listening``, so that nothing else verifies."""
    assert registry.listening
    before = len(registry.asked)
    await until(lambda: len(registry.asked) >= before + 2)


@pytest.mark.parametrize("why", ["a change", "a silence"])
async def test_what_is_watched_and_cannot_be_verified_for_too_long_ends(
    admissions: Admissions, registry: Registry, clock: Clock, why: str
) -> None:
    """Only this process may have lost the control database; notifications may still arrive on another connection."""
    registry.unavailable = True
    watched, used = admissions.admit(state()), admissions.admit(state())
    called: list[str] = []
    watched.watch(lambda ended: called.append(ended.reason))
    if why == "a change":
        admissions.verify("key")
    else:
        admissions.verify_all()
    await until(lambda: registry.asked)
    clock.now += GRACE
    await asked_again(registry)
    assert called == []
    clock.now += 1.0
    await until(lambda: called == ["unverified"])
    error = refusal(watched)
    assert isinstance(error, AdmissionEndedError)
    assert "unverified" not in str(error)
    assert used.ended is None


async def test_what_could_be_verified_has_its_time_again(
    admissions: Admissions, registry: Registry, clock: Clock
) -> None:
    """It counts from the last answer."""
    admission = admissions.admit(state())
    admission.watch(lambda ended: None)
    registry.listening = False
    clock.now += 2 * GRACE
    registry.known["key"] = state(read_at=clock.now)
    await until(lambda: admission.verified == clock.now)
    registry.unavailable = True
    await until(lambda: admissions._failed)
    registry.listening = True
    await asked_again(registry)
    assert admission.ended is None
    assert admission.for_source("192.0.2.1").verified == clock.now


async def test_what_was_open_for_long_outlives_a_short_absence(
    admissions: Admissions, registry: Registry, clock: Clock
) -> None:
    """While notifications arrive nothing is verified, and nothing has to be."""
    admission = admissions.admit(state())
    admission.watch(lambda ended: None)
    clock.now += 100 * GRACE
    await until(lambda: admissions._listening_at == clock.now)
    registry.unavailable = True
    admissions.verify_all()
    await asked_again(registry)
    assert admission.ended is None
    clock.now += GRACE + 1.0
    await until(lambda: admission.ended)


async def test_what_was_let_in_before_a_silence_is_asked_about_when_it_is_watched(
    admissions: Admissions, registry: Registry
) -> None:
    """Nobody asked before."""
    admission = admissions.admit(state())
    admissions.verify_all()
    assert admission.watch(lambda ended: None) is None
    await until(lambda: admission.ended)


async def test_one_task_tries_again_however_often_it_is_asked(admissions: Admissions, registry: Registry) -> None:
    """Or an absence would start one after the other."""
    registry.unavailable, registry.listening = True, False
    admission = admissions.admit(state())
    admission.watch(lambda ended: None)
    await until(lambda: len(registry.asked) >= 20)
    await until(lambda: len(admissions._tasks) == 2)
    registry.listening, registry.unavailable = True, False
    await until(lambda: admission.ended)
    await until(lambda: len(admissions._tasks) == 1)
    assert (admissions._failed, admissions._unverified) == (set(), {})


def test_an_admission_does_not_know_who_keeps_it() -> None:
    """Imports point one way, also those that only a type checker sees."""
    assert "import Admissions" not in inspect.getsource(admission_module)


async def test_nothing_is_begun_after_the_end(admissions: Admissions, registry: Registry) -> None:
    """A change notified during the closing is not verified, and leaves no coroutine that nobody awaits."""
    kept = admissions.admit(state())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        admissions.verify(kept.granted.credential_id)
        await admissions.close()
        admissions.open()
        await asyncio.sleep(0)
        gc.collect()
    assert (registry.asked, [str(warning.message) for warning in caught]) == ([], [])
    assert not admissions._tasks


async def test_what_nobody_uses_is_not_asked_about_again(admissions: Admissions, registry: Registry) -> None:
    """Or a process would ask for ever."""
    registry.unavailable = True
    admission = admissions.admit(state())
    admissions.verify("key")
    await until(lambda: registry.asked)
    del admission
    gc.collect()
    await until(lambda: not admissions._due and len(admissions._tasks) == 1)
    assert registry.asked == ["key"]


async def test_after_a_silence_what_is_watched_is_asked_about_and_the_rest_when_used(
    admissions: Admissions, registry: Registry
) -> None:
    """Not the whole memory of a process at once."""
    watched, used, idle = (admissions.admit(state(credential_id=name)) for name in ("watched", "used", "idle"))
    watched.watch(lambda ended: None)
    admissions.verify_all()
    await until(lambda: watched.ended)
    assert registry.asked == ["watched"]
    assert refusal(used) is None
    assert refusal(used) is None
    await until(lambda: used.ended)
    assert registry.asked == ["watched", "used"]
    assert idle.ended is None


async def test_while_nothing_is_received_what_is_watched_is_asked_about_every_ttl(
    admissions: Admissions, registry: Registry
) -> None:
    """Not while notifications arrive."""
    registry.known["key"] = state()
    admission = admissions.admit(state())
    admission.watch(lambda ended: None)
    assert registry.asked == []
    registry.listening = False
    await until(lambda: len(registry.asked) >= 3)
    registry.known["key"] = state(revoked=True)
    await until(lambda: admission.ended)


async def test_many_are_asked_about_page_by_page(admissions: Admissions, registry: Registry) -> None:
    """All of a tenant's, however many."""
    kept = [admissions.admit(state(credential_id=str(number))) for number in range(450)]
    assert len(admissions) == 450
    admissions.verify(ACME.id)
    await until(lambda: all(admission.ended for admission in kept))
    assert len(registry.asked) == 450
