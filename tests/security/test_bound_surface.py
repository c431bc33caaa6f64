"""While a tenant is bound, no part of the public surface acts on another, or on all of them (CWE-639).

Parts and methods are enumerated by themselves, from ``Tenancy`` with its properties and the fields of ``Internals``:
what is added later is tried as well, and fails here until it refuses or is excused with a reason. So is what a part's
method or property returns by its annotation, obtained while nobody was bound; and each public function, or method
beside the parts, that takes a tenant.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pkgutil
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, cast, get_args, get_type_hints

import pytest
import pytest_asyncio
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig, tenant_prefix
from tenancy_orm.adoption import FleetAdoption, RowsAdoption
from tenancy_orm.authentication.invitation_rows import Invitation
from tenancy_orm.backups import BackupKeys, Store
from tenancy_orm.config import BackupConfig, MeteringConfig
from tenancy_orm.context import current_tenant_or_none
from tenancy_orm.control.notifications import ConnectionRequest, LeaseCall
from tenancy_orm.errors import ApiKeyNotFoundError, CrossTenantError, TenancyError
from tenancy_orm.events import EventBus
from tenancy_orm.exports import ExportStream
from tenancy_orm.internals import Internals
from tenancy_orm.jobs import Claimant, ClaimedJob
from tenancy_orm.protocols import UsageRecord
from tenancy_orm.provisioning import TemplateManager
from tenancy_orm.provisioning.copies.extensions import Extensions
from tenancy_orm.provisioning.copies.making import Copies
from tenancy_orm.provisioning.creation.new_databases import NewDatabase, NewDatabases
from tenancy_orm.provisioning.logins.copy_logins import CopyLogin
from tenancy_orm.provisioning.logins.readers import Reader, Readers
from tenancy_orm.provisioning.logins.temporary_logins import TemporaryLogins
from tenancy_orm.provisioning.templates.scratch import ScratchDatabases
from tenancy_orm.provisioning.watchdog import Watchdog
from tenancy_orm.queries import FleetQuery
from tenancy_orm.quotas import holds
from tenancy_orm.quotas.blocks import BlockManager, LeasedQuota
from tenancy_orm.quotas.holds import HoldManager
from tenancy_orm.registry.databases import TenantDatabase
from tenancy_orm.registry.rows import TenantDraft, uuid7
from tenancy_orm.restores import DumpSource
from tenancy_orm.restores.recovery import PointInTime, Recovery, RecoveryRequest
from tenancy_orm.routing.sessions import ConnectionContext, SessionContext
from tenancy_orm.schedules.manager import DueTenants
from tenancy_orm.scopes import BoundTenants
from tenancy_orm.servers import Server
from tenancy_orm.sync.sessions import EachAnswer, EachTenant
from tenancy_orm.tenant import Placement, Tenant
from tenancy_orm.worker import Worker
from tests.support.models import Base
from tests.support.postgres import Postgres
from tests.support.waiting import until

EXCUSED = {
    "audit.vouch_for_keys": "writes the configured keys' public halves, nothing of a tenant's",
    "audit.add_keys": "keys of the installation",
    "audit.verifier": "reads public keys",
    "config.from_env": "reads no tenant",
    "config.settings_customise_sources": "reads no tenant",
    "config.replace": "reads no tenant",
    "events.cancel": "ends the application's own subscribers",
    "events.drain": "waits for the application's own subscribers",
    "events.emit": "calls the application's own subscribers",
    "events.discard_tasks": "drops what a closed event loop left of the application's own subscribers",
    "events.subscribe": "registers a callback of the application's",
    "events.has_subscribers": "says whether the application has subscribed",
    "internals.control.check_names": "compares two names that it has already",
    "internals.control.close": "closes connections",
    "internals.control.connect": "plain SQL on the control database, which is an operator's by nature",
    "internals.control.fetch": "as control.connect",
    "internals.control.open": "reads the schema's revision",
    "internals.control.revision": "reads the schema's revision",
    "internals.control.transaction": "as control.connect",
    "internals.directory.close": "closes connections",
    "internals.directory.invalidate": "forgets what is looked up again",
    "internals.directory.on_invalidate": "registers a callback",
    "internals.directory.before_use": "registers a callback",
    "internals.directory.judge_by": "registers a callback",
    "internals.directory.look_again": "forgets what is looked up again",
    "internals.directory.invalidate_subject": "forgets what is looked up again",
    "internals.directory.verify_issuer": "verifies what is open",
    "internals.directory.report_refused": "reports, for the middleware",
    "internals.rates.acquire_address": "counts requests of an address",
    "internals.directory.on_schema_change": "registers a callback",
    "internals.directory.on_pause": "registers a callback",
    "internals.directory.is_key": "looks at a text alone",
    "internals.directory.on_connection_request": "registers a callback",
    "internals.directory.on_lease_call": "registers a callback",
    "internals.directory.on_server_change": "registers a callback",
    "internals.leases.close": "gives this process's own connections back",
    "internals.leases.lease": "counts this process's own connections",
    "internals.leases.open": "asks for this process's own connections",
    "internals.leases.open_like": "takes a first part for this process, for a test",
    "internals.leases.renewed": "waits until this process may open connections",
    "internals.directory.open": "begins to listen",
    "internals.directory.report_cross_tenant": "reports, for the middleware",
    "internals.directory.revalidate": "looks up again",
    "internals.provisioner.close": "closes connections",
    "internals.provisioner.watchdog.close": "closes connections",
    "internals.provisioner.new_databases.new_name": "returns a random name",
    "internals.rates.rate": "computes from the Tenant that it is given",
    "internals.router.close": "closes connections",
    "internals.router.retire": "closes idle connections, which are opened again",
    "internals.router.server_changed": "closes connections to an address that is not in use any more",
    "internals.router.statistics": "counts this process's own connections",
    "internals.servers.apply": "takes over rows that the caller has read",
    "internals.servers.close": "closes nothing",
    "internals.servers.follow": "says where rows are read from",
    "internals.servers.get": "returns an address of the configuration",
    "internals.servers.items": "returns addresses of the configuration",
    "internals.servers.keys": "returns names of the configuration",
    "internals.servers.make": "connects to nothing",
    "internals.servers.on_change": "registers a callback",
    "internals.servers.refresh_soon": "reads rows, unbound",
    "internals.servers.values": "returns addresses of the configuration",
    "internals.task_signer.add_keys": "keys of the installation",
    "members.close": "writes what is counted already",
    "migrations.environment": "loads the migration directory",
    "quotas.close": "closes connections",
    "quotas.invalidate": "forgets what is looked up again",
    "secrets.close": "closes connections",
    "seeds.configured": "loads what the configuration names",
    "sync.call": "awaits a function of the caller's; the package's own refuse by themselves",
    "sync.close": "closes connections",
    "sync.open": "opens nothing where it is open",
    "tiers.in_force": "tiers are nobody's own, and tenants may know them",
    "tiers.limits_and_weights": "tiers are nobody's own, and tenants may know them",
    "tiers.weights": "tiers are nobody's own, and tenants may know them",
    "tenancy.close": "ends what this process has opened",
    "tenancy.job": "registers a function of the application's, which runs unbound",
    "tenancy.lifespan": "opens nothing where it is open",
    "tenancy.on_create": "registers a function of the application's, which runs for new tenants",
    "tenancy.open": "opens nothing where it is open",
    "warm_pool.close": "ends what makes databases",
    "warm_pool.refill_soon": "makes databases that are no tenant's, unbound",
}

HELD_EXCUSED = {
    "internals.provisioner.warm_pool": "is tried as warm_pool",
    "internals.directory.admissions": "ends what no longer holds, and names no tenant",
    "internals.directory.subjects": "answers the middleware, about the credential that it is given",
}

TAKE_NO_SLUG = {
    "internals.router",
    "internals.provisioner",
    "internals.provisioner.copies",
    "internals.provisioner.logins",
    "internals.provisioner.new_databases",
    "internals.provisioner.readers",
    "internals.rates",
}


OWN_CONNECTIONS = "counts this process's own connections"
SHOWS_WHAT_IT_HOLDS = "returns what it has been made with"

RETURNED_EXCUSED = {
    "backups.stores.Store.delete": "removes by ``remove``, path by path",
    "connections.lease.Lease.apply": OWN_CONNECTIONS,
    "connections.lease.Lease.ask": OWN_CONNECTIONS,
    "connections.lease.Lease.attach": OWN_CONNECTIONS,
    "connections.lease.Lease.demand": OWN_CONNECTIONS,
    "connections.lease.Lease.explain": OWN_CONNECTIONS,
    "connections.lease.Lease.learn": OWN_CONNECTIONS,
    "connections.lease.Lease.lose": OWN_CONNECTIONS,
    "connections.lease.Lease.recount": OWN_CONNECTIONS,
    "connections.lease.Lease.remember": OWN_CONNECTIONS,
    "connections.lease.Lease.renewed": OWN_CONNECTIONS,
    "provisioning.logins.copy_logins.CopyLogin.environment": SHOWS_WHAT_IT_HOLDS,
    "provisioning.logins.readers.Reader.environment": SHOWS_WHAT_IT_HOLDS,
    "queries.FleetQuery.__aenter__": "returns itself",
    "queries.FleetQuery.aclose": "ends its own queries",
    "queries.FleetQuery.stop": "ends its own queries",
    "quotas.blocks.LeasedQuota.expire": "makes the next use of it ask again",
    "quotas.blocks.LeasedQuota.return_pending": "gives back what was given back already, as the heartbeat does",
    "quotas.blocks.LeasedQuota.was_idle": "says whether this process has used it",
    "restores.recovery.point_in_time.PointInTime.describe": SHOWS_WHAT_IT_HOLDS,
    "routing.engines.Lease.__aenter__": "counts a use of the engine, which refuses to connect; see below",
    "routing.sessions.SessionContext.__aenter__": "opens a session, which refuses its first statement; see below",
    "schedules.manager.DueTenants.release": "ends its own binding",
    "scopes.BoundTenants.release": "ends its own binding",
    "seeds.definition.Seed.__call__": "calls a function of the application's",
    "servers.server.Server.close": "ends what it does in the background",
    "servers.server.Server.inspect": "returns facts of the server, which are no tenant's",
    "servers.server.Server.learn": "reads settings, over a connection of the caller's",
    "servers.server.Server.no_standby": "returns an error",
    "servers.server.Server.read_again_if_old": "reads settings, unbound",
    "servers.server.Server.read_settings": "reads settings, over a connection of the caller's",
    "servers.server.Server.standby_proof": "returns a statement",
    "servers.server.Server.tenant_startup": "returns settings of the configuration",
    "servers.server.Server.tenant_url": "returns an address of the configuration, without a password",
    "servers.server.Server.unavailable": "returns an error",
    "sync.sessions.EachAnswer.__enter__": "returns itself",
    "sync.sessions.EachTenant.release": "ends its own binding",
    "worker.Worker.stop": "ends its own jobs",
}

COMPARES = "compares the tenant that the request's credential has named"
BELOW_THE_PARTS = "no part hands it out; those that use it are tried"

PUBLIC_EXCUSED = {
    "tenancy_orm.adoption.AdoptionPlan.keyed": "adds a line to a plan",
    "tenancy_orm.asgi.HeaderResolver.matches": COMPARES,
    "tenancy_orm.asgi.HeaderResolver.redirect_url": COMPARES,
    "tenancy_orm.asgi.PathPrefixResolver.matches": COMPARES,
    "tenancy_orm.asgi.PathPrefixResolver.redirect_url": COMPARES,
    "tenancy_orm.asgi.SubdomainResolver.matches": COMPARES,
    "tenancy_orm.asgi.SubdomainResolver.redirect_url": COMPARES,
    "tenancy_orm.asgi.TenantResolver.matches": COMPARES,
    "tenancy_orm.asgi.TenantResolver.redirect_url": COMPARES,
    "tenancy_orm.asgi.problem_for": "makes a document of an error",
    "tenancy_orm.drift.DriftDetector.run": BELOW_THE_PARTS,
    "tenancy_orm.drift.DriftProgress.done": "counts",
    "tenancy_orm.exports.ErasureCertificate.sign": "signs what it is given, with a key that it is given",
    "tenancy_orm.operations.Operations.begin": BELOW_THE_PARTS,
    "tenancy_orm.operations.Operations.list": BELOW_THE_PARTS,
    "tenancy_orm.operations.Operations.record_again": BELOW_THE_PARTS,
    "tenancy_orm.operations.Switch.pause": BELOW_THE_PARTS,
    "tenancy_orm.runs.waves.Wave.meets": "looks at the Tenant that it is given",
    "tenancy_orm.runs.waves.Waves.assign": "sorts the tenants that it is given",
    "tenancy_orm.secrets.keyring.Keyring.open_password": BELOW_THE_PARTS,
    "tenancy_orm.secrets.keyring.Keyring.seal_password": BELOW_THE_PARTS,
}


class _Sender:
    """Takes usage records, so that there is an exporter."""

    async def send(self, record: UsageRecord) -> bool:
        return True

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class Plane:
    """Two tenants; ``key``, ``key_id`` and ``invitation`` are the second one's."""

    tenancy: Tenancy
    acme: Tenant
    globex: Tenant
    key: str
    key_id: str
    invitation: Invitation | None = None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plane(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plane]:
    """One installation for all that is refused, since what is refused changes nothing."""
    name = postgres.new_name()
    prefix = f"b{secrets.token_hex(4)}"
    config = TenancyConfig(
        control_url=await postgres.create_database(name),
        servers={"default": postgres.admin_url},
        metadata=Base.metadata,
        encryption_keys={"1": "a2V5" * 10 + "a2U="},
        name_prefix=prefix,
        metering=MeteringConfig(usage_sender=_Sender()),
        backup=BackupConfig(store=f"file:{tmp_path_factory.mktemp('store')}"),
    )
    tenancy = Tenancy(config)
    await tenancy.open(initialise=True)
    try:
        acme, globex = await tenancy.tenants.create("acme"), await tenancy.tenants.create("globex")
        # known to the directory: an answer from memory must be refused like any other
        await tenancy.internals.directory.authenticate(globex.api_key)
        invitation = await tenancy.members.invite("globex")
        yield Plane(tenancy, acme.tenant, globex.tenant, globex.api_key, globex.key_id, invitation)
    finally:
        await tenancy.close()
        await postgres.drop_all(prefix)
        await postgres.drop_database(name)


def parts() -> dict[str, type]:
    """The classes of everything that an open ``Tenancy`` hands out, by dotted name."""
    below = {f"internals.{name}": kind for name, kind in handed_out(Internals).items()}
    held: dict[str, type] = {
        "copies": Copies,
        "extensions": Extensions,
        "logins": TemporaryLogins,
        "new_databases": NewDatabases,
        "readers": Readers,
        "scratch_databases": ScratchDatabases,
        "templates": TemplateManager,
        "watchdog": Watchdog,
    }
    held = {f"internals.provisioner.{name}": kind for name, kind in held.items()}
    held["backups.keys"] = BackupKeys
    held |= {"adoption.rows": RowsAdoption, "adoption.fleet": FleetAdoption}
    return {"tenancy": Tenancy, "events": EventBus, **held, **handed_out(Tenancy), **below}


def part_of(tenancy: Tenancy, name: str) -> Any:
    """The part with this dotted name."""
    return tenancy if name == "tenancy" else attrgetter(name)(tenancy)


def handed_out(holder: type) -> dict[str, type]:
    """The package's classes that are behind the public properties and fields of a class, by name."""
    kinds = get_type_hints(holder)
    for name, member in vars(holder).items():
        if isinstance(member, property):
            kinds[name] = get_type_hints(member.fget).get("return")
    return {
        name: kind
        for name, kind in kinds.items()
        if not name.startswith("_") and inspect.isclass(kind) and kind.__module__.startswith("tenancy_orm.")
    }


def surface() -> Iterator[Any]:
    """Every public method of every part."""
    for part, kind in parts().items():
        for name, method in inspect.getmembers(kind, inspect.isroutine):
            # the configuration has pydantic's methods as well, which know no tenants
            if not name.startswith("_") and not (method.__module__ or "").startswith("pydantic"):
                yield pytest.param(part, name, method, id=f"{part}.{name}")


SURFACE = list(surface())
TRIED = [param for param in SURFACE if param.id not in EXCUSED]


def _request(tenant: Tenant) -> ConnectionRequest:
    return ConnectionRequest("another process", "default", tenant.id, has_none=True)


def names(plane: Plane, parameter: str) -> tuple[Any, ...]:
    """The ways in which a parameter can name the other tenant."""
    globex = plane.globex
    many = {
        "tenant": (globex, globex.id, str(globex.id), globex.slug),
        "ref": (globex, globex.id, str(globex.id), globex.slug),
        "tenant_id": (globex.id,),
        "listed": (globex,),
        "key_id": (plane.key_id,),
        "invitation_id": (plane.invitation.id, str(plane.invitation.id)) if plane.invitation else (),
        "text": (plane.invitation.text,) if plane.invitation else (),
        "key": (plane.key,),
        "values": ({globex.id: 1},),
        "tenants": ([globex.slug], None),
        "request": (_request(globex),),
        "requests": ([_request(globex)],),
        "call": (LeaseCall("default", frozenset()),),
        "beside": (TenantDatabase(server="default", name="x", tenant_id=globex.id, role="x", state="kept"),),
    }
    return many.get(parameter, ())


def others(plane: Plane) -> dict[str, Any]:
    """What methods need besides, by parameter."""
    tenant_id = uuid7()
    return {
        "command": "upgrade",
        "subject": "alice",
        "resource": "users",
        "overrides": {"users": 9},
        "value": 1,
        "slug": "globex",
        "domain": "taken.example",
        "at": datetime(2099, 1, 1, tzinfo=UTC),
        "ttl": timedelta(days=1),
        "ends_at": datetime(2099, 1, 1, tzinfo=UTC),
        "before": datetime(2020, 1, 1, tzinfo=UTC),
        "reason": None,
        "configured": {},
        "record_ids": [1],
        "seconds": 60.0,
        "timeout": 60.0,
        "valid_for": 60.0,
        "redirect_seconds": 0.0,
        "retention_seconds": 0.0,
        "action": "x.y",
        "connection": None,
        "revision": "head",
        "run": 1,
        "plan": None,
        "environment": None,
        "options": {},
        "server": "default",
        "name": "default",
        "database": "postgres",
        "function": print,
        "draft": TenantDraft(
            id=tenant_id, slug="x", tier="free", server="default", database="x", role="x", sealed_password=b""
        ),
        "step": "role",
        "error": "x",
        "target": None,
        "role": "x",
        "detail": {},
        "metadata": {"customer": "cus_1"},
        "every": 60.0,
        "addresses": {},
        "names": ("vector",),
        "claimant": Claimant(),
        "job": ClaimedJob("housekeeping", Claimant(), 0),
        "after": 60.0,
        "weights": {"free": 100.0},
        "parts": ("taskiq", "report", "1"),
        "signature": "A" * 43,
        "func": print,
        "to": Placement("default", "x", "x", b""),
        "kept_until": None,
        "placement": Placement("default", "x", "x", b""),
        "allowed": False,
        "number": 1,
        "source": DumpSource(Path("dump")),
        "url": "postgresql://reader@127.0.0.1:1/old",
        "state": {},
        "operation": 1,
        "audit": None,
        "until": None,
        "backup": uuid7(),
        "backup_id": uuid7(),
        "store": None,
        "path": "/nowhere/acme.zip",
        "certificate": b"{}",
        "sql": "SELECT 1",
        "statement": "SELECT 1",
        "password": "x",
        "data": b"x",
        "chunks": [b"x"],
        "prefix": "x",
        "write": swallow,
        "policy": None,
    }


async def swallow(_: bytes) -> None:
    """Take a piece of an export."""


async def call(tenancy: Tenancy, part: str, name: str, arguments: dict[str, Any]) -> Any:
    """Call a method and carry out whatever it returns."""
    return await carry_out(part_of(tenancy, part), name, arguments, in_thread=part == "sync")


async def carry_out(holder: Any, name: str, arguments: dict[str, Any], *, in_thread: bool = False) -> Any:
    """Call a method, in another thread than the loop's if it is one for threads, and carry out whatever it returns."""
    method = partial(call_method, getattr(holder, name), arguments)
    if in_thread:
        return await asyncio.to_thread(method)
    outcome = method()
    if isinstance(outcome, AbstractAsyncContextManager):
        async with outcome:
            return None
    if inspect.isasyncgen(outcome):
        return [item async for item in outcome]
    return await outcome if inspect.isawaitable(outcome) else outcome


def call_method(method: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call it, and carry out what can be without an event loop."""
    left = dict(arguments)
    kinds = {p.name: p.kind for p in inspect.signature(method).parameters.values()}
    positional = [left.pop(name) for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_ONLY]
    outcome = method(*positional, **left)
    if isinstance(outcome, AbstractContextManager) and not isinstance(outcome, AbstractAsyncContextManager):
        with outcome:
            return None
    return list(outcome) if isinstance(outcome, Iterator) else outcome


def calls(plane: Plane, method: Any) -> list[dict[str, Any]]:
    """Arguments for a method: one call for each way to name the other tenant, and one that names none where it can."""
    given = [
        p
        for p in inspect.signature(method).parameters.values()
        if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    naming = [p for p in given if names(plane, p.name) and not (p.name == "key" and p.default is not p.empty)]
    rest = {p.name: others(plane)[p.name] for p in given if p.default is p.empty and p not in naming}
    found = [
        {**rest, p.name: value}
        for p in naming
        for value in names(plane, p.name)
        if p.annotation != "Tenant" or isinstance(value, Tenant)
    ]
    required = {p.name: names(plane, p.name)[0] for p in naming if p.default is p.empty}
    return [{**rest, **required, **one} for one in found or [{}]]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("part", "name", "method"), TRIED)
async def test_a_bound_tenant_reaches_no_other(plane: Plane, part: str, name: str, method: Any) -> None:
    """By slug, id, ``Tenant``, key or key's id; nor does it read or change all tenants."""
    async with plane.tenancy.scope("acme"):
        for arguments in calls(plane, method):
            try:
                answer = await call(plane.tenancy, part, name, arguments)
            except CrossTenantError:
                continue
            # what answers from memory may also say that it does not know
            assert part == "internals.directory" and name == "peek" and answer is None, arguments


@pytest.mark.asyncio(loop_scope="module")
async def test_what_the_parts_hold_in_public_is_enumerated_as_well(plane: Plane) -> None:
    """A part that hands out another object of the package hands out its methods."""
    held = {
        f"{part}.{name}"
        for part in parts()
        if part not in ("config", "tenancy")  # those of ``Tenancy`` are the parts
        for name, value in held_by(part_of(plane.tenancy, part))
        if not name.startswith("_")
        and type(value).__module__.startswith("tenancy_orm.")
        and any(inspect.iscoroutinefunction(member) for _, member in inspect.getmembers(type(value)))
    }
    assert held <= parts().keys() | HELD_EXCUSED.keys()


def held_by(part: object) -> Iterator[tuple[str, Any]]:
    """What an object has in its attributes, slots included."""
    for name in [*getattr(part, "__dict__", ()), *getattr(type(part), "__slots__", ())]:
        yield name, getattr(part, name)


def test_every_excuse_is_needed() -> None:
    """An excuse for something that is gone would excuse its successor."""
    assert set(EXCUSED) <= {param.id for param in SURFACE}
    assert set(RETURNED_EXCUSED) <= {param.id for param in RETURNED}
    assert set(PUBLIC_EXCUSED) <= {param.id for param in PUBLIC}


# --- what the parts return ------------------------------------------------------------------------------------------

_ENTERED = ("__aenter__", "__enter__", "__anext__", "__next__", "__call__")


def returned_classes() -> Iterator[type]:
    """The package's classes that methods, properties and fields of the parts lead to, and those of such classes.

    Only those that do something: with a coroutine function, or that are entered, iterated or called.
    """
    known = {Tenancy, *parts().values()}
    left = list(known)
    while left:
        kind = left.pop()
        hints = [*fields_of(kind), *(returned_by(member) for _, member in members_of(kind))]
        for found in (found for hint in hints for found in classes_in(hint)):
            # a protocol is the application's to implement
            if found not in known and not getattr(found, "_is_protocol", False):
                known.add(found)
                left.append(found)
                if any(is_active(name, member) for name, member in members_of(found)):
                    yield found


def members_of(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that the package has written for a class."""
    for name, member in inspect.getmembers(kind):
        written = member.fget if isinstance(member, property) else member
        public = not name.startswith("_") or name in _ENTERED
        module = getattr(written, "__module__", None) or ""
        if public and inspect.isroutine(written) and module.startswith("tenancy_orm"):
            yield name, member


def is_active(name: str, member: Any) -> bool:
    """Whether a member makes its class more than a value."""
    plain = inspect.unwrap(member) if inspect.isroutine(member) else None
    return name in _ENTERED or inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain)


def returned_by(member: Any) -> Any:
    """What a method or property returns by its annotation; what type checkers alone import is no class of ours."""
    written: Any = member.fget if isinstance(member, property) else member
    plain = inspect.unwrap(written)
    if not isinstance(plain, FunctionType):
        return None
    return evaluated(plain.__annotations__.get("return"), plain.__globals__)


def fields_of(kind: type) -> Iterator[Any]:
    """The annotations of the public fields that the package's classes declare."""
    for base in inspect.getmro(kind):
        if base.__module__.startswith("tenancy_orm."):
            for name, annotation in inspect.get_annotations(base).items():
                if not name.startswith("_"):
                    yield evaluated(annotation, vars(importlib.import_module(base.__module__)))


def evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    """An annotation as an object."""
    only = SimpleNamespace(__annotations__={"it": annotation})
    return get_type_hints(only, names, {"asyncpg": SimpleNamespace(Connection=list, Record=object)})["it"]


def classes_in(hint: Any) -> Iterator[type]:
    """The package's classes in an annotation."""
    if inspect.isclass(hint) and hint.__module__.startswith("tenancy_orm."):
        yield hint
    for argument in get_args(hint):
        for one in argument if isinstance(argument, list) else [argument]:
            yield from classes_in(one)


RETURNED = [
    pytest.param(kind, name, id=f"{kind.__module__.removeprefix('tenancy_orm.')}.{kind.__name__}.{name}")
    for kind in sorted(returned_classes(), key=str)
    for name, member in members_of(kind)
    if not isinstance(member, property)
]


@asynccontextmanager
async def obtained(plane: Plane, kind: type) -> AsyncIterator[Any]:
    """One of a class, of the other tenant or of all, as code can have got hold of it while nobody was bound."""
    tenancy, globex = plane.tenancy, plane.globex
    provisioner, router = tenancy.internals.provisioner, tenancy.internals.router
    if kind is ExportStream:
        async with tenancy.exports.open(globex) as stream:
            yield stream
    elif kind in (Reader, CopyLogin):
        async with provisioner.readers.open(globex, seconds=60.0) as reader:
            yield reader if kind is Reader else reader.login
    elif kind is NewDatabase:
        name = provisioner.new_databases.new_name()
        assert globex.placement is not None
        await tenancy.internals.registry.record_database(
            TenantDatabase(server="default", name=name, tenant_id=globex.id, role=globex.placement.role, state="making")
        )
        async with provisioner.new_databases.open(globex, "default", name, timeout=60.0, valid_for=60.0) as made:
            yield made
    else:
        make: dict[type, Callable[[], Any]] = {
            BoundTenants: tenancy.each,
            ConnectionContext: lambda: router.connection(globex),
            DueTenants: lambda: due_now(tenancy, globex),
            EachAnswer: lambda: tenancy.sync.query_all("SELECT 1"),
            EachTenant: tenancy.sync.each,
            FleetQuery: lambda: tenancy.query_all("SELECT 1"),
            LeasedQuota: lambda: tenancy.quotas.leased(globex, "api_calls"),
            PointInTime: lambda: PointInTime(
                cast("Recovery", Unreachable()),
                RecoveryRequest(
                    tenant_id=globex.id,
                    slug="globex",
                    server="default",
                    database="x",
                    time=datetime.now(UTC),
                    installation=tenancy.internals.control.installation,
                ),
                owner="x",
                role=None,
                description={},
                max_bytes=1,
                client_programs=None,
            ),
            Server: lambda: tenancy.internals.servers["default"],
            SessionContext: lambda: router.session(globex),
            Store: lambda: tenancy.backups.store,
            Worker: tenancy.worker,
        }
        yield await asyncio.to_thread(make[kind]) if kind in (EachAnswer, EachTenant) else make[kind]()


def due_now(tenancy: Tenancy, tenant: Tenant) -> DueTenants:
    """An iterator that has returned a tenant."""
    due = tenancy.schedules.due("report", at="00:00")
    due._current = (tenant, datetime.now(UTC))
    return due


class Unreachable:
    """A provider that must not be asked to recover anything."""

    def recover(self, request: RecoveryRequest) -> Any:
        raise AssertionError(request)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("kind", "name"), [param for param in RETURNED if param.id not in RETURNED_EXCUSED])
async def test_nothing_that_was_obtained_before_reaches_another(plane: Plane, kind: type, name: str) -> None:
    """A stream, a login, a store, an iterator: what it would do, it would do with the package's own rights."""
    async with obtained(plane, kind) as found, plane.tenancy.scope("acme"):
        for arguments in calls(plane, getattr(kind, name)):
            with pytest.raises(CrossTenantError):
                await carry_out(found, name, arguments, in_thread=kind.__module__.startswith("tenancy_orm.sync"))
        assert current_tenant_or_none() == plane.acme


# --- public functions -----------------------------------------------------------------------------------------------

_NAMING = {"tenant", "ref", "slug", "tenant_id", "tenants"}


def documented() -> dict[str, Any]:
    """What the reference documents, by its dotted name; of a module all that ``__all__`` has."""
    found: dict[str, Any] = {}
    for page in sorted((Path(__file__).parents[2] / "docs" / "reference").glob("*.md")):
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE):
            whole = pkgutil.resolve_name(path)
            if inspect.ismodule(whole):
                found |= {f"{path}.{public}": getattr(whole, public) for public in getattr(whole, "__all__", ())}
            else:
                # of a method that is documented by itself its class, which is enumerated whole
                owner, _, _ = path.rpartition(".")
                in_class = inspect.isfunction(whole) and "." in whole.__qualname__
                found |= {owner: pkgutil.resolve_name(owner)} if in_class else {path: whole}
    return found


def public_functions() -> Iterator[Any]:
    """The public functions that take a tenant, and such methods of public classes that are not enumerated above."""
    enumerated = (Tenancy, *parts().values(), *returned_classes())
    for path, found in documented().items():
        methods: dict[str, Any]
        if inspect.isfunction(found):
            methods = {path: found}
        elif inspect.isclass(found) and not any(found in inspect.getmro(kind) for kind in enumerated):
            methods = {f"{path}.{name}": member for name, member in members_of(found) if inspect.isroutine(member)}
        else:
            continue
        for name, method in methods.items():
            if _NAMING & inspect.signature(method).parameters.keys():
                yield pytest.param(name, id=name)


PUBLIC = list(public_functions())


def of_integrations(name: str) -> Callable[..., Any]:
    """A function, or the method of an object that connects to nothing."""
    if name.endswith("tenant_prefix"):
        return tenant_prefix
    module, kind, method = name.rsplit(".", 2)
    made = getattr(importlib.import_module(module), kind)
    if kind == "TenantRedis":
        given = made(importlib.import_module("redis").Redis())
    elif kind == "TenantStore":
        given = made.from_url("memory:///")
    elif kind == "TenantFileSystem":
        given = made(importlib.import_module("fsspec").filesystem("memory"))
    else:
        given = made()
        given.setup("mem://")
    found: Callable[..., Any] = getattr(given, method)
    return found


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", [param for param in PUBLIC if param.id not in PUBLIC_EXCUSED])
async def test_no_public_function_reaches_another(plane: Plane, name: str) -> None:
    """By id or ``Tenant``: the names of caches and files take no slug, bound or not."""
    function = of_integrations(name)
    for ref in (plane.globex, plane.globex.id, str(plane.globex.id)):
        async with plane.tenancy.scope("acme"):
            with pytest.raises(CrossTenantError):
                await carried_out(function(ref))
    if "redis" not in name:  # the others need no server
        await carried_out(function(plane.globex))


async def carried_out(outcome: Any) -> Any:
    """What it is, once that is awaited."""
    return await outcome if inspect.isawaitable(outcome) else outcome


# --- the other side of it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "name", "method"),
    [
        param
        for param in TRIED
        if {"tenant", "key_id", "invitation_id"} & set(inspect.signature(param.values[2]).parameters)
    ],
)
async def test_unbound_it_reaches_every_tenant(tenancy: Tenancy, part: str, name: str, method: Any) -> None:
    """So the calls above are refused because another tenant is bound, and not because they are wrong."""
    globex = await tenancy.tenants.create("globex")
    invitation = await tenancy.members.invite("globex")
    other = Plane(tenancy, globex.tenant, globex.tenant, globex.api_key, globex.key_id, invitation)
    arguments = calls(other, method)[0]
    if part == "audit" and name == "events":
        assert await tenancy.audit.events()
    try:
        await call(tenancy, part, name, arguments)
    except CrossTenantError:
        pytest.fail("nobody was bound")
    except TenancyError:
        pass  # its status does not admit it, or the quota is of another kind: it was reached


async def test_unbound_the_fleet_can_be_read(tenancy: Tenancy) -> None:
    """The same calls are an operator's to make, and answer for everybody."""
    acme, globex = await tenancy.tenants.create("acme"), await tenancy.tenants.create("globex")
    both = {acme.id, globex.id}
    for tenant in both:
        await tenancy.quotas.consume(tenant, "api_calls")
    assert {tenant.id for tenant in (await tenancy.tenants.list()).items} == both
    assert {tenant.id async for tenant in tenancy.tenants.iterate()} == both
    assert both <= {event.tenant_id for event in await tenancy.audit.events()}
    assert {row.tenant_id for row in await tenancy.quotas.utilisation()} == both
    assert {tenant.id for tenant in await tenancy.metrics.active_tenants()} == both


async def test_a_bound_tenant_reaches_itself(tenancy: Tenancy) -> None:
    """By all of its names, in every part: slug, former slug, verified domain, id, id as text, ``Tenant``."""
    created = await tenancy.tenants.create("acme")
    await tenancy.tenants.rename("acme", "acme-corp")
    await verify_domain(tenancy, created.tenant, "acme.example")
    async with tenancy.scope("acme-corp") as tenant:
        for ref in (tenant, tenant.id, str(tenant.id), tenant.id.hex, "acme", "acme-corp", "acme.example"):
            assert [key.key_id for key in await tenancy.keys.list(ref)] == [created.key_id]
            assert (await tenancy.tenants.get(ref)).id == tenant.id
            assert await tenancy.metrics.history(ref) == []
            assert await tenancy.quotas.usage(ref)
            assert [event.action for event in await tenancy.audit.events(tenant=ref, action="tenant.rename")]
            assert [domain.domain for domain in await tenancy.domains.list(ref)] == ["acme.example"]
            async with tenancy.session(ref):
                pass
        assert (await tenancy.keys.revoke(created.key_id)).state == "revoked"
        with pytest.raises(ApiKeyNotFoundError):
            await tenancy.keys.get("0" * 16)


async def verify_domain(tenancy: Tenancy, tenant: Tenant, domain: str) -> None:
    """Make a domain the tenant's, as its TXT record would."""
    await tenancy.domains.claim(tenant, domain)
    async with tenancy.internals.control.transaction() as connection:
        await connection.exec_driver_sql("UPDATE tenancy.domains SET verified_at = now()")
    tenancy.internals.directory.invalidate()


async def test_a_leased_quota_of_another_tenant_is_refused(tenancy: Tenancy) -> None:
    """Also one that code got hold of while nobody was bound, a module's variable say."""
    await tenancy.tenants.create("acme")
    globex = (await tenancy.tenants.create("globex")).tenant
    lease = tenancy.quotas.leased(globex, "api_calls")
    await lease.consume()
    used = next(row.used for row in await tenancy.quotas.usage(globex) if row.resource == "api_calls")
    assert used > 0
    async with tenancy.scope("acme"):
        with pytest.raises(CrossTenantError):
            await lease.consume()
        with pytest.raises(CrossTenantError):
            lease.try_consume()
        with pytest.raises(CrossTenantError):
            await lease.release()
    await lease.release()


async def test_what_was_obtained_before_is_refused(tenancy: Tenancy) -> None:
    """A driver's connection, a prepared statement, an engine and an iterator, all of another tenant or of all."""
    acme = (await tenancy.tenants.create("acme")).tenant
    globex = (await tenancy.tenants.create("globex")).tenant
    async with (
        tenancy.internals.router.connection(globex) as connection,
        tenancy.internals.router.lease(globex) as engine,
    ):
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        statement = await driver.prepare("SELECT 1")
        listed = tenancy.tenants.iterate()
        assert await statement.fetchval() == await driver.fetchval("SELECT 1") == 1
        assert (await anext(listed)).id == acme.id
        async with tenancy.scope("acme"):
            for use in (
                lambda: driver.fetchval("SELECT 1"),
                statement.fetchval,
                lambda: engine.connect().start(),
                lambda: anext(listed),
            ):
                with pytest.raises(CrossTenantError):
                    await use()
            await connection.rollback()  # gives back, and reads nothing
        assert await driver.fetchval("SELECT 1") == 1


async def test_what_the_iterators_and_sessions_of_before_do_is_refused(tenancy: Tenancy) -> None:
    """A session that is opened late; a loop that would bind another tenant, or record it as sent."""
    acme = (await tenancy.tenants.create("acme")).tenant
    globex = (await tenancy.tenants.create("globex")).tenant
    due, every, session = due_now(tenancy, globex), tenancy.each(), tenancy.internals.router.session(globex)
    # the attacks, with nobody bound
    async with tenancy.internals.router.session(globex) as used:
        assert globex.placement is not None
        assert await used.scalar(text("SELECT current_user")) == globex.placement.role
    assert every.bind_next(globex) is current_tenant_or_none()
    every.release()
    await due_now(tenancy, globex).done()
    async with tenancy.scope("acme"):
        async with session as opened:
            with pytest.raises(CrossTenantError):
                await opened.execute(text("SELECT 1"))
        for use in (partial(every.bind_next, globex), partial(every.bind_next, acme), every.between):
            with pytest.raises(CrossTenantError):
                use()
        with pytest.raises(CrossTenantError):
            await due.done()
        assert current_tenant_or_none() == acme
    await due.done()


@pytest.mark.asyncio(loop_scope="module")
async def test_the_store_of_backups_is_nobodys_while_a_tenant_is_bound(plane: Plane) -> None:
    """It has the backups of all tenants and the keys that open them."""
    tenancy, store = plane.tenancy, plane.tenancy.backups.store
    path = f"{tenancy.internals.control.installation}/{plane.globex.id}/1/manifest.json"
    await store.put(path, b"of globex")
    async with tenancy.scope("acme"):
        with pytest.raises(CrossTenantError):
            _ = tenancy.backups.store
        for use in (store.list(""), store.get(path), store.put(path, b"of acme"), store.delete(path)):
            with pytest.raises(CrossTenantError):
                await use
    # the attack, which only a binding keeps from working
    assert [found.path for found in await store.list("")] == [path]
    assert await store.get(path) == b"of globex"
    await store.delete(path)
    assert await store.list("") == []


async def test_no_login_by_hand_while_a_tenant_is_bound(tenancy: Tenancy) -> None:
    """Neither the administrator's nor a tenant's: both lead to any database."""
    globex = (await tenancy.tenants.create("globex")).tenant
    await tenancy.tenants.create("acme")
    assert globex.placement is not None
    server, password = tenancy.internals.servers["default"], tenancy.internals.provisioner.password(globex)
    for _ in range(2):
        connection: Any = await server.connect_tenant(globex.placement, password)
        await connection.close()
    async with tenancy.scope("acme"):
        with pytest.raises(CrossTenantError):
            await server.connect_admin(globex.placement.database)
        with pytest.raises(CrossTenantError):
            await server.connect_tenant(globex.placement, password)
        # what administration does for the bound tenant itself goes on
        await tenancy.secrets.rotate_password("acme")
        await tenancy.tenants.suspend("acme")
        await tenancy.tenants.delete("acme")
        await tenancy.tenants.purge("acme")


async def test_what_a_process_keeps_up_is_done_for_nobody(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases and holds of all tenants are renewed by one task, which the first of them starts."""
    bound: list[Tenant | None] = []
    for manager, beat in ((BlockManager, "_heartbeat"), (HoldManager, "_renew")):
        plain = getattr(manager, beat)

        async def watched(self: Any, plain: Any = plain) -> None:
            bound.append(current_tenant_or_none())
            await plain(self)

        monkeypatch.setattr(manager, beat, watched)
    monkeypatch.setattr(holds, "_RENEW_SECONDS", 0.01)
    await tenancy.tenants.create("acme")
    await tenancy.quotas.set("acme", {"seats": {"amount": 5, "period": "concurrent"}})
    async with tenancy.scope("acme") as acme:
        await tenancy.quotas.leased(acme, "api_calls").consume()
        async with tenancy.quotas.hold(acme, "seats"):
            await until(lambda: len(bound) > 3)
    assert set(bound) == {None}


async def test_a_slug_that_became_anothers_is_not_the_bound_tenants_any_more(tenancy: Tenancy) -> None:
    """The name was its own when it was bound; what it leads to now decides."""
    await tenancy.tenants.create("acme")
    other = await tenancy.tenants.create("globex")
    bound = tenancy.scope("acme")
    await bound.__aenter__()
    try:
        async with tenancy.internals.control.transaction() as connection:
            for statement in (
                "UPDATE tenancy.tenants SET slug = 'acme-corp' WHERE slug = 'acme'",
                "UPDATE tenancy.tenants SET slug = 'acme' WHERE slug = 'globex'",
            ):
                await connection.exec_driver_sql(statement)
        tenancy.internals.directory.invalidate()
        for param in TRIED:
            part, name, method = param.values
            signature = inspect.signature(method)
            naming = {"tenant", "ref"} & signature.parameters.keys()
            # a wrapped function runs for the bound tenant, whatever that is called by now
            if not naming or part in TAKE_NO_SLUG or name in ("leased", "wrap"):
                continue
            arguments = {**calls(Plane(tenancy, other.tenant, other.tenant, "", ""), method)[0], naming.pop(): "acme"}
            with pytest.raises(CrossTenantError):
                await call(tenancy, part, name, arguments)
    finally:
        await bound.__aexit__(None, None, None)
    assert (await tenancy.tenants.get("acme")).id == other.id


@pytest.mark.parametrize("purged", [False, True], ids=["existing", "purged"])
async def test_a_former_slug_shows_nothing_of_whoever_has_or_had_it(tenancy: Tenancy, purged: bool) -> None:
    """Entries are stored under the slug of their time: a renamed tenant asks by its own former slug, another's now."""
    acme = (await tenancy.tenants.create("acme")).tenant
    await tenancy.tenants.rename("acme", "acme-corp")
    async with tenancy.scope("acme-corp"):
        # bound while the former slug still redirected to it
        async with tenancy.internals.control.transaction() as connection:
            await connection.exec_driver_sql("DELETE FROM tenancy.former_slugs")
        other = await in_new_context(tenancy, purged)
        # the attack: the entries under that slug, over everybody, as they were once read
        async with tenancy.internals.control.connect() as connection:
            rows = await connection.exec_driver_sql(
                "SELECT DISTINCT tenant_id FROM tenancy.audit_log WHERE slug = 'acme'"
            )
            assert set(rows.scalars()) == {acme.id, other}
        if purged:
            entries = await tenancy.audit.events(tenant="acme")
            assert {entry.tenant_id for entry in entries} == {acme.id}
        else:
            with pytest.raises(CrossTenantError):
                await tenancy.audit.events(tenant="acme")


async def in_new_context(tenancy: Tenancy, purged: bool) -> Any:
    """Let another tenant have the slug, and lose it where it is to be purged; returns its id."""

    async def take() -> Any:
        other = (await tenancy.tenants.create("acme", metadata={"secret": "of acme's successor"})).tenant
        if purged:
            await tenancy.tenants.delete(other)
            await tenancy.tenants.purge(other)
        return other.id

    return await asyncio.create_task(take(), context=Context())
