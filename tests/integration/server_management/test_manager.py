"""Servers as rows: added, changed and removed while processes run, which follow without a restart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from alembic import command
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import ServerAddresses
from tenancy_orm.control.database import _alembic_config
from tenancy_orm.errors import (
    ConfigurationError,
    PlacementError,
    SecretError,
    ServerIdentityError,
    ServerUnavailableError,
    UnknownServerError,
)
from tenancy_orm.servers.identity import read_identity
from tenancy_orm.servers.rows import ServerRow
from tests.support.postgres import Postgres
from tests.support.provisioning import plain_administrator, running_server
from tests.support.proxy import proxied
from tests.support.waiting import HANGS, until


@pytest.fixture
async def other(tenancy_config: TenancyConfig, tenancy: Tenancy) -> AsyncIterator[Tenancy]:
    """A ``Tenancy`` that has been open for a while, as of another process."""
    async with Tenancy(tenancy_config) as opened:
        await until(lambda: opened.internals.directory.listening)
        yield opened


def row_of(tenancy: Tenancy, name: str) -> ServerRow | None:
    """The row of a server, as a process knows it."""
    found = tenancy.internals.servers.get(name)
    return None if found is None else found.row


async def statement(tenancy: Tenancy, sql: str, **parameters: object) -> None:
    """Change the control database by hand."""
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text(sql), parameters)


async def test_a_server_lives_and_every_process_follows(tenancy: Tenancy, other: Tenancy, postgres: Postgres) -> None:
    """Added, used, drained, activated and removed, each time audited without a password; no process restarts."""
    added = await tenancy.servers.add(
        "eu", postgres.admin_url, region="eu", labels={"disk": "nvme"}, capacity=5, weight=2, same_cluster=True
    )
    assert (added.region, added.labels, added.capacity, added.weight) == ("eu", {"disk": "nvme"}, 5, 2.0)
    await until(lambda: "eu" in other.internals.servers)
    acme = (await other.tenants.create("acme", server="eu")).tenant
    assert acme.placement is not None and acme.placement.server == "eu"
    assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1

    await tenancy.servers.drain("eu")
    await until(lambda: (row := row_of(other, "eu")) is not None and row.state == "drain")
    with pytest.raises(PlacementError, match="server 'eu' accepts no new tenants"):
        await other.tenants.create("globex", server="eu")
    # its tenants are served
    assert await other.fetch_value("SELECT 2", tenant="acme") == 2
    await tenancy.servers.activate("eu")
    await until(lambda: (row := row_of(other, "eu")) is not None and row.state == "active")

    with pytest.raises(ConfigurationError, match="holds 1 tenant, 'acme' for example"):
        await tenancy.servers.remove("eu")
    await tenancy.tenants.delete("acme")
    with pytest.raises(ConfigurationError, match="deleted ones count until they are purged"):
        await tenancy.servers.remove("eu")
    await tenancy.tenants.purge(acme)
    with pytest.raises(ConfigurationError, match="has 1 template; drop them as well"):
        await tenancy.servers.remove("eu")
    await statement(
        tenancy,
        "INSERT INTO tenancy.connection_leases "
        "(server, process, host, pid, granted, guaranteed, wanted, in_use, expires_at) "
        "VALUES ('eu', gen_random_uuid(), 'killed', 1, 1, 1, 1, 0, '-infinity')",
    )
    # of the same cluster: the template is the other server's as well, which a removal of one leaves alone
    await tenancy.servers.remove("eu", templates="forget")
    await until(lambda: "eu" not in other.internals.servers)
    with pytest.raises(UnknownServerError, match="'eu' is not known here"):
        await other.tenants.create("globex", server="eu")
    assert [found.server for found in await tenancy.internals.leases.read()] == ["default"]
    async with tenancy.internals.control.connect() as connection:
        assert not await connection.scalar(text("SELECT count(*) FROM tenancy.connection_leases WHERE host = 'killed'"))
    # the tombstone stays
    assert (await tenancy.tenants.get(acme.id)).slug == "acme"

    entries = [entry for entry in await tenancy.audit.events(limit=100) if entry.action.startswith("server.")]
    assert [entry.action for entry in reversed(entries)] == [
        "server.add",
        "server.drain",
        "server.activate",
        "server.remove",
    ]
    assert entries[-1].after is not None and entries[-1].after["region"] == "eu"
    password = make_url(postgres.admin_url).password
    assert password and password not in json.dumps([[entry.before, entry.after, entry.detail] for entry in entries])


async def test_an_address_changes_under_open_sessions(tenancy: Tenancy, other: Tenancy, postgres: Postgres) -> None:
    """Those end as they are returned; new ones go to the new address, and so do administrators' connections."""
    async with proxied(postgres.admin_url) as first, proxied(postgres.admin_url) as second:
        await tenancy.servers.add("eu", first.url(postgres.admin_url), same_cluster=True)
        await tenancy.tenants.create("acme", server="eu")
        await until(lambda: "eu" in other.internals.servers)
        assert await asyncio.to_thread(other.sync.fetch_value, "SELECT 0", tenant="acme") == 0
        async with other.session("acme") as held:
            await held.execute(text("SELECT 1"))
            before, connector = second.connections, other.internals.router._connectors["eu"]
            await tenancy.servers.update("eu", addresses=second.url(postgres.admin_url))
            await until(lambda: other.internals.servers["eu"] is not connector.server)
            # the held session goes on at the former address
            await held.execute(text("SELECT 2"))
            first_seen = first.connections
            assert await other.fetch_value("SELECT 3", tenant="acme") == 3
            assert second.connections > before and first.connections == first_seen
            assert connector.budget.statistics().in_use == 1
        await until(lambda: connector.budget.open == 0)
        first.refuse()  # nothing needs it any more
        await other.internals.provisioner.end_excessive_sessions()
        await tenancy.tenants.suspend("acme")
        await tenancy.tenants.activate("acme")
        assert await other.fetch_value("SELECT 4", tenant="acme") == 4
        assert await asyncio.to_thread(other.sync.fetch_value, "SELECT 5", tenant="acme") == 5
        assert other.internals.router.statistics().servers["eu"].open >= 1
        # a change of anything else replaces nothing
        same = other.internals.servers["eu"]
        await tenancy.servers.update("eu", weight=3)
        await until(lambda: (row := row_of(other, "eu")) is not None and row.weight == 3)
        assert other.internals.servers["eu"] is same


async def test_a_lost_listener_reads_the_rows_again(tenancy: Tenancy, other: Tenancy, postgres: Postgres) -> None:
    """Once it is back; and so does a look for a server that is not known."""
    other.internals.servers._source, source = None, other.internals.servers._source
    await tenancy.servers.add("eu", postgres.admin_url, same_cluster=True)
    other.internals.servers._source = source
    assert "eu" not in other.internals.servers
    async with postgres.connect(make_url(tenancy.config.control_url).database or "") as admin:
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name LIKE '%tenancy-listener' AND datname = current_database()"
        )
    await until(lambda: "eu" in other.internals.servers)
    await tenancy.servers.remove("eu", templates="forget")
    await until(lambda: "eu" not in other.internals.servers)
    await statement(tenancy, "ALTER TABLE tenancy.servers DISABLE TRIGGER servers_notify")
    await tenancy.servers.add("eu", postgres.admin_url, same_cluster=True)
    with pytest.raises(UnknownServerError):
        other.internals.servers["eu"]
    await until(lambda: "eu" in other.internals.servers)


async def test_sealed_addresses_belong_to_their_server(tenancy: Tenancy, postgres: Postgres) -> None:
    """The control database never has the password; with two rows swapped, both are refused; a new key seals all."""
    password = make_url(postgres.admin_url).password or ""
    pooled = ServerAddresses(admin=postgres.admin_url, tenants="postgresql://pooler.example:6432")
    await tenancy.servers.add("eu", postgres.admin_url, same_cluster=True)
    await tenancy.servers.add("us", pooled, same_cluster=True)
    async with tenancy.internals.control.connect() as connection:
        rows = (await connection.execute(text("SELECT s::text, sealed_addresses FROM tenancy.servers s"))).all()
    assert not any(password in shown or password.encode() in (sealed or b"") for shown, sealed in rows)
    assert password not in repr(await tenancy.servers.list())

    swap = (
        "UPDATE tenancy.servers s SET sealed_addresses = o.sealed_addresses FROM tenancy.servers o "
        "WHERE (s.name, o.name) IN (('eu', 'us'), ('us', 'eu'))"
    )
    await statement(tenancy, swap)
    async with Tenancy(tenancy.config) as opened:
        for name in ("eu", "us"):
            with pytest.raises(SecretError, match=f"the addresses of server '{name}'.*belongs to another server"):
                opened.internals.servers[name]
        assert [known.source for known in await opened.servers.list()] == ["settings", "row", "row"]
    # a process that knows them goes on with what it knows
    await tenancy.internals.servers.refresh()
    assert str(tenancy.internals.servers["us"].traffic.dsn) == "pooler.example:6432/"
    report = await tenancy.secrets.reseal()
    assert not report.failed
    await statement(tenancy, swap)
    await tenancy.internals.servers.refresh()

    tenancy.internals.servers._source._keyring.add_keys({"2": bytes(32)})  # type: ignore[union-attr]
    assert await tenancy.secrets.keys_in_use() == {"1"}
    await statement(tenancy, "UPDATE tenancy.servers SET sealed_addresses = 'damaged' WHERE name = 'us'")
    report = await tenancy.secrets.reseal()
    assert (report.resealed, set(report.failed), report.keys_in_use) == (1, {"server us"}, frozenset({"2"}))
    await tenancy.internals.servers.refresh()
    assert tenancy.internals.servers["eu"].dsn.password == password


async def test_a_server_changes_one_address_and_keeps_the_others(tenancy: Tenancy, postgres: Postgres) -> None:
    """From this process's settings where the row has none; two that change at the same time do not undo each other."""
    pooler, standby = "postgresql://pooler.example:6432", "postgresql://standby.example"

    async def known() -> ServerAddresses:
        row = row_of(tenancy, "default")
        assert row is not None
        return tenancy.servers._addresses.open(row)

    await tenancy.servers.update("default", tenants_address=pooler)
    assert await known() == ServerAddresses(admin=postgres.admin_url, tenants=pooler)
    await tenancy.servers.update("default", replicas=[standby])
    named = postgres.admin_url + ("&" if "?" in postgres.admin_url else "?") + "application_name=moved"
    await tenancy.servers.update("default", addresses=named)
    assert await known() == ServerAddresses(admin=named, tenants=pooler, replicas=(standby,))
    done = await asyncio.gather(
        tenancy.servers.update("default", tenants_address=None),
        tenancy.servers.update("default", replicas=()),
        return_exceptions=True,
    )
    failed = [one for one in done if isinstance(one, BaseException)]
    found = await known()
    if failed:
        assert "changed at the same time: try again" in str(failed[0])
    assert (found.tenants is None) + (not found.replicas) == 2 - len(failed)


async def test_rows_alone_need_no_setting(tenancy_config: TenancyConfig, tenancy: Tenancy, postgres: Postgres) -> None:
    """An address in a row wins over a setting, which is said; a process without the setting needs it in the row."""
    alone = tenancy_config.replace(servers=None)
    await tenancy.tenants.create("acme")
    # without the setting, default is the control database's server: a row has no address of its own yet
    listed = {known.name: known for known in await tenancy.servers.list()}
    assert listed["default"].source == "settings" and not listed["default"].warnings
    with pytest.raises(ConfigurationError, match="is in servers, the setting"):
        await tenancy.servers.remove("default")
    async with proxied(postgres.admin_url) as proxy:
        elsewhere = tenancy_config.replace(servers={"default": proxy.url(postgres.admin_url)})
        await tenancy.servers.update("default", from_settings=True)
        proxy.refuse()
        async with Tenancy(elsewhere) as opened:
            [known] = await opened.servers.list()
            assert known.source == "row"
            assert known.warnings == (
                "its address is in its row; the one in the settings of this process differs, and is ignored",
            )
            assert await opened.fetch_value("SELECT 1", tenant="acme") == 1
    await tenancy.servers.add("eu", postgres.admin_url, same_cluster=True)
    await tenancy.tenants.delete("acme")
    await tenancy.tenants.purge("acme")
    async with Tenancy(alone) as opened:
        await opened.servers.remove("default", templates="forget")
        assert list(opened.internals.servers) == ["eu"]
    async with Tenancy(alone) as opened:
        # it is not added again
        assert [known.name for known in await opened.servers.list()] == ["eu"]
        placement = (await opened.tenants.create("globex")).tenant.placement
        assert placement is not None and placement.server == "eu"
    with pytest.raises(ConfigurationError, match="default_server is 'asia', which is not among the servers: eu"):
        await Tenancy(alone.replace(default_server="asia")).open()
    # one that is known by another process's settings alone
    async with Tenancy(tenancy_config):
        pass  # adds its row again
    async with Tenancy(alone.replace(servers={"eu": postgres.admin_url})) as opened:
        known = await opened.servers.get("default")
        assert (known.source, known.warnings[0]) == (None, "this process does not know its address")
        with pytest.raises(UnknownServerError, match="tenancy servers update default --from-settings"):
            opened.internals.servers["default"]


async def test_what_cannot_hold_tenants_is_refused(tenancy: Tenancy, postgres: Postgres) -> None:
    """A name that is taken or none, a cluster that is known, an administrator without rights, and malformed values."""
    with pytest.raises(ConfigurationError, match=r"leads to the cluster of server 'default'.*--same-cluster"):
        await tenancy.servers.add("eu", postgres.admin_url)
    with pytest.raises(ConfigurationError, match="there is a server 'default' already"):
        await tenancy.servers.add("default", postgres.admin_url)
    for name in ("EU", "", "a b", "x" * 32):
        with pytest.raises(ConfigurationError, match="is not the name of a server"):
            await tenancy.servers.add(name, postgres.admin_url)
    for options, message in [
        ({"region": "E U"}, "not the name of a region"),
        ({"weight": 0}, "weight must be"),
        ({"weight": float("nan")}, "weight must be"),
        ({"capacity": -1}, "capacity must be"),
        ({"capacity": True}, "capacity must be"),
        ({"max_connections": 0}, "max_connections must be"),
        ({"labels": {"a": 1}}, "labels must be text"),
        ({"labels": {"a": "\x00"}}, "NUL"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            await tenancy.servers.add("eu", postgres.admin_url, same_cluster=True, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="the address of a server: admin") as caught:
        await tenancy.servers.add("eu", "hunter2")
    assert "hunter2" not in str(caught.value)
    role = postgres.new_name("powerless")
    async with postgres.connect() as admin:
        await admin.execute(f"CREATE ROLE \"{role}\" LOGIN PASSWORD 'secret'")
        await admin.execute(f'GRANT CONNECT ON DATABASE postgres TO "{role}"')
        try:
            with pytest.raises(ConfigurationError, match="needs CREATEDB and CREATEROLE"):
                url = postgres.url("postgres", user=role, password="secret")
                await tenancy.servers.add("eu", url, same_cluster=True)
        finally:
            await admin.execute(f'REVOKE CONNECT ON DATABASE postgres FROM "{role}"')
            await admin.execute(f'DROP ROLE "{role}"')
    assert list(tenancy.internals.servers) == ["default"]


async def test_an_address_that_leads_to_another_cluster_is_refused(
    tenancy_config: TenancyConfig, tenancy: Tenancy, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """When it is given, when a process opens, and by a login later; unless an operator says that it has moved."""
    await tenancy.tenants.create("acme")
    with running_server(18, "second") as second:
        url = second.admin_url
        with pytest.raises(ServerIdentityError, match=r"another cluster answers.*--accept-identity"):
            await tenancy.servers.update("default", addresses=url)
        with pytest.raises(ConfigurationError, match="names the database"):
            await tenancy.servers.update(
                "default", addresses=make_url(url).set(database="template1").render_as_string(False)
            )
        async with Tenancy(tenancy_config.replace(servers={"default": url})) as opened:
            assert "the address of server default leads to another cluster" in caplog.text
            with pytest.raises(ServerIdentityError, match="than the one that holds its tenants"):
                await opened.internals.servers["default"].connect_admin()
        await tenancy.servers.update("default", addresses=url, accept_identity=True)
        known = await tenancy.servers.get("default")
        assert known.source == "row"
        await tenancy.servers.update("default", addresses=postgres.admin_url, accept_identity=True)
        assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1
        # where the identifier may not be read, as on a managed server, a marker of this installation's stands for it
        async with (
            plain_administrator(second) as plain,
            second.connect(make_url(plain).database or "") as admin,
        ):
            await admin.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
            async with second.connect("postgres") as there:
                await there.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
                await there.execute(f'GRANT CONNECT ON DATABASE postgres TO "{make_url(plain).username}"')
            unknown = make_url(plain).set(database="postgres").render_as_string(False)
            with pytest.raises(ServerIdentityError, match=r"can read .* and not system:.*--accept-identity"):
                await tenancy.servers.update("default", addresses=unknown)
            marked = (await tenancy.servers.add("marked", plain, same_cluster=True)).identity
            assert str(marked).startswith("marker:")
            assert (await tenancy.servers.update("marked", addresses=plain)).identity == marked
            with pytest.raises(ConfigurationError, match="leads to the cluster of server 'marked'"):
                await tenancy.servers.add("again", plain)
            await admin.execute(f"COMMENT ON ROLE {tenancy.internals.provisioner.names.owner} IS 'tenancy server x'")
            with pytest.raises(ServerIdentityError, match="another cluster answers, marker:x"):
                await tenancy.servers.update("marked", addresses=plain)
            await admin.execute(f"COMMENT ON ROLE {tenancy.internals.provisioner.names.owner} IS NULL")
            with pytest.raises(ServerIdentityError, match="another cluster answers, one without a marker"):
                await tenancy.internals.servers["marked"].connect_admin()
        # of two that add it at once, one is refused
        racing = await asyncio.gather(
            *(tenancy.servers.add(name, url) for name in ("one", "two")), return_exceptions=True
        )
        [refused] = [outcome for outcome in racing if isinstance(outcome, BaseException)]
        assert "leads to the cluster of server" in str(refused), refused


async def test_a_server_that_stops_answering_after_a_login_is_given_up(
    tenancy: Tenancy, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question which cluster it is has the bound of the login, when a command verifies an address too."""
    async with proxied(postgres.admin_url) as proxy:
        url = proxy.url(postgres.admin_url) + "?connect_timeout=1"

        async def freeze(*_: object) -> str | None:
            proxy.swallow()
            return await read_identity(*_)  # type: ignore[arg-type]

        await tenancy.servers.update("default", addresses=url)
        monkeypatch.setattr("tenancy_orm.servers.server.read_identity", freeze)
        for work in (
            tenancy.internals.servers["default"].connect_admin(),
            tenancy.servers.update("default", addresses=url),
        ):
            async with asyncio.timeout(HANGS):
                with pytest.raises(ServerUnavailableError, match="no answer in time"):
                    await work
            proxy.restore()


async def test_a_region_is_refused_by_code_and_by_the_database(tenancy: Tenancy, postgres: Postgres) -> None:
    """A tenant of a region is never on a server outside, whichever of the two rows changes."""
    await tenancy.servers.add("eu", postgres.admin_url, region="eu", same_cluster=True)
    await tenancy.servers.add("us", postgres.admin_url, region="us", same_cluster=True)
    acme = (await tenancy.tenants.create("acme", region="eu")).tenant
    assert (acme.region, acme.placement and acme.placement.server) == ("eu", "eu")
    with pytest.raises(PlacementError, match="is in region us, and the tenant belongs to region eu"):
        await tenancy.tenants.create("globex", region="eu", server="us")
    with pytest.raises(PlacementError, match="there is no server in region asia"):
        await tenancy.tenants.create("globex", region="asia")
    with pytest.raises(PlacementError, match="is in another region than the tenant's"):
        await tenancy.tenants.update("acme", region="us")
    with pytest.raises(PlacementError, match="holds tenants of region 'eu'"):
        await tenancy.servers.update("eu", region="us")
    for sql in (
        "UPDATE tenancy.tenants SET server = 'us'",
        "UPDATE tenancy.tenants SET region = 'us'",
        "UPDATE tenancy.servers SET region = NULL WHERE name = 'eu'",
    ):
        with pytest.raises(DBAPIError, match=r"cannot be on server|has tenants of region"):
            await statement(tenancy, sql)
    # what happens without the trigger
    await statement(tenancy, "ALTER TABLE tenancy.tenants DISABLE TRIGGER tenants_placement")
    await statement(tenancy, "UPDATE tenancy.tenants SET server = 'us'")
    await statement(tenancy, "UPDATE tenancy.tenants SET server = 'eu'")
    assert [tenant.slug for tenant in (await tenancy.tenants.list(region="eu")).items] == ["acme"]
    assert await tenancy.tenants.count(region="us") == 0
    assert (await tenancy.tenants.update("acme", region="")).region is None


async def test_creations_race_for_the_last_place(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """The control database decides; those that lose are placed elsewhere, or told why not."""
    config = tenancy_config.replace(placement="fewest_tenants")
    async with Tenancy(config) as tenancy:
        await tenancy.servers.add("eu", postgres.admin_url, capacity=2, weight=1000, same_cluster=True)
        made = await asyncio.gather(*(tenancy.tenants.create(f"t{number}") for number in range(5)))
        servers = sorted(one.tenant.placement.server for one in made if one.tenant.placement)
        assert servers == ["default"] * 3 + ["eu"] * 2
        await tenancy.servers.update("default", capacity=4)
        outcomes = await asyncio.gather(
            *(tenancy.tenants.create(f"u{number}") for number in range(3)), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert len(refused) == 2 and all(isinstance(one, PlacementError) for one in refused)
        with pytest.raises(PlacementError, match="default: is full: it holds 4 tenants of 4; eu: is full") as caught:
            await tenancy.tenants.create("v")
        assert set(caught.value.refused) == {"default", "eu"}
        assert await tenancy.tenants.count() == 6
        explained = await tenancy.servers.explain("t0")
        assert explained.current in ("default", "eu") and explained.chosen == explained.current


async def test_a_process_of_the_former_version_drains_too(tenancy: Tenancy) -> None:
    """``accepts_tenants``, which it reads and sets, and the state are the same."""
    await statement(tenancy, "UPDATE tenancy.servers SET accepts_tenants = false")
    assert (await tenancy.servers.get("default")).row.state == "drain"
    await tenancy.servers.activate("default")
    async with tenancy.internals.control.connect() as connection:
        assert await connection.scalar(text("SELECT accepts_tenants FROM tenancy.servers")) is True


async def test_an_installation_of_the_former_version_is_upgraded_with_its_tenants(
    tenancy_config: TenancyConfig, postgres: Postgres, empty_url: str
) -> None:
    """On two servers, with a tombstone and a server that takes no tenants; its own role is no superuser."""
    owner, database = postgres.new_name("control"), make_url(empty_url).database or ""
    async with postgres.connect() as admin:
        await admin.execute(f"CREATE ROLE \"{owner}\" LOGIN PASSWORD 'secret'")
        await admin.execute(f'ALTER DATABASE "{database}" OWNER TO "{owner}"')
    config = tenancy_config.replace(
        control_url=postgres.url(database, user=owner, password="secret"),
        servers={"default": postgres.admin_url, "eu": postgres.admin_url},
        default_server="default",
    )
    opened = Tenancy(config)
    await opened.open(initialise=True)
    try:
        await opened.servers.add("gone", postgres.admin_url, same_cluster=True)
        await opened.tenants.create("acme")
        await opened.tenants.create("globex", server="eu")
        lost = (await opened.tenants.create("lost", server="gone")).tenant
        await opened.tenants.delete("lost")
        await opened.tenants.purge(lost)
        await opened.servers.remove("gone", templates="forget")
        # as the former version had it: there the tombstone's server is a row
        async with opened.internals.control.connect() as connection:
            await connection.run_sync(lambda sync: command.downgrade(_alembic_config(sync), "0014_schedules"))
            await connection.execute(text("UPDATE tenancy.servers SET accepts_tenants = false WHERE name = 'eu'"))
            await connection.commit()
    finally:
        await opened.close()
    opened = Tenancy(config)
    await opened.open(initialise=True)
    try:
        assert {known.name: (known.row.state, known.row.tenants) for known in await opened.servers.list()} == {
            "default": ("active", 1),
            "eu": ("drain", 1),
            "removed": ("drain", 0),
        }
        for slug in ("acme", "globex"):
            assert await opened.fetch_value("SELECT 1", tenant=slug) == 1
        with pytest.raises(PlacementError, match="accepts no new tenants"):
            await opened.tenants.create("initech", server="eu")
        await opened.servers.remove("removed")
        assert (await opened.tenants.get(lost.id)).status == "purged"
        for slug in ("acme", "globex"):
            tenant = await opened.tenants.get(slug)
            await opened.tenants.delete(slug)
            await opened.tenants.purge(tenant)
    finally:
        await opened.close()
    async with postgres.connect() as admin, postgres.connect(database) as there:
        await there.execute(f'REASSIGN OWNED BY "{owner}" TO CURRENT_USER; DROP OWNED BY "{owner}"')
        await admin.execute(f'DROP ROLE "{owner}"')
