"""A provisioner on parts of its own, without the rest of the package, and what tests ask about its servers."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import text

from tenancy_orm.audit.log import AuditLog
from tenancy_orm.config import TenancyConfig
from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.control.names import Names
from tenancy_orm.errors import AdministratorNeededError
from tenancy_orm.events import EventBus
from tenancy_orm.postgres.quoting import quote_identifier, quote_literal
from tenancy_orm.provisioning import Provisioner, ReconcileReport, SchemaSource
from tenancy_orm.provisioning.creation.pipeline import Creation, Step
from tenancy_orm.provisioning.server_objects.blockers import Blockers
from tenancy_orm.registry.registry import Registry
from tenancy_orm.registry.rows import TenantDraft, uuid7
from tenancy_orm.secrets.keyring import Keyring, new_password
from tenancy_orm.servers import Servers
from tenancy_orm.tenant import Placement, Status, Tenant
from tests.support.clusters import CopiedServer
from tests.support.control_databases import create_control_database, drop_tenants, forget_tenants
from tests.support.installed_versions import add_installed_versions
from tests.support.postgres import Postgres
from tests.support.registry import synchronise

Connect = Callable[[], Awaitable["asyncpg.Connection[Any]"]]

SEALING_KEY = b"k" * 32

TABLES = """
CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);
INSERT INTO alembic_version VALUES ('0001');
CREATE TABLE notes (id bigserial PRIMARY KEY, body text NOT NULL);
CREATE SCHEMA "odd ""schema";
CREATE TABLE "odd ""schema"."odd ""table" (id integer GENERATED ALWAYS AS IDENTITY, body text);
CREATE VIEW bodies AS SELECT body FROM notes;
"""


class ScriptSchema:
    """A schema made by one script, at revision "0001"."""

    def __init__(self, script: str = TABLES, *, fingerprint: str = "first") -> None:
        self.script = script
        self._fingerprint = fingerprint
        self.applied = 0
        self.files: dict[str, str] = {}

    def head(self) -> str | None:
        return "0001"

    def fingerprint(self) -> str:
        return f"{self._fingerprint} {hashlib.sha256(self.script.encode()).hexdigest()}"

    def inputs(self) -> Mapping[str, str]:
        return self.files

    def changed_input(self, inputs: Mapping[str, str]) -> str | None:
        return next((name for name, digest in inputs.items() if self.files.get(name) != digest), None)

    async def apply(self, connect: Connect) -> str | None:
        self.applied += 1
        connection = await connect()
        await connection.execute(self.script)
        return "0001"


@dataclass
class Workshop:
    """A provisioner and its parts."""

    config: TenancyConfig
    control: ControlDatabase
    registry: Registry
    servers: Servers
    names: Names
    keyring: Keyring
    events: EventBus
    schema: SchemaSource
    provisioner: Provisioner
    others: list[Provisioner] = field(default_factory=list)

    def provisioner_of(self, schema: SchemaSource | None = None, **config: Any) -> Provisioner:
        """Another process's provisioner, so to speak: it shares the registry and nothing else."""
        made = Provisioner(
            config=self.config.replace(**config),
            control=self.control,
            registry=self.registry,
            servers=self.servers,
            names=self.names,
            keyring=self.keyring,
            schema=schema or self.schema,
            events=self.events,
        )
        self.others.append(made)
        return made

    def blockers(self, server: str = "default") -> Blockers:
        """What ends tenants' locks on a server."""
        return Blockers(self.servers[server], self.names, self.registry)

    def draft(self, slug: str, *, server: str = "default", **values: Any) -> TenantDraft:
        """A tenant to be."""
        tenant_id = uuid7()
        name = self.names.tenant(tenant_id)
        defaults = {"tier": "free", "sealed_password": self.keyring.seal_password(tenant_id, new_password())}
        return TenantDraft(id=tenant_id, slug=slug, server=server, database=name, role=name, **{**defaults, **values})

    async def create(self, slug: str, **values: Any) -> Tenant:
        """Create a tenant."""
        return await self.provisioner.create(self.draft(slug, **values), key=None)

    async def deleted(self, slug: str) -> Tenant:
        """Create a tenant and delete it softly."""
        tenant = await self.create(slug)
        return (await self.registry.transition(tenant.id, Status.DELETED, action="tenant.delete"))[1]

    async def set_login(self, tenant: Tenant, allowed: bool, *, timeout: float = 5.0) -> None:
        """Suspend or activate a tenant in the registry, unless it is so already, and align its role with that."""
        status = Status.ACTIVE if allowed else Status.SUSPENDED
        if (await self.registry.get(tenant.id)).status is not status:
            await self.registry.transition(tenant.id, status, action="tenant.update")
        await self.provisioner.align(tenant, timeout=timeout)

    @asynccontextmanager
    async def admin(self, database: str | None = None, *, server: str = "default") -> AsyncIterator[Any]:
        """The administrator's connection."""
        connection = await self.servers[server].connect_admin(database)
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def connect(self, tenant: Tenant, database: str | None = None) -> AsyncIterator[Any]:
        """A connection as the tenant's role, to its own database or another."""
        place = placement(tenant)
        server = self.servers[place.server]
        connection = await asyncpg.connect(
            host=server.host,
            port=server.port,
            user=place.role,
            password=self.provisioner.password(tenant),
            database=database or place.database,
            timeout=10,
        )
        try:
            yield connection
        finally:
            await connection.close()

    async def present(self, *, server: str = "default") -> set[str]:
        """Every database and role of this installation's tenants, with what kind it is."""
        async with self.admin(server=server) as connection:
            rows = await connection.fetch(
                "SELECT 'database ' || datname AS name FROM pg_database WHERE starts_with(datname::text, $1) "
                "UNION ALL SELECT 'role ' || rolname FROM pg_roles WHERE starts_with(rolname::text, $1)",
                self.names.stem + "_t_",
            )
        return {row["name"] for row in rows}

    async def databases(self, *, server: str = "default") -> set[str]:
        """Every database of this installation, templates and scratches too."""
        async with self.admin(server=server) as connection:
            rows = await connection.fetch(
                "SELECT datname FROM pg_database WHERE starts_with(datname::text, $1)", self.names.stem
            )
        return {row["datname"] for row in rows}

    async def slugs(self) -> dict[str, str]:
        """Every row of the registry: its status by its slug."""
        async with self.control.connect() as connection:
            rows = await connection.execute(text("SELECT slug, status FROM tenancy.tenants"))
            return {row.slug: row.status for row in rows}

    async def consistent(self) -> bool:
        """Whether databases, roles and living rows of the registry are the same tenants, and none is unfinished."""
        async with self.control.connect() as connection:
            rows = await connection.execute(
                text("SELECT database_name, status FROM tenancy.tenants WHERE status <> 'purged'")
            )
            found = {row.database_name: row.status for row in rows}
        expected = {f"{kind} {name}" for name in found for kind in ("database", "role")}
        return await self.present() == expected and "provisioning" not in found.values()

    async def close_others(self) -> None:
        """Close the other processes' provisioners."""
        while self.others:
            await self.others.pop().close()

    async def close(self) -> None:
        """Close everything."""
        await self.close_others()
        await self.provisioner.close()
        await self.servers.close()
        await self.control.close()


Hook = Callable[[Creation], Awaitable[None]]


def intercept(
    monkeypatch: pytest.MonkeyPatch, name: str, *, before: Hook | None = None, after: Hook | None = None
) -> None:
    """Have every creation do something before or after the step ``name``, in the same task."""
    original = Creation.steps

    def steps(creation: Creation) -> tuple[Step, ...]:
        def wrapped(step: Step) -> Step:
            async def apply() -> None:
                if before:
                    await before(creation)
                await step.apply()
                if after:
                    await after(creation)

            return Step(step.name, apply, step.undo) if step.name == name else step

        return tuple(wrapped(step) for step in original(creation))

    monkeypatch.setattr(Creation, "steps", steps)


def placement(tenant: Tenant) -> Placement:
    """Where a living tenant is."""
    assert tenant.placement is not None
    return tenant.placement


async def set_marker(connection: asyncpg.Connection[Any], name: str, marker: str) -> None:
    """Give a database the comment by which it proves whose it is."""
    await connection.execute(f"COMMENT ON DATABASE {quote_identifier(name)} IS {quote_literal(marker)}")


def mended(report: ReconcileReport) -> dict[str, set[str]]:
    """What a reconcile has mended, by tenant; it found nothing else."""
    assert report == ReconcileReport(corrected=report.corrected, differences=report.differences)
    assert all(difference.mended for difference in report.differences)
    found: dict[str, set[str]] = {slug: set() for slug in report.corrected}
    for difference in report.differences:
        found[difference.tenant].add(difference.kind)
    return found


def names_of(tenant: Tenant | TenantDraft) -> set[str]:
    """What ``Workshop.present`` lists for a tenant that is there."""
    name = placement(tenant).database if isinstance(tenant, Tenant) else tenant.database
    return {f"database {name}", f"role {name}"}


async def open_workshop(
    *, control_url: str, admin_url: str, name_prefix: str, schema: SchemaSource | None = None, **config: Any
) -> Workshop:
    """Make a control database's tables, and a provisioner on it."""
    settings = TenancyConfig(
        control_url=control_url,
        encryption_keys={"1": SEALING_KEY},
        name_prefix=name_prefix,
        servers={"default": admin_url},
    ).replace(**config)
    control = ControlDatabase(control_url)
    servers = Servers(settings)
    try:
        await control.upgrade()
    except AdministratorNeededError:
        administrator = await servers["default"].connect_admin()
        await control.upgrade(administrator=administrator)
        await administrator.close()
    await control.open()
    await synchronise(control, settings.tiers, dict.fromkeys(settings.server_dsns, ("127.0.0.1", 5432)))
    names = Names(settings.name_prefix, control.installation)
    parts: dict[str, Any] = {
        "config": settings,
        "control": control,
        "registry": Registry(control, AuditLog(control)),
        "servers": servers,
        "names": names,
        "keyring": Keyring(settings.sealing_keys),
        "events": EventBus(),
        "schema": schema or ScriptSchema(),
    }
    return Workshop(provisioner=Provisioner(**parts), **parts)


# --- servers of every version ---------------------------------------------------------------------------------------


VERSIONS = add_installed_versions()


@contextlib.contextmanager
def running_server(version: int, worker: str, **settings: str) -> Iterator[Postgres]:
    """A server of that version, for as long as the body runs."""
    with CopiedServer.for_tests(version=version, settings=settings) as server:
        # else the first preparation would be refused because of the login roles that a test has made before
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC")
        yield Postgres(server.url(), server.server_version, "v0", worker, server.bin_dir, server.data_dir)


@asynccontextmanager
async def plain_administrator(postgres: Postgres) -> AsyncIterator[str]:
    """The URL of an administrator who is no superuser: CREATEDB and CREATEROLE, and its own maintenance database."""
    name, password = postgres.new_name("admin"), new_password()
    async with postgres.connect() as connection:
        await connection.execute(f"CREATE ROLE \"{name}\" LOGIN CREATEDB CREATEROLE PASSWORD '{password}'")
        await connection.execute(f'CREATE DATABASE "{name}" OWNER "{name}"')
    yield postgres.url(name, user=name, password=password)


@asynccontextmanager
async def lasting_control_database(versioned: Postgres, prefix: str) -> AsyncIterator[str]:
    """The URL of a control database of an installation that a module's tests use in turn, one after the other.

    Its owner role and its template are made by the first of them. The tenants' databases and roles are dropped.
    """
    names = _installations.setdefault((versioned.admin_url, prefix), Names(prefix, uuid7()))
    name = versioned.new_name()
    try:
        url = await create_control_database(versioned, name, names=names, lasts=True)
        yield url
        await drop_tenants(versioned, url, prefix, names)
    finally:
        await versioned.drop_database(name, but=names.stem)
        await versioned.drop_all(prefix, but=names)


class Workshops:
    """The workshops of a server that tests use in turn, in one event loop: one with each kind of administrator.

    What a workshop takes to open and to prepare the server is ten times what a tenant takes. One that a test leaves
    otherwise than it was is not used again.

    Args:
        server: Where.
        registry: Whether the control database is a plain user's, where the administrator is a plain one.
        options: For ``open_workshop``.
    """

    def __init__(self, server: Postgres, *, registry: bool = False, **options: Any) -> None:
        self.server = server
        self._registry = registry
        self._options = options
        self._numbers = itertools.count(1)
        self._idle: dict[str, Workshop] = {}

    @asynccontextmanager
    async def workshop(self, administrator: str) -> AsyncIterator[Workshop]:
        """A workshop without tenants; the administrator is a "superuser" or a "plain" one."""
        # not idle while it is used: whatever fails, the next test has another installation
        workshop = self._idle.pop(administrator, None) or await self._open(administrator)
        try:
            yield workshop
            await workshop.close_others()
            await self.server.drop_all(workshop.config.name_prefix, but=workshop.names)
            await forget_tenants(self.server, workshop.config.control_url)
        except BaseException:
            await workshop.close()
            raise
        self._idle[administrator] = workshop

    async def _open(self, administrator: str) -> Workshop:
        admin_url, owner = self.server.admin_url, None
        if administrator == "plain":
            owner = await registry_user(self.server) if self._registry else None
            async with plain_administrator(self.server) as admin_url:
                pass
        control_url = await create_control_database(self.server, self.server.new_name(), owner=owner)
        prefix = f"t{next(self._numbers)}{administrator}"
        return await open_workshop(control_url=control_url, admin_url=admin_url, name_prefix=prefix, **self._options)

    async def close(self) -> None:
        """Close those that are idle."""
        while self._idle:
            await self._idle.popitem()[1].close()


@asynccontextmanager
async def open_workshops(server: Postgres, **options: Any) -> AsyncIterator[Workshops]:
    """Workshops for the body, which must not change event loops; ``options`` as for ``Workshops``."""
    workshops = Workshops(server, **options)
    try:
        yield workshops
    finally:
        await workshops.close()


# by server's URL and prefix
_installations: dict[tuple[str, str], Names] = {}


@asynccontextmanager
async def superuser_workshop(versioned: Postgres, **config: Any) -> AsyncIterator[Workshop]:
    """A provisioner whose administrator is a superuser."""
    async with lasting_control_database(versioned, "super") as control_url:
        opened = await open_workshop(
            control_url=control_url, admin_url=versioned.admin_url, name_prefix="super", **config
        )
        try:
            yield opened
        finally:
            await opened.close()


@asynccontextmanager
async def plain_workshop(versioned: Postgres, **config: Any) -> AsyncIterator[Workshop]:
    """A provisioner whose administrator has CREATEDB and CREATEROLE, and whose registry has a user of its own."""
    control_url = await create_control_database(versioned, versioned.new_name(), owner=await registry_user(versioned))
    async with plain_administrator(versioned) as admin_url:
        opened = await open_workshop(control_url=control_url, admin_url=admin_url, name_prefix="plain", **config)
        try:
            yield opened
        finally:
            await opened.close()


async def registry_user(server: Postgres) -> tuple[str, str]:
    """Name and password of a plain user of that server."""
    if server.admin_url not in _registry_users:
        user, password = server.new_name("registry"), new_password()
        async with server.connect() as connection:
            await connection.execute(f"CREATE ROLE \"{user}\" LOGIN PASSWORD '{password}'")
        _registry_users[server.admin_url] = user, password
    return _registry_users[server.admin_url]


# name and password, by the server's URL
_registry_users: dict[str, tuple[str, str]] = {}
