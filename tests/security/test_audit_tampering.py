"""The audit log: the application's role can only append, its owner little more, and a superuser is found out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tenancy_orm.control.audit import Actor
from tenancy_orm.control.grants import (
    APPLICATION_FUNCTIONS,
    APPLICATION_TABLES,
    grant_application,
    revoke_application,
)
from tenancy_orm.control.registry import sqlstate_of
from tenancy_orm.errors import AuditError, ConfigurationError
from tests.support.postgres import Postgres
from tests.support.quotas import QuotaPlane, quota_plane, race

PASSWORD = "of the application alone"
DENIED = "42501"
REFUSED = "TN010"


@dataclass
class Restricted:
    """The control database as its owner, and as the application's own role over SCRAM."""

    owner: QuotaPlane
    app: QuotaPlane
    role: str
    app_url: str


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[QuotaPlane]:
    async with quota_plane(control_url) as opened:
        yield opened


@pytest.fixture
async def restricted(postgres: Postgres, plane: QuotaPlane) -> AsyncIterator[Restricted]:
    role = postgres.new_name("app")
    async with postgres.connect() as admin:
        await admin.execute(f"CREATE ROLE \"{role}\" LOGIN PASSWORD '{PASSWORD}' NOSUPERUSER NOCREATEDB NOCREATEROLE")
        stored = await admin.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = $1", role)
        assert stored.startswith("SCRAM-SHA-256$")
    await plane.sql(f'REVOKE ALL ON DATABASE "{plane.control.database}" FROM PUBLIC')
    await plane.control.grant_application(role)
    url = postgres.url(plane.control.database, user=role, password=PASSWORD)
    try:
        async with quota_plane(url, initialise=False) as app:
            yield Restricted(plane, app, role, url)
    finally:
        async with postgres.connect(plane.control.database) as admin:
            await admin.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')


async def state_of(plane: QuotaPlane, statement: str) -> str | None:
    """Run a statement; returns the SQLSTATE it fails with, or None."""
    try:
        await plane.sql(statement)
    except DBAPIError as error:
        return sqlstate_of(error)
    return None


# --- the application's role -----------------------------------------------------------------------------------------

ATTACKS = {
    "update": "UPDATE tenancy.audit_log SET actor_id = 'nobody'",
    "delete": "DELETE FROM tenancy.audit_log",
    "truncate": "TRUNCATE tenancy.audit_log",
    "insert": "INSERT INTO tenancy.audit_log SELECT * FROM tenancy.audit_log",
    "copy": "COPY tenancy.audit_log FROM PROGRAM 'true'",
    "partition": "DELETE FROM tenancy.audit_log_{month}",
    "truncate a partition": "TRUNCATE tenancy.audit_log_{month}",
    "read a partition": "SELECT * FROM tenancy.audit_log_{month}",
    "disable triggers": "ALTER TABLE tenancy.audit_log DISABLE TRIGGER ALL",
    "disable a partition's": "ALTER TABLE tenancy.audit_log_{month} DISABLE TRIGGER ALL",
    "drop a trigger": "DROP TRIGGER audit_log_refuse ON tenancy.audit_log",
    "replica": "SET session_replication_role = replica",
    "drop": "DROP TABLE tenancy.audit_log",
    "detach": "ALTER TABLE tenancy.audit_log DETACH PARTITION tenancy.audit_log_{month}",
    "rename": "ALTER TABLE tenancy.audit_log RENAME TO gone",
    "lock": "LOCK TABLE tenancy.audit_log IN EXCLUSIVE MODE",
    "rule": "CREATE RULE nothing AS ON INSERT TO tenancy.audit_log DO INSTEAD NOTHING",
    "trigger": "CREATE TRIGGER t BEFORE INSERT ON tenancy.audit_log EXECUTE FUNCTION tenancy.audit_refuse()",
    "move the head": "UPDATE tenancy.audit_head SET sequence = 0",
    "lock the head": "SELECT * FROM tenancy.audit_head FOR UPDATE",
    "remove the head": "DELETE FROM tenancy.audit_head",
    "forge a cut": "INSERT INTO tenancy.audit_cuts VALUES (1, now(), sha256(''), now(), '1', '')",
    "remove a cut": "DELETE FROM tenancy.audit_cuts",
    "replace append": "CREATE OR REPLACE FUNCTION tenancy.audit_append(text, uuid, text, text, text, jsonb, jsonb, "
    "jsonb, text, text) RETURNS bigint LANGUAGE sql AS 'SELECT 1'",
    "drop append": "DROP FUNCTION tenancy.audit_append",
    "a table of its own in the schema": "CREATE TABLE tenancy.mine (id int)",
    "grant itself": "GRANT ALL ON tenancy.audit_log TO CURRENT_USER",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
async def test_the_applications_role_cannot_touch_the_log(restricted: Restricted, attack: str) -> None:
    """PostgreSQL refuses each; the log still verifies, and the role can still append and read."""
    await restricted.owner.append(actor=Actor("operator", "ada"))
    month = (await restricted.owner.sql("SELECT to_char(now() AT TIME ZONE 'UTC', '\"y\"YYYY\"m\"MM')"))[0][0]
    state = await state_of(restricted.app, attack.format(month=month))
    # a GRANT without the right to it is, by the standard, a warning
    assert state == (None if attack.startswith("GRANT") else DENIED)
    assert await state_of(restricted.app, "DELETE FROM tenancy.audit_log") == DENIED
    await restricted.app.append(actor=Actor("key", "k1"))
    events = await restricted.app.audit.events()
    assert [event.actor.id for event in events] == ["k1", "ada"]
    assert (await restricted.app.audit.verify()).entries == 2


async def test_without_the_restriction_the_attacks_work(plane: QuotaPlane) -> None:
    """The statements above are real: a superuser with the triggers off rewrites and empties the log."""
    await plane.append(actor=Actor("operator", "ada"))
    await disarm(plane)
    for statement in (
        "INSERT INTO tenancy.audit_log SELECT * FROM tenancy.audit_log WHERE false",
        ATTACKS["update"],
        ATTACKS["delete"],
        ATTACKS["truncate"],
    ):
        assert await state_of(plane, statement) is None
    assert await plane.audit.events() == []


async def test_append_lets_nobody_choose_number_time_hash_or_database_role(restricted: Restricted) -> None:
    """They are no arguments, and neither SET ROLE, a search path nor a function of the caller's changes them."""
    arguments = await restricted.owner.sql(
        "SELECT proargnames FROM pg_proc WHERE oid = 'tenancy.audit_append'::regproc"
    )
    assert not {"p_sequence", "p_occurred_at", "p_hash", "p_previous_hash", "p_database_role"} & set(arguments[0][0])
    # which the role lacks as well
    await restricted.owner.sql(f'GRANT TEMP ON DATABASE "{restricted.owner.control.database}" TO "{restricted.role}"')
    async with restricted.app.control.transaction() as conn:
        for statement in (
            "CREATE TEMP TABLE audit_head (sequence bigint)",
            "CREATE FUNCTION pg_temp.clock_timestamp() RETURNS timestamptz LANGUAGE sql RETURN timestamptz 'epoch'",
            "CREATE FUNCTION pg_temp.sha256(bytea) RETURNS bytea LANGUAGE sql AS 'SELECT $1'",
            "SET LOCAL search_path = pg_temp, pg_catalog, tenancy",
            "SET LOCAL timezone = 'Pacific/Kiritimati'",
        ):
            await conn.exec_driver_sql(statement)
        await restricted.app.audit.append(conn, action="test.done")
    [event] = await restricted.owner.audit.events()
    assert event.database_role == restricted.role
    fresh = await restricted.owner.sql("SELECT occurred_at > now() - interval '1 minute' FROM tenancy.audit_log")
    assert fresh == [(True,)]
    assert (await restricted.owner.audit.verify()).ok


async def test_a_function_without_a_pinned_search_path_is_fooled(restricted: Restricted) -> None:
    """What the test above would show without the pin: the caller's temporary table is taken for the real one."""
    await restricted.owner.sql("CREATE TABLE public.ledger AS SELECT 'true'::text AS entry")
    for name, pin in (("unpinned", ""), ("pinned", "SET search_path = public, pg_temp")):
        await restricted.owner.sql(
            f"CREATE FUNCTION public.{name}() RETURNS text LANGUAGE plpgsql SECURITY DEFINER {pin} AS "
            "$$BEGIN RETURN (SELECT entry FROM ledger); END$$"
        )
    await restricted.owner.sql(f'GRANT TEMP ON DATABASE "{restricted.owner.control.database}" TO "{restricted.role}"')
    async with restricted.app.control.transaction() as conn:
        await conn.exec_driver_sql("CREATE TEMP TABLE ledger AS SELECT 'forged'::text AS entry")
        await conn.exec_driver_sql("GRANT SELECT ON ledger TO PUBLIC")
        assert await conn.scalar(text("SELECT public.unpinned()")) == "forged"
        assert await conn.scalar(text("SELECT public.pinned()")) == "true"
    unpinned = await restricted.owner.sql(
        "SELECT p.proname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'tenancy' "
        "AND p.prosecdef AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY(p.proconfig), false)"
    )
    assert unpinned == []


async def test_the_role_has_exactly_what_the_grants_say(restricted: Restricted) -> None:
    """Nothing more on any table, view or function of the schema; and every table and view is listed."""
    tables = await restricted.owner.sql(
        "SELECT c.relname, array_agg(p.privilege ORDER BY p.privilege) "
        "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "CROSS JOIN (VALUES ('SELECT'), ('INSERT'), ('UPDATE'), ('DELETE'), ('TRUNCATE'), ('REFERENCES'), ('TRIGGER')) "
        "AS p (privilege) WHERE n.nspname = 'tenancy' AND c.relkind IN ('r', 'p', 'v', 'm') "
        f"AND has_table_privilege('{restricted.role}', c.oid, p.privilege) GROUP BY 1"
    )
    expected = {name: sorted(text.split(", ")) for name, text in APPLICATION_TABLES.items()}
    assert {row[0]: list(row[1]) for row in tables} == expected
    everything = await restricted.owner.sql(
        "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = 'tenancy' AND c.relkind IN ('r', 'p', 'v', 'm') AND NOT c.relispartition"
    )
    assert {row[0] for row in everything} == set(APPLICATION_TABLES)
    definers = await restricted.owner.sql(
        "SELECT p.proname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace "
        f"WHERE n.nspname = 'tenancy' AND p.prosecdef AND has_function_privilege('{restricted.role}', p.oid, 'EXECUTE')"
    )
    assert {row[0] for row in definers} == set(APPLICATION_FUNCTIONS)


async def test_the_application_works_as_its_role(restricted: Restricted) -> None:
    """Registering a tenant, counting, leasing, holding, appending, reading: all that it needs it may do."""
    app = restricted.app
    await app.control.synchronise(app.config.tiers, {"default": ("127.0.0.1", 5432)})
    tenant = await app.tenant("acme", quotas={"jobs": {"amount": 1, "period": "concurrent"}})
    await app.quotas.set(tenant, {"users": 5})
    await app.quotas.consume(tenant, "users", key="once")
    await app.quotas.release(tenant, "users")
    await app.quotas.leased(tenant, "api_calls").consume()
    async with app.quotas.hold(tenant, "jobs"):
        assert len(await app.quotas.usage(tenant)) == 4
    await app.quotas.clean()
    await app.quotas.utilisation()
    assert (await app.audit.verify(await app.audit.export_checkpoint())).ok
    assert await app.audit.ensure_partitions() == 0
    assert await app.audit.summary() != []


async def test_the_applications_role_cannot_remove_old_months(restricted: Restricted) -> None:
    """Retention is the owner's business; the error says so."""
    await restricted.app.append()
    with pytest.raises(AuditError, match="owner"):
        await restricted.app.audit.prune(before=datetime(9999, 1, 1, tzinfo=UTC))
    assert (await restricted.owner.audit.verify()).entries == 1


async def test_grants_can_be_repeated_and_taken_back(restricted: Restricted) -> None:
    """Whatever else the role was given is taken away, and in the end everything."""
    await restricted.owner.sql(f'GRANT ALL ON ALL TABLES IN SCHEMA tenancy TO "{restricted.role}"')
    assert await state_of(restricted.app, "UPDATE tenancy.audit_head SET sequence = sequence") is None
    async with restricted.owner.control.transaction() as conn:
        await grant_application(conn, restricted.role)
    assert await state_of(restricted.app, "UPDATE tenancy.audit_head SET sequence = sequence") == DENIED
    async with restricted.owner.control.transaction() as conn:
        await revoke_application(conn, restricted.role)
    assert await state_of(restricted.app, "SELECT 1 FROM tenancy.tenants") == DENIED


async def test_a_role_that_nothing_could_hold_back_is_refused(plane: QuotaPlane) -> None:
    """A superuser or an owner is not restricted by grants, so saying so would be a lie."""
    owner = (await plane.sql("SELECT current_user"))[0][0]
    for role in (owner, "no such role"):
        with pytest.raises(ConfigurationError):
            async with plane.control.transaction() as conn:
                await grant_application(conn, role)


# --- the owner ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["audit_log", "audit_log_{month}", "audit_cuts"])
@pytest.mark.parametrize("verb", ["UPDATE {} SET sequence = 1", "DELETE FROM {}", "TRUNCATE {}"])
@pytest.mark.parametrize("replica", [False, True])
async def test_triggers_refuse_the_owner_too(plane: QuotaPlane, table: str, verb: str, replica: bool) -> None:
    """On the log, on each partition by name, on the cuts; and where replication's role would silence triggers."""
    await plane.append()
    month = (await plane.sql("SELECT to_char(now() AT TIME ZONE 'UTC', '\"y\"YYYY\"m\"MM')"))[0][0]
    async with plane.control.engine.begin() as conn:
        if replica:
            await conn.exec_driver_sql("SET LOCAL session_replication_role = replica")
        with pytest.raises(DBAPIError) as caught:
            await conn.exec_driver_sql(verb.format("tenancy." + table.format(month=month)))
        await conn.rollback()
    assert sqlstate_of(caught.value) == REFUSED
    assert (await plane.audit.verify()).entries == 1


async def test_the_head_cannot_be_removed(plane: QuotaPlane) -> None:
    """Without it the next entry would begin another chain."""
    for statement in ("DELETE FROM tenancy.audit_head", "TRUNCATE tenancy.audit_head"):
        assert await state_of(plane, statement) == REFUSED
    assert await state_of(plane, "INSERT INTO tenancy.audit_head SELECT * FROM tenancy.audit_head") == "23505"


# --- a superuser ----------------------------------------------------------------------------------------------------

REWRITE = """
DO $$
DECLARE
    v_entry tenancy.audit_log;
    v_hash bytea := decode(repeat('00', 32), 'hex');
BEGIN
    FOR v_entry IN SELECT * FROM tenancy.audit_log ORDER BY sequence LOOP
        IF v_entry.actor_id = 'mallory' THEN v_entry.actor_id := 'ada'; END IF;
        v_entry.previous_hash := v_hash;
        v_hash := sha256(convert_to(tenancy.audit_canonical(v_entry), 'UTF8'));
        UPDATE tenancy.audit_log SET actor_id = v_entry.actor_id, previous_hash = v_entry.previous_hash, hash = v_hash
        WHERE sequence = v_entry.sequence;
    END LOOP;
    UPDATE tenancy.audit_head SET hash = v_hash;
END $$
"""

TAIL = """
DO $$
BEGIN
    DELETE FROM tenancy.audit_log WHERE sequence > 2;
    UPDATE tenancy.audit_head SET (sequence, hash, occurred_at) =
        (SELECT sequence, hash, occurred_at FROM tenancy.audit_log WHERE sequence = 2);
END $$
"""


async def disarm(plane: QuotaPlane) -> None:
    """Disable every trigger of the log, as a superuser can."""
    rows = await plane.sql(
        "SELECT c.relname FROM pg_class c WHERE c.relname LIKE 'audit_log%' AND c.relkind IN ('r', 'p')"
    )
    for row in rows:
        await plane.sql(f"ALTER TABLE tenancy.{row[0]} DISABLE TRIGGER ALL")


@pytest.mark.parametrize(("attack", "bad"), [(REWRITE, 5), (TAIL, 3)], ids=["rewrite", "tail"])
async def test_what_a_superuser_rewrites_contradicts_an_earlier_checkpoint(
    plane: QuotaPlane, attack: str, bad: int
) -> None:
    """A clever forgery makes a chain that holds by itself; the exported checkpoint gives it away."""
    for name in ("ada", "mallory", "ada", "mallory", "ada"):
        await plane.append(actor=Actor("operator", name))
    checkpoint = await plane.audit.export_checkpoint()
    assert (await plane.audit.verify(checkpoint)).confirmed == (5,)
    await disarm(plane)
    await plane.sql(attack)
    assert (await plane.audit.verify()).ok  # the forgery is that good
    report = await plane.audit.verify(checkpoint)
    assert report.first_bad == bad
    # and it stays so after the log has grown past the checkpoint again
    for _ in range(5):
        await plane.append()
    assert not (await plane.audit.verify(checkpoint)).ok


CLUMSY: dict[str, Callable[[], tuple[str, int]]] = {
    "changed": lambda: ('UPDATE tenancy.audit_log SET after = \'{"tier": "pro"}\' WHERE sequence = 3', 3),
    "removed": lambda: ("DELETE FROM tenancy.audit_log WHERE sequence = 3", 3),
    "tail removed": lambda: ("DELETE FROM tenancy.audit_log WHERE sequence = 5", 5),
    "beginning removed": lambda: ("DELETE FROM tenancy.audit_log WHERE sequence < 3", 1),
    "all removed": lambda: ("DELETE FROM tenancy.audit_log", 1),
    "moved in time": lambda: (
        "UPDATE tenancy.audit_log SET occurred_at = occurred_at + interval '1 h' WHERE sequence = 3",
        3,
    ),
    "head moved back": lambda: ("UPDATE tenancy.audit_head SET sequence = 4", 5),
    "head rehashed": lambda: ("UPDATE tenancy.audit_head SET hash = decode(repeat('11', 32), 'hex')", 5),
}


@pytest.mark.parametrize("attack", CLUMSY.values(), ids=CLUMSY)
async def test_a_clumsy_change_is_found_without_a_checkpoint(
    plane: QuotaPlane, attack: Callable[[], tuple[str, int]]
) -> None:
    """The first bad entry is named."""
    for _ in range(5):
        await plane.append(after={"tier": "free"})
    await disarm(plane)
    statement, bad = attack()
    await plane.sql(statement)
    report = await plane.audit.verify()
    assert report.first_bad == bad, report.problem


# --- concurrent writers ---------------------------------------------------------------------------------------------


async def test_eight_processes_append_without_a_fork(plane: QuotaPlane) -> None:
    """Every entry of every writer is in one chain, in the order of its own writing."""
    assert await race(8, "append", plane.config.control_url, 500) == [500] * 8
    report = await plane.audit.verify()
    assert report.ok and report.entries == 4_000
    rows = await plane.sql(
        "SELECT actor_id, array_agg((after ->> 'index')::int ORDER BY sequence) FROM tenancy.audit_log GROUP BY 1"
    )
    assert [list(row[1]) for row in rows] == [list(range(500))] * 8


async def test_a_chain_without_the_heads_lock_forks(plane: QuotaPlane) -> None:
    """The attack on the test above: with the lock taken out of the function, concurrent writers do fork the chain."""
    definition = (await plane.sql("SELECT pg_get_functiondef('tenancy.audit_append'::regproc)"))[0][0]
    broken = definition.replace(
        "FROM tenancy.audit_head FOR UPDATE;", "FROM tenancy.audit_head; PERFORM pg_sleep(0.05);"
    )
    assert broken != definition
    async with plane.control.engine.begin() as conn:
        await conn.exec_driver_sql(broken)
    await asyncio.gather(*(plane.append() for _ in range(4)))
    assert not (await plane.audit.verify()).ok


async def test_writers_that_append_last_do_not_deadlock(plane: QuotaPlane) -> None:
    """Rows first and the head last is one order of locks, whatever the order of the rows."""
    tenants = [await plane.tenant(slug) for slug in ("acme", "globex")]

    async def change(number: int) -> None:
        async with plane.control.transaction() as conn:
            tenant = tenants[number % 2]
            await conn.execute(text("UPDATE tenancy.tenants SET metadata = '{}' WHERE id = :id"), {"id": tenant.id})
            await plane.audit.append(conn, action="tenant.update", tenant_id=tenant.id)

    async with asyncio.timeout(30):
        await asyncio.gather(*(change(number) for number in range(40)))
    assert (await plane.audit.verify()).ok


async def test_a_held_head_is_waited_for_no_longer_than_the_lock_timeout(plane: QuotaPlane) -> None:
    """A transaction that forgot to end does not hang the others for ever."""
    async with plane.control.transaction() as first:
        await plane.audit.append(first, action="test.slow")
        async with plane.control.transaction() as second:
            await second.exec_driver_sql("SET LOCAL lock_timeout = '100ms'")
            with pytest.raises(DBAPIError) as caught:
                await plane.audit.append(second, action="test.blocked")
            await second.rollback()
        assert isinstance(getattr(caught.value.orig, "__cause__", None), asyncpg.LockNotAvailableError)
