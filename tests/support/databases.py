"""Tenants' databases made by plain SQL, for tests of what lies below provisioning."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from sqlalchemy.engine import make_url
from sqlalchemy.schema import CreateTable

from tenancy_orm.config import PoolConfig, TenancyConfig
from tenancy_orm.control.names import Names
from tenancy_orm.events import EventBus
from tenancy_orm.postgres.quoting import quote_identifier, quote_literal
from tenancy_orm.routing import Router
from tenancy_orm.routing.marker import marker_text
from tenancy_orm.secrets.keyring import Keyring, new_password
from tenancy_orm.servers import Servers
from tenancy_orm.tenant import Placement, Status, Tenant
from tests.support.models import Base
from tests.support.postgres import Postgres

_numbers = itertools.count(1)
_DIALECT = make_url("postgresql+asyncpg://").get_dialect()()
_TABLES = "; ".join(str(CreateTable(table).compile(dialect=_DIALECT)) for table in Base.metadata.sorted_tables)


@dataclass
class Databases:
    """Makes tenants: a role, a database with the tables of ``tests.support.models``, and its marker.

    Args:
        postgres: Where.
        names: How they are called; ``Postgres.drop_all`` removes them by their prefix.
        keyring: Seals their passwords.
    """

    postgres: Postgres
    names: Names
    keyring: Keyring
    admin: asyncpg.Connection[Any] = field(repr=False)
    passwords: dict[UUID, str] = field(default_factory=dict, repr=False)

    @property
    def installation(self) -> UUID:
        """The id in the markers."""
        return self.names.installation

    async def create(self, slug: str | None = None, *, connection_limit: int = -1) -> Tenant:
        """Make one tenant."""
        tenant_id = uuid4()
        name, password = self.names.tenant(tenant_id), new_password()
        quoted = quote_identifier(name)
        marker = quote_literal(marker_text(self.installation, tenant_id))
        await self.admin.execute(
            f"CREATE ROLE {quoted} LOGIN CONNECTION LIMIT {connection_limit} PASSWORD {quote_literal(password)}"
        )
        await self.admin.execute(f"CREATE DATABASE {quoted}")
        await self.admin.execute(
            f"REVOKE ALL ON DATABASE {quoted} FROM PUBLIC; GRANT CONNECT ON DATABASE {quoted} TO {quoted}; "
            f"COMMENT ON DATABASE {quoted} IS {marker}"
        )
        async with self.postgres.connect(name) as inside:
            await inside.execute(
                f"{_TABLES}; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {quoted}; "
                f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {quoted}"
            )
        self.passwords[tenant_id] = password
        return Tenant(
            id=tenant_id,
            slug=slug or f"tenant-{next(_numbers)}",
            status=Status.ACTIVE,
            tier="free",
            placement=Placement("default", name, name, self.keyring.seal_password(tenant_id, password)),
        )

    async def create_many(self, count: int) -> list[Tenant]:
        """Make several tenants."""
        return [await self.create() for _ in range(count)]

    async def sessions(self, tenants: Iterable[Tenant] = ()) -> int:
        """How many server processes serve these tenants' roles (all tenants of this object, if none is given)."""
        roles = [tenant.placement.role for tenant in tenants if tenant.placement] or None
        return int(
            await self.admin.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE starts_with(usename, $1) "
                "AND ($2::text[] IS NULL OR usename = ANY ($2))",
                f"{self.names.stem}_t_",
                roles,
            )
        )


def moved(tenant: Tenant, **changes: Any) -> Tenant:
    """The tenant with another placement."""
    assert tenant.placement is not None
    return replace(tenant, placement=replace(tenant.placement, **changes))


def configuration(postgres: Postgres, name_prefix: str, **changes: Any) -> TenancyConfig:
    """A configuration with a small budget."""
    return TenancyConfig(
        control_url=postgres.admin_url,
        servers={"default": postgres.admin_url},
        encryption_keys={"1": secrets.token_bytes(32)},
        name_prefix=name_prefix,
        pool=PoolConfig(max_connections=6, max_connections_per_tenant=3, checkout_timeout=30.0),
    ).replace(**changes)


@asynccontextmanager
async def databases(postgres: Postgres, config: TenancyConfig) -> AsyncIterator[Databases]:
    """Yield a maker of tenants; everything it makes begins with ``config.name_prefix``."""
    made = Databases(
        postgres,
        Names(config.name_prefix, uuid4()),
        Keyring(config.sealing_keys),
        await asyncpg.connect(postgres.admin_url, timeout=30),
    )
    try:
        yield made
    finally:
        await made.admin.close()


@asynccontextmanager
async def router(
    made: Databases, config: TenancyConfig, *, events: EventBus | None = None, **options: Any
) -> AsyncIterator[Router]:
    """Yield an open router to those databases; ``options`` are further arguments of ``Router``."""
    opened = Router(
        config=config,
        servers=Servers(config),
        keyring=made.keyring,
        installation=made.installation,
        events=events or EventBus(),
        **options,
    )
    try:
        yield opened
    finally:
        await opened.close(timeout=5)
