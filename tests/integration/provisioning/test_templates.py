"""Templates: built once, complete or not at all, and cloned for tenants and scratch databases."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa

from tenancy_orm import Tenancy
from tenancy_orm.errors import ConfigurationError, MigrationError, TemplateError
from tenancy_orm.migrations import MetadataSchema
from tenancy_orm.provisioning.server_objects import databases
from tests.support.provisioning import Connect, ScriptSchema, Workshop, placement
from tests.support.waiting import HANGS, until

pytestmark = pytest.mark.new_installation


async def test_a_template_is_built_once(workshop: Workshop) -> None:
    """The schema is applied once, even with concurrent requests in several processes."""
    schema = ScriptSchema()
    processes = [workshop.provisioner_of(schema) for _ in range(3)]
    templates = await asyncio.gather(*(process.template("default") for process in processes * 4))
    assert len(set(templates)) == 1
    assert schema.applied == 1
    assert templates[0].revision == "0001"
    assert await workshop.databases() == {templates[0].name}


async def test_a_later_process_knows_the_revision(workshop: Workshop) -> None:
    """A process that did not build the template reads its revision from the server."""
    built = await workshop.provisioner.template("default")
    assert await workshop.provisioner_of().template("default") == built
    assert (await workshop.create("acme")).schema_revision == "0001"


async def test_nobody_can_connect_to_a_template(workshop: Workshop) -> None:
    """Not even the administrator: a connection to it would fail every clone."""
    template = await workshop.provisioner.template("default")
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError):
        async with workshop.admin(template.name):
            pass


async def test_another_schema_has_another_template(workshop: Workshop) -> None:
    """Tenants of a new revision are cloned from a new template; the old one stays for the old release."""
    old = await workshop.provisioner.template("default")
    new = await workshop.provisioner_of(ScriptSchema(fingerprint="second")).template("default")
    assert old.name != new.name
    assert await workshop.databases() == {old.name, new.name}


async def test_other_extensions_have_another_template(workshop: Workshop) -> None:
    """Other extensions give a template another name."""
    plain = await workshop.provisioner.template("default")
    extended = await workshop.provisioner_of(extensions=("plpgsql",)).template("default")
    assert plain.name != extended.name


async def test_an_extension_comes_with_the_template(workshop: Workshop) -> None:
    """An extension is installed before the schema is applied, and every tenant has it."""
    schema = ScriptSchema("CREATE TABLE embeddings (id int, value vector(3))")
    provisioner = workshop.provisioner_of(schema, extensions=("vector",))
    tenant = await provisioner.create(workshop.draft("acme"), key=None)
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO embeddings VALUES (1, '[1,2,3]')")
        assert await connection.fetchval("SELECT value::text FROM embeddings") == "[1,2,3]"


async def test_an_unknown_extension_is_an_error(workshop: Workshop) -> None:
    """The error names the extension, and no template is left."""
    provisioner = workshop.provisioner_of(extensions=("no-such-extension",))
    with pytest.raises(TemplateError, match="no-such-extension"):
        await provisioner.template("default")
    assert await workshop.databases() == set()


async def test_a_failing_schema_leaves_nothing(workshop: Workshop) -> None:
    """The error has its cause, the incomplete template is dropped, and the next attempt builds it again."""
    schema = ScriptSchema("CREATE TABLE a (); SELECT 1/0")
    provisioner = workshop.provisioner_of(schema)
    with pytest.raises(TemplateError, match="division by zero") as caught:
        await provisioner.template("default")
    assert isinstance(caught.value.__cause__, asyncpg.DivisionByZeroError)
    assert await workshop.databases() == set()
    schema.script = "CREATE TABLE a ()"
    await provisioner.template("default")


async def test_the_schemas_own_errors_pass(workshop: Workshop) -> None:
    """The error of a broken migration directory is raised unchanged."""

    class Broken(ScriptSchema):
        async def apply(self, connect: Connect) -> str | None:
            raise MigrationError("revision 0002 failed")

    with pytest.raises(MigrationError, match="0002"):
        await workshop.provisioner_of(Broken()).template("default")
    assert await workshop.databases() == set()


async def test_a_creation_without_a_template_registers_nothing(workshop: Workshop) -> None:
    """If the template cannot be built, no row is written."""
    provisioner = workshop.provisioner_of(ScriptSchema("SELECT 1/0"))
    with pytest.raises(TemplateError):
        await provisioner.create(workshop.draft("acme"), key=None)
    assert (await workshop.slugs(), await workshop.present()) == ({}, set())


async def test_what_a_dead_builder_left_is_built_anew(workshop: Workshop) -> None:
    """A database with the template's name and without the flag is never cloned."""
    name = (await workshop.provisioner.template("default")).name
    async with workshop.admin() as connection:
        await databases.drop(connection, name)
        await connection.execute(f'CREATE DATABASE "{name}"')
    async with workshop.admin(name) as connection:
        await connection.execute("CREATE TABLE half_done ()")
    tenant = await workshop.provisioner_of().create(workshop.draft("acme"), key=None)
    async with workshop.connect(tenant) as connection:
        assert await connection.fetchval("SELECT to_regclass('half_done')") is None
        assert await connection.fetchval("SELECT to_regclass('notes')") is not None


class PausedSchema(ScriptSchema):
    """Waits in the middle of being applied."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE a ()")
        self.reached, self.proceed = asyncio.Event(), asyncio.Event()

    async def apply(self, connect: Connect) -> str | None:
        self.reached.set()
        await self.proceed.wait()
        return await super().apply(connect)


async def test_a_cancelled_build_leaves_nothing_and_the_next_one_takes_over(workshop: Workshop) -> None:
    """If the builder is cancelled, a waiting task builds the template."""
    schema = PausedSchema()
    provisioner = workshop.provisioner_of(schema)
    builder = asyncio.create_task(provisioner.template("default"))
    await schema.reached.wait()
    waiting = asyncio.create_task(provisioner.template("default"))
    schema.reached.clear()
    builder.cancel()
    with pytest.raises(asyncio.CancelledError):
        await builder
    await schema.reached.wait()
    schema.proceed.set()
    template = await waiting
    assert await workshop.databases() == {template.name}


async def test_waiting_for_another_builder_has_a_deadline(workshop: Workshop) -> None:
    """Waiting for a builder that does not end fails at the deadline."""
    schema = PausedSchema()
    builder = asyncio.create_task(workshop.provisioner_of(schema).template("default"))
    await schema.reached.wait()
    impatient = workshop.provisioner_of(schema, provisioning={"timeout": 0.2})
    await impatient.prepare_server("default")
    with pytest.raises(TemplateError, match="was not built within 2 s"):
        await impatient.template("default")
    schema.proceed.set()
    await builder


async def test_an_index_can_be_built_concurrently_while_others_wait(workshop: Workshop) -> None:
    """Waiting processes poll for the lock: waiting in PostgreSQL, they would block CREATE INDEX CONCURRENTLY."""

    class Concurrent(PausedSchema):
        async def apply(self, connect: Connect) -> str | None:
            await super().apply(connect)
            connection = await connect()
            await connection.execute("CREATE INDEX CONCURRENTLY ON a ((1))")
            return "0001"

    schema = Concurrent()
    builder = asyncio.create_task(workshop.provisioner_of(schema).template("default"))
    await schema.reached.wait()
    others = [asyncio.create_task(workshop.provisioner_of(schema).template("default")) for _ in range(3)]

    async def others_wait() -> bool:
        async with workshop.admin() as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_try_advisory_lock%'"
            return int(await connection.fetchval(query)) >= len(others)

    await until(others_wait)
    schema.proceed.set()
    async with asyncio.timeout(HANGS):
        assert len(set(await asyncio.gather(builder, *others))) == 1
    assert schema.applied == 1


async def test_a_connection_that_the_schema_leaves_open_is_closed(workshop: Workshop) -> None:
    """A connection that the schema source leaves open is closed, so that the template can be cloned."""
    kept: list[Any] = []

    class Careless(ScriptSchema):
        async def apply(self, connect: Connect) -> str | None:
            kept.append(await connect())
            return await super().apply(connect)

    await workshop.provisioner_of(Careless()).create(workshop.draft("acme"), key=None)
    assert kept[0].is_closed()


async def test_the_schema_is_applied_as_the_owner(workshop: Workshop) -> None:
    """Every object belongs to the owner role, so that migrations can change it."""
    tenant = await workshop.create("acme")
    async with workshop.admin(placement(tenant).database) as connection:
        owners = await connection.fetch(
            "SELECT DISTINCT pg_get_userbyid(relowner) AS owner FROM pg_class WHERE relname IN ('notes', 'bodies') "
            "UNION SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()"
        )
    assert [row["owner"] for row in owners] == [workshop.names.owner]


@pytest.mark.parametrize("workaround", [None, "CREATE SCHEMA billing", "CREATE SCHEMA IF NOT EXISTS billing"])
async def test_metadata_brings_the_schemas_that_its_tables_are_in(workshop: Workshop, workaround: str | None) -> None:
    """Also those of types and sequences; a listener that creates one, as was needed before, still works."""
    metadata = sa.MetaData()
    sa.Table(
        "invoices",
        metadata,
        sa.Column("id", sa.Integer, sa.Sequence("numbers", schema="Odd counters"), primary_key=True),
        sa.Column("kind", sa.Enum("paid", "open", name="kind", schema="kinds"), nullable=False),
        schema="billing",
    )
    sa.Table("notes", metadata, sa.Column("id", sa.Integer, primary_key=True), schema="public")
    if workaround is not None:
        sa.event.listen(metadata, "before_create", sa.DDL(workaround))  # type: ignore[no-untyped-call]
    tenant = await workshop.provisioner_of(MetadataSchema(metadata)).create(workshop.draft("acme"), key=None)
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes VALUES (1)")
        await connection.execute("INSERT INTO billing.invoices VALUES (nextval('\"Odd counters\".numbers'), 'paid')")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CREATE TABLE billing.mine ()")
    async with workshop.admin(placement(tenant).database) as connection:
        owners = await connection.fetch(
            "SELECT nspname, pg_get_userbyid(nspowner) FROM pg_namespace "
            "WHERE nspname IN ('billing', 'kinds', 'Odd counters')"
        )
    assert dict(owners) == dict.fromkeys(("billing", "kinds", "Odd counters"), workshop.names.owner)


# --- scratch databases ----------------------------------------------------------------------------------------------


async def test_a_scratch_database_is_a_clone_and_is_dropped(workshop: Workshop) -> None:
    """It has the schema, the owner can connect to it, and it is gone afterwards."""
    server = workshop.servers["default"]
    async with workshop.provisioner.scratch("default") as name:
        assert name in await workshop.databases()
        connection = await server.connect_admin(name, role=workshop.names.owner)
        await connection.execute("INSERT INTO notes (body) VALUES ('x'); CREATE TABLE more ()")
        # a connection that is left open does not keep it
    assert name not in await workshop.databases()
    await connection.close()


async def test_a_scratch_database_is_dropped_after_an_error_and_a_cancellation(workshop: Workshop) -> None:
    """A scratch database is dropped after an error and after a cancellation."""
    template = await workshop.provisioner.template("default")
    with pytest.raises(ConfigurationError):
        async with workshop.provisioner.scratch("default"):
            raise ConfigurationError("x")
    reached = asyncio.Event()

    async def work() -> None:
        async with workshop.provisioner.scratch("default"):
            reached.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await workshop.databases() == {template.name}


async def test_a_scratch_database_is_not_open_to_tenants(workshop: Workshop) -> None:
    """Neither tenants nor other roles can connect to a scratch database."""
    tenant = await workshop.create("acme")
    async with workshop.provisioner.scratch("default") as name:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with workshop.connect(tenant, name):
                pass


async def test_scratch_databases_can_be_many(workshop: Workshop) -> None:
    """Each caller gets a scratch database of its own."""
    names = []

    async def work() -> None:
        async with workshop.provisioner.scratch("default") as name:
            names.append(name)

    await asyncio.gather(*(work() for _ in range(4)))
    assert len(set(names)) == 4


@pytest.mark.new_installation
async def test_a_scratch_database_of_a_server_that_nothing_has_prepared(tenancy: Tenancy) -> None:
    """``tenancy adopt --dry-run`` is the first command there: the role that owns the tables is not made yet."""
    provisioner = tenancy.internals.provisioner
    async with provisioner.scratch_databases.open("default", seconds=60.0) as scratch:
        connection = await provisioner.connect_admin("default")
        try:
            owner = "SELECT count(*) FROM pg_database d JOIN pg_roles r ON r.oid = d.datdba WHERE d.datname = $1"
            assert await connection.fetchval(owner + " AND r.rolname LIKE '%\\_owner'", scratch.login.database) == 1
        finally:
            await connection.close()
