"""Tenants found by their metadata and by parts of their slugs, and metadata that is merged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import Select, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.control.models import tenants
from tenancy_orm.errors import (
    ConfigurationError,
    CrossTenantError,
    InvalidMetadataError,
    SeveralTenantsError,
    TenantNotFoundError,
)
from tenancy_orm.postgres.quoting import quote_literal
from tenancy_orm.registry.reading import TenantFilter
from tenancy_orm.registry.rows import TENANT_COLUMNS
from tests.support.control_databases import create_control_database
from tests.support.models import Base
from tests.support.postgres import Postgres

pytestmark = pytest.mark.asyncio(loop_scope="module")

CUSTOMERS = 20_000

# rows without databases: enough for the planner to choose as it would in production
MANY = f"""
INSERT INTO tenancy.tenants (
    id, slug, status, tier, server, database_name, role_name, sealed_password, next_status, metadata)
SELECT ('ffffffff-0000-4000-8000-' || lpad(n::text, 12, '0'))::uuid,
    'customer-' || n, 'provisioning', 'free', 'default', 'd' || n, 'r' || n, '', 'active',
    jsonb_build_object('stripe_customer', 'cus_' || n, 'plan', CASE n % 2 WHEN 0 THEN 'annual' ELSE 'monthly' END)
FROM generate_series(1, {CUSTOMERS}) AS n
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(postgres: Postgres) -> AsyncIterator[Tenancy]:
    """Acme and globex, and 20,000 rows beside them."""
    name = postgres.new_name()
    config = TenancyConfig(
        control_url=await create_control_database(postgres, name),
        servers={"default": postgres.admin_url},
        metadata=Base.metadata,
        encryption_keys={"1": "a2V5" * 10 + "a2U="},
        name_prefix=f"m{name[-8:]}".replace("_", "x"),
    )
    tenancy = Tenancy(config)
    await tenancy.open(initialise=True)
    try:
        await tenancy.tenants.create(
            "acme", metadata={"stripe_customer": "cus_a", "plan": "annual", "tags": ["a", "b"]}
        )
        await tenancy.tenants.create("globex", metadata={"stripe_customer": "cus_g", "owner": None, "address": {}})
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text(MANY))
        async with tenancy.internals.control.connect() as connection:
            await connection.execute(text("ANALYZE tenancy.tenants"))
        yield tenancy
    finally:
        await tenancy.close()
        await postgres.drop_all(config.name_prefix)
        await postgres.drop_database(name)


async def test_a_webhook_finds_its_tenant(fleet: Tenancy) -> None:
    """By what is in its metadata, at any depth; exactly one, or an error that says which it is."""
    find = fleet.tenants.get_by_metadata
    assert (await find({"stripe_customer": "cus_a"})).slug == "acme"
    assert (await find({"tags": ["b"], "plan": "annual"})).slug == "acme"
    assert (await find({"stripe_customer": "cus_a"}, status="active")).slug == "acme"
    with pytest.raises(TenantNotFoundError, match=r"no tenant has the metadata \{'stripe_customer': 'cus_x'\}"):
        await find({"stripe_customer": "cus_x"})
    with pytest.raises(TenantNotFoundError):
        await find({"stripe_customer": "cus_a"}, status="suspended")
    with pytest.raises(SeveralTenantsError, match=r"several tenants have .*: acme, customer-") as caught:
        await find({"plan": "annual"})
    assert (caught.value.slugs[0], len(caught.value.slugs)) == ("acme", 3)


@pytest.mark.parametrize(
    "vacant", [{}, {"owner": None}, {"address": {}}, {"a": {"b": [None]}}, {"tags": []}, {"owner": ""}]
)
async def test_an_id_that_is_missing_finds_nobody(fleet: Tenancy, vacant: dict[str, Any]) -> None:
    """The attack: a webhook without a customer, and a tenant with a null, or any tenant, would match."""
    if vacant == {"owner": None}:
        assert [tenant.slug for tenant in (await fleet.tenants.list(metadata=vacant)).items] == ["globex"]
    with pytest.raises(InvalidMetadataError, match="empty or null"):
        await fleet.tenants.get_by_metadata(vacant)


async def test_lists_and_counts_take_the_same_filters(fleet: Tenancy) -> None:
    """Pages of tenants that match, and how many there are on all pages."""
    page = await fleet.tenants.list(metadata={"plan": "annual"}, limit=2)
    assert page.items[0].slug == "acme"
    rest = await fleet.tenants.list(metadata={"plan": "annual"}, limit=2, after=page.next)
    assert page.next is not None and not {t.id for t in page.items} & {t.id for t in rest.items}
    assert await fleet.tenants.count(metadata={"plan": "annual"}) == CUSTOMERS // 2 + 1
    assert await fleet.tenants.count() == CUSTOMERS + 2
    assert await fleet.tenants.count(metadata={}) == CUSTOMERS + 2
    assert await fleet.tenants.count(slug="customer-1999?") == 10
    for pattern, found in (("ac*", ["acme"]), ("*lob*", ["globex"]), ("acme", ["acme"]), ("a%e", None), ("a_me", None)):
        if found is None:
            with pytest.raises(ConfigurationError, match="hyphens"):
                await fleet.tenants.list(slug=pattern)
        else:
            assert [tenant.slug for tenant in (await fleet.tenants.list(slug=pattern)).items] == found
    iterated = fleet.tenants.iterate(slug="globe?", status="active", metadata={"stripe_customer": "cus_g"})
    assert [tenant.slug async for tenant in iterated] == ["globex"]


async def explain(connection: AsyncConnection, query: Select[Any]) -> str:
    """The plan of a query as of one that is run often: made without knowing its parameters."""
    compiled = query.compile(dialect=connection.dialect)
    given = [compiled.params[name] for name in compiled.positiontup or ()]
    literals = [quote_literal(json.dumps(x) if isinstance(x, dict) else str(x)) for x in given]
    driver: Any = (await connection.get_raw_connection()).driver_connection
    await driver.execute("SET LOCAL plan_cache_mode = force_generic_plan")
    await driver.execute(f"PREPARE probe AS {compiled}")
    rows = await driver.fetch(f"EXPLAIN EXECUTE probe({', '.join(literals)})")
    await driver.execute("DEALLOCATE probe")
    return "\n".join(row[0] for row in rows)


@pytest.mark.parametrize("as_application", [False, True], ids=["owner", "application"])
async def test_the_index_is_used(fleet: Tenancy, postgres: Postgres, as_application: bool) -> None:
    """Also with the policies of row security in force, as for an application that does not own the tables."""
    query = TenantFilter(metadata={"stripe_customer": "cus_77"}).apply(
        select(*TENANT_COLUMNS).order_by(tenants.c.id).limit(4)
    )
    role = postgres.new_name("application")
    async with fleet.internals.control.connect() as connection:
        await connection.execute(text(f"CREATE ROLE {role} LOGIN"))
    try:
        await fleet.internals.control.grant_application(role)
        async with fleet.internals.control.transaction() as connection:
            if as_application:
                await connection.execute(text(f"SET LOCAL ROLE {role}"))
            plan = await explain(connection, query)
            found = (await connection.execute(query)).all()
        assert [row.slug for row in found] == ["customer-77"]
        assert "tenants_metadata_idx" in plan
        assert "Seq Scan on tenants" not in plan
    finally:
        async with fleet.internals.control.connect() as connection:
            await connection.execute(text(f"DROP OWNED BY {role}"))
            await connection.execute(text(f"DROP ROLE {role}"))


async def test_a_merge_changes_what_it_names_alone(fleet: Tenancy) -> None:
    """As RFC 7396 says, audited with what was before."""
    created = await fleet.tenants.create("merged", metadata={"plan": "free", "seen": 1, "billing": {"id": "c", "x": 1}})
    merge = {"plan": "pro", "seen": None, "billing": {"x": None, "y": [None, 2]}, "new": {"gone": None}}
    changed = await fleet.tenants.update("merged", merge_metadata=merge)
    assert changed.metadata == {"plan": "pro", "billing": {"id": "c", "y": [None, 2]}, "new": {}}
    [entry] = await fleet.audit.events(tenant=created.id, action="tenant.update")
    assert entry.before == {"metadata": created.tenant.metadata}
    assert entry.after == {"metadata": changed.metadata}
    assert (await fleet.tenants.update("merged", merge_metadata={})).metadata == changed.metadata
    await fleet.tenants.update("merged", merge_metadata={"plan": "pro"})
    assert len(await fleet.audit.events(tenant=created.id, action="tenant.update")) == 1
    with pytest.raises(ConfigurationError, match="not both"):
        await fleet.tenants.update("merged", metadata={}, merge_metadata={})
    with pytest.raises(InvalidMetadataError, match="at most 65536"):
        for name in ("a", "b"):
            await fleet.tenants.update("merged", merge_metadata={name: "x" * 40_000})
    assert (await fleet.tenants.update("merged", merge_metadata={"a": None})).metadata == changed.metadata


async def test_merges_at_once_lose_nothing(fleet: Tenancy) -> None:
    """The attack, a webhook that reads and replaces, loses what came between; a merge does not."""
    await fleet.tenants.create("busy")
    read = await fleet.tenants.get("busy")
    await fleet.tenants.update("busy", merge_metadata={"between": True})
    replaced = await fleet.tenants.update("busy", metadata={**read.metadata, "mine": True})
    assert "between" not in replaced.metadata
    await asyncio.gather(*(fleet.tenants.update("busy", merge_metadata={f"n{n}": n}) for n in range(8)))
    assert (await fleet.tenants.get("busy")).metadata == {"mine": True, **{f"n{n}": n for n in range(8)}}


def _loop() -> dict[str, Any]:
    looped: dict[str, Any] = {}
    looped["self"] = looped
    return looped


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([("a", 1)], "must be a JSON object, not list"),
        ("text", "must be a JSON object, not str"),
        ({"a": float("nan")}, "Out of range"),
        ({"a": {1: "x"}}, "the name 1, which is not text"),
        ({None: "x"}, "the name None, which is not text"),
        ({"a": object()}, "not JSON serializable"),
        ({"a": "b\0"}, "NUL"),
        ({"a\0": 1}, "NUL"),
        ({"a": "\ud800"}, "surrogate"),
        ({"a": "x" * 70_000}, "at most 65536"),
        (_loop(), "nested too deeply"),
    ],
    ids=["list", "text", "nan", "number", "none", "object", "nul", "nul-name", "surrogate", "large", "loop"],
)
async def test_what_is_no_metadata_is_refused(fleet: Tenancy, bad: Any, message: str) -> None:
    """In every argument that takes it; nothing has changed."""
    before = await fleet.tenants.get("acme")
    for call in (
        lambda: fleet.tenants.create("refused", metadata=bad),
        lambda: fleet.tenants.update("acme", metadata=bad),
        lambda: fleet.tenants.update("acme", merge_metadata=bad),
        lambda: fleet.tenants.list(metadata=bad),
        lambda: fleet.tenants.count(metadata=bad),
        lambda: fleet.tenants.get_by_metadata(bad),
    ):
        with pytest.raises(InvalidMetadataError, match=message):
            await call()
    assert await fleet.tenants.get("acme") == before
    assert await fleet.tenants.count(slug="refused") == 0


async def test_a_bound_tenant_finds_nobody(fleet: Tenancy) -> None:
    """Not even itself: an answer, or an error, would tell what others have."""
    async with fleet.scope("acme"):
        for call in (
            lambda: fleet.tenants.get_by_metadata({"stripe_customer": "cus_a"}),
            lambda: fleet.tenants.list(slug="ac*"),
            lambda: fleet.tenants.count(metadata={"plan": "annual"}),
        ):
            with pytest.raises(CrossTenantError):
                await call()
