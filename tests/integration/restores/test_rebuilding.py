"""Tenants that are registered again by the markers of their databases, after the control database was lost."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest
import sqlalchemy as sa

from tenancy_orm import Tenancy, TenancyConfig, Tenant
from tenancy_orm.audit.actor import Actor
from tenancy_orm.audit.checkpoints import Signer
from tenancy_orm.clones import CloneReport
from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.errors import AdministratorNeededError, ConfigurationError, MarkerMismatchError
from tenancy_orm.registry.rows import uuid7
from tenancy_orm.restores import BackupSource, RebuildReport
from tenancy_orm.secrets.keyring import new_password
from tenancy_orm.secrets.providers import EnvironmentSecrets, SecretKeyWrapper
from tenancy_orm.tenant import Placement
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.provisioning import plain_administrator

# other tests' databases must not be found
pytestmark = pytest.mark.new_installation


@dataclass
class Lost:
    """An installation with two tenants, and the control database that replaces its lost one."""

    config: TenancyConfig
    acme: Tenant
    globex: Tenant
    installation: UUID

    @property
    def slugs(self) -> dict[UUID, str]:
        return {self.acme.id: "acme", self.globex.id: "globex"}


@asynccontextmanager
async def losing(
    config: TenancyConfig,
    postgres: Postgres,
    *,
    owner: tuple[str, str] | None = None,
    also: Callable[[Tenancy], Awaitable[None]] | None = None,
) -> AsyncIterator[Lost]:
    """Create two tenants, drop the control database, and make a new one.

    Args:
        config: The configuration.
        postgres: The server.
        owner: A role of the control database, and its password.
        also: What else is done before the loss.
    """
    user, password = owner or (None, None)
    if owner is not None:
        first = postgres.new_name()
        await postgres.create_database(first, owner=user)
        config = config.replace(control_url=postgres.url(first, user=user, password=password))
    async with opened(config, initialise=True) as tenancy:
        acme, globex = [(await tenancy.tenants.create(slug)).tenant for slug in ("acme", "globex")]
        for slug in ("acme", "globex"):
            async with tenancy.transaction(slug) as session:
                await session.execute(sa.text("INSERT INTO notes (body) VALUES (:body)"), {"body": f"of {slug}"})
        if also is not None:
            await also(tenancy)
        installation = tenancy.internals.control.installation
    await postgres.administer(f'DROP DATABASE "{config.control_url.rpartition("/")[2]}" WITH (FORCE)')
    name = postgres.new_name()
    await postgres.create_database(name, owner=user)
    again = config.replace(control_url=postgres.url(name, user=user, password=password))
    async with opened(again, initialise=True):
        pass
    yield Lost(again, acme, globex, installation)
    await postgres.drop_database(name)


@pytest.fixture
async def lost(tenancy_config: TenancyConfig, postgres: Postgres) -> AsyncIterator[Lost]:
    async with losing(tenancy_config, postgres) as made:
        yield made


@asynccontextmanager
async def taken_over(config: TenancyConfig, installation: UUID) -> AsyncIterator[Tenancy]:
    """Open a ``Tenancy`` on the new control database once it has the id of the lost one."""
    async with opened(config) as tenancy:
        assert await tenancy.rebuilding.take_installation(installation)
    async with opened(config, initialise=True) as tenancy:
        yield tenancy


async def bodies(tenancy: Tenancy, slug: str) -> list[str]:
    async with tenancy.session(slug) as session:
        return list(await session.scalars(sa.text("SELECT body FROM notes ORDER BY 1")))


def states(report: RebuildReport) -> dict[str, str]:
    return {one.database: one.state for one in report.databases}


async def test_tenants_are_registered_again(lost: Lost) -> None:
    """With the same ids, databases, roles and rows, another password, and an audit entry; a second run does nothing."""
    async with opened(lost.config) as tenancy:
        before = tenancy.internals.control.installation
        looked = await tenancy.rebuilding.look(slugs=lost.slugs)
        assert looked.installation == lost.installation != before and looked.complete
        assert {(one.slug, one.tenant_id, one.state) for one in looked.databases} == {
            ("acme", lost.acme.id, "found"),
            ("globex", lost.globex.id, "found"),
        }
        assert all(one.size_bytes for one in looked.databases)
        assert await tenancy.tenants.count() == 0
        with pytest.raises(ConfigurationError, match="take its id over"):
            await tenancy.rebuilding.run()
    async with taken_over(lost.config, lost.installation) as tenancy:
        report = await tenancy.rebuilding.run(slugs=lost.slugs, actor=Actor("operator", "ada"))
        assert report.complete and {one.state for one in report.databases} == {"taken"}
        for tenant in (lost.acme, lost.globex):
            found = await tenancy.tenants.get(tenant.slug)
            assert (found.id, found.status, found.reason) == (tenant.id, "active", None)
            assert found.placement is not None and tenant.placement is not None
            assert (found.placement.database, found.placement.role) == (
                tenant.placement.database,
                tenant.placement.role,
            )
            assert await bodies(tenancy, tenant.slug) == [f"of {tenant.slug}"]
            actions = [entry.action for entry in reversed(await tenancy.audit.events(tenant=tenant.id))]
            assert actions == ["tenant.rebuild", "tenant.rotate_password", "tenant.activate"]
        again = await tenancy.rebuilding.run(slugs=lost.slugs)
        assert again.databases == () and again.complete
        assert not await tenancy.rebuilding.take_installation(lost.installation)
        assert (await tenancy.internals.provisioner.reconcile(check=True)).clean
        issued = await tenancy.keys.issue("acme")
        assert (await tenancy.internals.directory.authenticate(issued.text)).tenant.id == lost.acme.id
        created = await tenancy.tenants.create("initech")
        assert await bodies(tenancy, created.slug) == []


async def test_a_tenant_without_a_slug_gets_one_of_its_id(lost: Lost) -> None:
    async with taken_over(lost.config, lost.installation) as tenancy:
        await tenancy.rebuilding.run(slugs={lost.acme.id: "acme"}, tiers={lost.acme.id: "pro"})
        assert (await tenancy.tenants.get("acme")).tier == "pro"
        assert (await tenancy.tenants.get(f"tenant-{lost.globex.id.hex[-12:]}")).id == lost.globex.id


async def test_a_clone_ends_all_the_same(tenancy_config: TenancyConfig, postgres: Postgres, tmp_path: Path) -> None:
    """Its database says of which tenant it is a clone, and until when, once restored as well; no other one says it."""
    made: list[CloneReport] = []
    places: list[Placement | None] = []

    async def clone(tenancy: Tenancy) -> None:
        for source, slug, body in (("acme", "debug", "hash"), ("debug", "again", "keep")):
            rules = {"tables": {"notes": {"body": body}}}
            made.append(await tenancy.clones.create(source, slug, ttl=timedelta(days=2), rules=rules))
        (backup,) = (await tenancy.backups.run(["debug"])).done
        await tenancy.restores.restore("debug", BackupSource(tenancy.backups, backup))
        places.extend([(await tenancy.tenants.get(slug)).placement for slug in ("debug", "again", "globex")])

    config = tenancy_config.replace(backup={"store": f"file:{tmp_path}"})
    async with losing(config, postgres, also=clone) as lost:
        slugs = {**lost.slugs, **{one.tenant.id: one.tenant.slug for one in made}}
        debug, again, globex = places
        assert debug is not None and again is not None and globex is not None
        async with postgres.connect(debug.database) as connection:
            mark = await connection.fetchval("SELECT obj_description('tenancy_orm'::regnamespace, 'pg_namespace')")
        owner = f"{debug.database.rpartition('_t_')[0]}_owner"
        async with postgres.connect(globex.database) as connection:
            await connection.execute(f'CREATE SCHEMA tenancy_orm AUTHORIZATION "{owner}"')
            await connection.execute(f"COMMENT ON SCHEMA tenancy_orm IS '{mark}'")
        async with postgres.connect(again.database) as connection:
            whole = await connection.fetchval("SELECT obj_description('tenancy_orm'::regnamespace, 'pg_namespace')")
            await connection.execute("COMMENT ON SCHEMA tenancy_orm IS 'tenancy-clone:{}'")
        async with taken_over(lost.config, lost.installation) as tenancy:
            report = await tenancy.rebuilding.run(slugs=slugs)
            found = {one.slug: one for one in report.databases}
            assert {slug: one.state for slug, one in found.items()} == {
                "acme": "taken",
                "globex": "taken",
                "debug": "taken",
                "again": "refused",
                None: "beside",  # what the restore has replaced
            }
            assert "does not say of which tenant this is a clone" in found["again"].reason
            async with postgres.connect(again.database) as connection:
                await connection.execute(f"COMMENT ON SCHEMA tenancy_orm IS '{whole}'")
            assert (await tenancy.rebuilding.run(slugs=slugs)).complete
            for before in made:
                after = await tenancy.clones.get(before.tenant.slug)
                assert after is not None and after == replace(before.clone, operation=after.operation)
                assert (await tenancy.tenants.get(before.tenant.slug)).metadata == before.tenant.metadata
            assert (found["debug"].clone_of, found["debug"].expires_at) == (lost.acme.id, made[0].clone.expires_at)
            assert await tenancy.clones.get("acme") is None is await tenancy.clones.get("globex")
            async with tenancy.internals.control.transaction() as connection:
                over = "UPDATE tenancy.operations SET detail = detail || jsonb_build_object('expires_at', now())"
                await connection.execute(sa.text(f"{over} WHERE tenant_id = :id"), {"id": made[0].tenant.id})
            assert (await tenancy.clones.expire()).expired == ("debug",)
            assert [tenant.slug async for tenant in tenancy.tenants.iterate(status="deleted")] == ["debug"]


@pytest.mark.parametrize("taken", ["not a slug", "acme", "globex"])
async def test_slugs_that_not_every_tenant_can_get_change_nothing(lost: Lost, taken: str) -> None:
    """An invalid one, one given twice, one for an unknown id."""
    ids = (lost.acme.id, uuid4() if taken == "globex" else lost.globex.id)
    async with opened(lost.config) as tenancy:
        for method in (tenancy.rebuilding.look, tenancy.rebuilding.run):
            with pytest.raises(ConfigurationError, match=r"UUID|twice|no database has the marker"):
                await method(slugs={ids[0]: "acme", ids[1]: taken})
            with pytest.raises(ConfigurationError, match="there is no tier"):
                await method(tiers={lost.acme.id: "gold"})
        assert await tenancy.tenants.count() == 0


async def test_two_at_once_do_no_harm(lost: Lost) -> None:
    """Nor does a reconcile beside them."""
    async with taken_over(lost.config, lost.installation) as tenancy, opened(lost.config) as other:
        reports = await asyncio.gather(
            tenancy.rebuilding.run(slugs=lost.slugs),
            other.rebuilding.run(slugs=lost.slugs),
            other.internals.provisioner.reconcile(),
        )
        assert all(one.complete for one in reports[:2])
        for slug in ("acme", "globex"):
            assert await bodies(tenancy, slug) == await bodies(other, slug) == [f"of {slug}"]
        assert (await tenancy.internals.provisioner.reconcile(check=True)).clean


async def test_a_replaced_database_is_not_taken(lost: Lost, postgres: Postgres) -> None:
    """It has the tenant's marker, and its role may not connect. Where the role may, neither is taken."""
    place = lost.acme.placement
    assert place is not None
    beside = f"{place.database.rpartition('_')[0]}_{uuid7().hex}"
    owner = f"{place.database.rpartition('_t_')[0]}_owner"
    await postgres.administer(f'CREATE DATABASE "{beside}" TEMPLATE "{place.database}" OWNER "{owner}"')
    await postgres.administer(f'REVOKE ALL ON DATABASE "{beside}" FROM PUBLIC')
    mark = f"tenancy:{lost.installation}:{lost.acme.id}"
    await postgres.administer(f"COMMENT ON DATABASE \"{beside}\" IS '{mark}'")
    await postgres.administer(f'GRANT CONNECT ON DATABASE "{beside}" TO "{place.role}"')
    async with taken_over(lost.config, lost.installation) as tenancy:
        report = await tenancy.rebuilding.run(slugs=lost.slugs)
        assert not report.complete and states(report)[beside] == states(report)[place.database] == "refused"
        assert [tenant.slug async for tenant in tenancy.tenants.iterate()] == ["globex"]
        await postgres.administer(f'REVOKE CONNECT ON DATABASE "{beside}" FROM "{place.role}"')
        report = await tenancy.rebuilding.run(slugs=lost.slugs)
        assert report.complete and states(report) == {beside: "beside", place.database: "taken"}
        assert await bodies(tenancy, "acme") == ["of acme"]
        # a purge drops both
        (kept,) = await tenancy.internals.registry.databases_of(lost.acme.id)
        assert (kept.name, kept.kept_until) == (beside, None)
        await tenancy.tenants.delete("acme")
        await tenancy.tenants.purge("acme")
    assert not await postgres.administer("SELECT FROM pg_database WHERE datname IN (%s, %s)", (beside, place.database))


async def test_a_forged_marker_is_not_believed(lost: Lost, postgres: Postgres) -> None:
    """Whoever may create databases gives them any name and comment, but not the owner that tenants' databases have."""
    place = lost.acme.placement
    assert place is not None
    prefix, stranger = lost.config.name_prefix, uuid4()
    forged = f"{place.database.rpartition('_')[0]}_{uuid7().hex}"
    of_stranger = f"{prefix}_{stranger.hex[-8:]}_t_{uuid7().hex}"
    for name, installation in ((forged, lost.installation), (of_stranger, stranger)):
        await postgres.administer(f'CREATE DATABASE "{name}"')
        await postgres.administer(f"COMMENT ON DATABASE \"{name}\" IS 'tenancy:{installation}:{lost.acme.id}'")
        await postgres.administer(f'GRANT CONNECT ON DATABASE "{name}" TO "{place.role}"')
    async with opened(lost.config) as tenancy:
        report = await tenancy.rebuilding.look()
        assert report.installation == lost.installation and states(report)[place.database] == "found"
        (reason,) = [one.reason for one in report.databases if one.database == forged]
        assert states(report)[forged] == "refused" and "it is owned by" in reason
        # with that owner it would count
        await postgres.administer(f'CREATE ROLE "{prefix}_{stranger.hex[-8:]}_owner"')
        await postgres.administer(f'ALTER DATABASE "{of_stranger}" OWNER TO "{prefix}_{stranger.hex[-8:]}_owner"')
        with pytest.raises(ConfigurationError, match="several installations"):
            await tenancy.rebuilding.look()


async def test_a_restored_tenant_keeps_its_role(lost: Lost, postgres: Postgres) -> None:
    """Its database has another name than its role, which a reconcile does not drop before the tenant is registered."""
    place = lost.acme.placement
    assert place is not None
    restored = f"{place.database.rpartition('_')[0]}_{uuid7().hex}"
    await postgres.administer(f'ALTER DATABASE "{place.database}" RENAME TO "{restored}"')
    async with taken_over(lost.config, lost.installation) as tenancy:
        assert place.role in (await tenancy.internals.provisioner.reconcile()).unknown
        assert (await tenancy.rebuilding.run(slugs=lost.slugs)).complete
        found = (await tenancy.tenants.get("acme")).placement
        assert found is not None and (found.database, found.role) == (restored, place.role)
        assert await bodies(tenancy, "acme") == ["of acme"]
        assert (await tenancy.internals.provisioner.reconcile(check=True)).clean


async def test_a_suspended_tenant_and_one_without_a_role_are_named(lost: Lost, postgres: Postgres) -> None:
    acme, globex = lost.acme.placement, lost.globex.placement
    assert acme is not None and globex is not None
    await postgres.administer(f'REVOKE CONNECT ON DATABASE "{acme.database}" FROM "{acme.role}"')
    await postgres.administer(f'ALTER ROLE "{globex.role}" RENAME TO "{globex.role}_gone"')
    async with opened(lost.config) as tenancy:
        report = await tenancy.rebuilding.look()
    reasons = {one.database: one.reason for one in report.databases}
    assert "its role may not connect" in reasons[acme.database] and "its role is missing" in reasons[globex.database]
    assert not report.complete


async def test_databases_of_another_installation_are_left_alone(
    lost: Lost, tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """One that lives beside the lost one: which is rebuilt has to be named, and its tenants stay its own."""
    name = postgres.new_name()
    neighbour = tenancy_config.replace(control_url=await postgres.create_database(name))
    async with opened(neighbour, initialise=True) as others:
        theirs = (await others.tenants.create("theirs")).tenant
        (nothing,) = [await others.rebuilding.look()]
        assert nothing.databases == () and nothing.others == {lost.installation: 2}
        with pytest.raises(ConfigurationError, match="cannot register databases of another installation"):
            await others.rebuilding.look(installation=lost.installation)
        with pytest.raises(ConfigurationError, match="used already"):
            await others.rebuilding.take_installation(lost.installation)
        async with opened(lost.config) as tenancy:
            with pytest.raises(ConfigurationError, match="several installations"):
                await tenancy.rebuilding.look()
            looked = await tenancy.rebuilding.look(installation=lost.installation)
            assert {one.tenant_id for one in looked.databases} == set(lost.slugs)
        async with taken_over(lost.config, lost.installation) as tenancy:
            report = await tenancy.rebuilding.run(slugs=lost.slugs)
            assert report.complete and {one.tenant_id for one in report.databases} == set(lost.slugs)
            # a row by hand gives nobody the neighbour's data: its marker is checked by each connection
            assert theirs.placement is not None
            async with tenancy.internals.control.transaction() as connection:
                moved = sa.text("UPDATE tenancy.tenants SET database_name = :name WHERE slug = 'acme'")
                await connection.execute(moved, {"name": theirs.placement.database})
            await postgres.administer(
                f'GRANT CONNECT ON DATABASE "{theirs.placement.database}" TO "{lost.acme.placement.role}"'  # type: ignore[union-attr]
            )
            with pytest.raises(MarkerMismatchError):
                await bodies(tenancy, "acme")
        assert await bodies(others, "theirs") == []
    await postgres.drop_database(name)


async def test_a_purged_tenant_stays_purged(
    tenancy_config: TenancyConfig, postgres: Postgres, tmp_path: object
) -> None:
    """As the store of backups says, where the control database knows nothing of it any more."""
    config = tenancy_config.replace(backup={"store": f"file:{tmp_path}"})
    async with losing(config, postgres) as lost, taken_over(lost.config, lost.installation) as tenancy:
        fields = {
            "installation": str(lost.installation),
            "tenant_id": str(lost.acme.id),
            "purged_at": "2026-11-28T14:03:00+00:00",
        }
        path = f"{lost.installation}/tombstones/{lost.acme.id}.json"
        # one that is not signed says nothing, and is not passed over
        await tenancy.backups.store.put(path, json.dumps(fields).encode())
        (found,) = [one for one in (await tenancy.rebuilding.look()).databases if one.tenant_id == lost.acme.id]
        assert found.state == "refused" and f"{path} in file:{tmp_path} is not a tombstone" in (found.reason or "")
        signed = Signer(config.sealing_keys).sign_statement("tenancy-tombstone-1", fields)
        await tenancy.backups.store.put(path, signed.to_bytes())
        report = await tenancy.rebuilding.run(slugs=lost.slugs)
        assert {one.slug: one.state for one in report.databases} == {"acme": "refused", "globex": "taken"}
        assert "was purged (2026-11-28" in next(one.reason for one in report.databases if one.slug == "acme")


async def test_a_server_that_is_down_is_named_and_the_others_are_rebuilt(lost: Lost, postgres: Postgres) -> None:
    servers = {**(lost.config.servers or {}), "down": "postgresql://postgres@127.0.0.1:1/postgres"}
    config = lost.config.replace(servers=servers, default_server="default")
    async with taken_over(config, lost.installation) as tenancy:
        report = await tenancy.rebuilding.run(slugs={**lost.slugs, uuid4(): "elsewhere"})
        assert list(report.unknown) == ["down"] and not report.complete
        assert {one.state for one in report.databases} == {"taken"}
        assert await bodies(tenancy, "acme") == ["of acme"]


async def test_nobody_else_may_have_the_control_database_open(lost: Lost) -> None:
    """They would go on with its former id."""
    async with opened(lost.config), opened(lost.config) as tenancy:
        with pytest.raises(ConfigurationError, match="other processes"):
            await tenancy.rebuilding.take_installation(lost.installation)


async def test_a_plain_administrator_is_enough(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """And a plain role that owns the new control database, which makes no roles."""
    owner = postgres.new_name("owner"), new_password()
    await postgres.administer(f"CREATE ROLE \"{owner[0]}\" LOGIN PASSWORD '{owner[1]}'")
    async with plain_administrator(postgres) as url:
        config = tenancy_config.replace(servers={"default": url})
        async with losing(config, postgres, owner=owner) as lost, taken_over(lost.config, lost.installation) as tenancy:
            report = await tenancy.rebuilding.run(slugs=lost.slugs)
            assert report.complete, report
            assert await bodies(tenancy, "globex") == ["of globex"]
            assert [one.id for one in (await tenancy.tenants.list()).items] == sorted(lost.slugs)
    await postgres.administer(f'DROP ROLE "{owner[0]}"')


async def test_a_viewer_role_of_somebody_else_is_told_with_the_remedy(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """The lost control database's role made it, and the new one's may not use it: once it may, the same goes on."""
    owner = postgres.new_name("owner"), new_password()
    await postgres.administer(f"CREATE ROLE \"{owner[0]}\" LOGIN PASSWORD '{owner[1]}'")
    async with plain_administrator(postgres) as url, losing(tenancy_config, postgres) as lost:
        name = postgres.new_name()
        await postgres.create_database(name, owner=owner[0])
        control = postgres.url(name, user=owner[0], password=owner[1])
        config = lost.config.replace(control_url=control)
        async with opened(config, initialise=True) as tenancy:
            assert await tenancy.rebuilding.take_installation(lost.installation)
        database, administrator = ControlDatabase(control, name_prefix=config.name_prefix), await asyncpg.connect(url)
        try:
            with pytest.raises(AdministratorNeededError) as error:
                await database.upgrade(administrator=administrator)
        finally:
            await administrator.close()
            await database.close()
        async with opened(config) as tenancy:
            with pytest.raises(ConfigurationError, match="take its id over"):
                await tenancy.rebuilding.run(slugs=lost.slugs)
            assert await tenancy.rebuilding.take_installation(lost.installation)
        async with postgres.connect(name) as connection:
            for statement in error.value.statements:
                await connection.execute(statement)
        async with opened(config, initialise=True) as tenancy:
            assert (await tenancy.rebuilding.run(slugs=lost.slugs)).complete
        await postgres.administer(f'DROP DATABASE "{name}" WITH (FORCE)')
    await postgres.administer(f'DROP ROLE "{owner[0]}"')


async def test_data_keys_are_wrapped_for_the_installation(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    wrapping = {"W_WRAPPING_KEYS": "1:" + base64.b64encode(secrets.token_bytes(32)).decode()}
    wrapper = SecretKeyWrapper(EnvironmentSecrets("W_", wrapping))
    config = tenancy_config.replace(encryption_keys=None, secrets={"key_wrapper": wrapper})
    async with losing(config, postgres) as lost, taken_over(lost.config, lost.installation) as tenancy:
        assert (await tenancy.rebuilding.run(slugs=lost.slugs)).complete
        assert await bodies(tenancy, "acme") == ["of acme"]
