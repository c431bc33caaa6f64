"""The audit log: the application's role can only append, its owner little more, and a superuser is found out."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tenancy_orm.audit.actor import Actor
from tenancy_orm.audit.checkpoints import Signer, Verifier
from tenancy_orm.control.grants import APPLICATION_FUNCTIONS, APPLICATION_TABLES, grant_application
from tenancy_orm.errors import AuditError, ConfigurationError
from tenancy_orm.postgres.errors import sqlstate_of
from tests.support.audit import age
from tests.support.control import revoke_application
from tests.support.postgres import Postgres
from tests.support.quotas import QuotaPlane, quota_plane, race
from tests.support.registry import synchronise
from tests.support.waiting import HANGS

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
    "remove a key": "DELETE FROM tenancy.audit_keys",
    "change a key": "UPDATE tenancy.audit_keys SET public_key = ''",
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
    async with restricted.app.control.transaction() as connection:
        for statement in (
            "CREATE TEMP TABLE audit_head (sequence bigint)",
            "CREATE FUNCTION pg_temp.clock_timestamp() RETURNS timestamptz LANGUAGE sql RETURN timestamptz 'epoch'",
            "CREATE FUNCTION pg_temp.sha256(bytea) RETURNS bytea LANGUAGE sql AS 'SELECT $1'",
            "SET LOCAL search_path = pg_temp, pg_catalog, tenancy",
            "SET LOCAL timezone = 'Pacific/Kiritimati'",
        ):
            await connection.exec_driver_sql(statement)
        await restricted.app.audit.append(connection, action="test.done")
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
    async with restricted.app.control.transaction() as connection:
        await connection.exec_driver_sql("CREATE TEMP TABLE ledger AS SELECT 'forged'::text AS entry")
        await connection.exec_driver_sql("GRANT SELECT ON ledger TO PUBLIC")
        assert await connection.scalar(text("SELECT public.unpinned()")) == "forged"
        assert await connection.scalar(text("SELECT public.pinned()")) == "true"
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
    # it reads the log's months by name, as for a backup
    months = await restricted.owner.sql(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'tenancy.audit_log'::regclass"
    )
    expected |= {row[0].removeprefix("tenancy."): ["SELECT"] for row in months}
    assert {row[0]: list(row[1]) for row in tables} == expected
    sequences = await restricted.owner.sql(
        "SELECT DISTINCT p.privilege FROM pg_class c "
        "CROSS JOIN (VALUES ('SELECT'), ('UPDATE'), ('USAGE')) AS p (privilege) "
        "WHERE c.relnamespace = 'tenancy'::regnamespace AND c.relkind = 'S' "
        f"AND has_sequence_privilege('{restricted.role}', c.oid, p.privilege)"
    )
    assert sequences == [("SELECT",)]
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
    await synchronise(app.control, app.config.tiers, {"default": ("127.0.0.1", 5432)})
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
    await age(restricted.owner.control, restricted.owner.audit, datetime(2024, 1, 15, tzinfo=UTC), 1)
    with pytest.raises(AuditError, match="owner"):
        await restricted.app.audit.prune(before=datetime(9999, 1, 1, tzinfo=UTC))
    assert (await restricted.owner.audit.verify()).entries == 1


async def test_grants_can_be_repeated_and_taken_back(restricted: Restricted) -> None:
    """Every other right of the role is revoked, and in the end all of them."""
    await restricted.owner.sql(f'GRANT ALL ON ALL TABLES IN SCHEMA tenancy TO "{restricted.role}"')
    assert await state_of(restricted.app, "UPDATE tenancy.audit_head SET sequence = sequence") is None
    async with restricted.owner.control.transaction() as connection:
        await grant_application(connection, restricted.role)
    assert await state_of(restricted.app, "UPDATE tenancy.audit_head SET sequence = sequence") == DENIED
    async with restricted.owner.control.transaction() as connection:
        await revoke_application(connection, restricted.role)
    assert await state_of(restricted.app, "SELECT 1 FROM tenancy.tenants") == DENIED


@asynccontextmanager
async def role_with(plane: QuotaPlane, statements: str) -> AsyncIterator[str]:
    """A role that an administrator has done something for, in this control database."""
    role, group = f"app_{secrets.token_hex(4)}", f"group_{secrets.token_hex(4)}"
    await plane.sql(f"CREATE ROLE {role}")
    await plane.sql(f"CREATE ROLE {group}")
    try:
        for statement in statements.format(role=role, group=group).split("; "):
            await plane.sql(statement)
        yield role
    finally:
        for name in (role, group):
            await plane.sql(f"DROP OWNED BY {name}")
            await plane.sql(f"DROP ROLE {name}")


async def grant(plane: QuotaPlane, role: str) -> None:
    """Make it the application's role."""
    async with plane.control.transaction() as connection:
        await grant_application(connection, role)


UNHELD = {
    "superuser": ("ALTER ROLE {role} SUPERUSER", "owner"),
    "bypasses row security": ("ALTER ROLE {role} BYPASSRLS", "NOBYPASSRLS"),
    "writes all data": ("GRANT pg_write_all_data TO {role}", "INSERT on audit_cuts"),
    "writes all data as another": (
        "GRANT pg_write_all_data TO {group}; ALTER ROLE {role} NOINHERIT; GRANT {group} TO {role}",
        "INSERT on audit_cuts",
    ),
    "through PUBLIC": ("GRANT UPDATE ON tenancy.audit_head TO PUBLIC", "UPDATE on audit_head"),
    "a column through PUBLIC": ("GRANT UPDATE (hash) ON tenancy.audit_head TO PUBLIC", "UPDATE on audit_head"),
    "through a group": ("GRANT TRIGGER ON tenancy.audit_log TO {group}; GRANT {group} TO {role}", "TRIGGER"),
    "a partition": ("GRANT TRUNCATE ON tenancy.audit_log_{{month}} TO PUBLIC", "TRUNCATE on audit_log_y"),
    "creates in the schema": ("GRANT CREATE ON SCHEMA tenancy TO PUBLIC", "CREATE on schema"),
}


@pytest.mark.parametrize(("statements", "message"), UNHELD.values(), ids=UNHELD)
async def test_a_role_that_has_more_than_is_granted_is_refused(
    plane: QuotaPlane, statements: str, message: str
) -> None:
    """Saying that it can only append would be a lie. Nothing is granted."""
    month = (await plane.sql("SELECT to_char(now() AT TIME ZONE 'UTC', '\"y\"YYYY\"m\"MM')"))[0][0]
    async with role_with(plane, statements.replace("{{month}}", month)) as role:
        with pytest.raises(ConfigurationError, match=message):
            await grant(plane, role)
        granted = await plane.sql(
            "SELECT 1 FROM pg_namespace n CROSS JOIN LATERAL aclexplode(n.nspacl) a "
            "JOIN pg_roles r ON r.oid = a.grantee WHERE n.nspname = 'tenancy' AND r.rolname = :role",
            role=role,
        )
        assert granted == []


async def test_a_member_of_the_owner_is_refused(plane: QuotaPlane) -> None:
    """Whether or not the owner is a superuser, and the owner itself too."""
    async with role_with(plane, "SELECT 1") as owner, role_with(plane, f"GRANT {owner} TO {{role}}") as member:
        await plane.sql(f"ALTER TABLE tenancy.audit_log OWNER TO {owner}")
        for role in (owner, member):
            with pytest.raises(ConfigurationError, match="owner"):
                await grant(plane, role)
        await plane.sql("ALTER TABLE tenancy.audit_log OWNER TO CURRENT_USER")
        await grant(plane, member)
    with pytest.raises(ConfigurationError, match="does not exist"):
        await grant(plane, "no such role")


async def test_a_role_that_makes_roles_is_refused_where_it_could_take_the_owners(plane: QuotaPlane) -> None:
    """Before PostgreSQL 16 it can make itself a member of any role that is not a superuser."""
    modern = (await plane.sql("SELECT current_setting('server_version_num')::integer >= 160000"))[0][0]
    async with role_with(plane, "ALTER ROLE {role} CREATEROLE") as role:
        if modern:
            await grant(plane, role)
        else:
            with pytest.raises(ConfigurationError, match="owner"):
                await grant(plane, role)


async def test_default_privileges_do_not_reach_the_partitions_to_come(
    restricted: Restricted, postgres: Postgres
) -> None:
    """A trigger on one would run as the owner whenever somebody appends; whoever was meant by them gets nothing."""
    owner, role = restricted.owner, restricted.role
    for grantee in (f'"{role}"', "PUBLIC"):
        await owner.sql(f"ALTER DEFAULT PRIVILEGES IN SCHEMA tenancy GRANT ALL ON TABLES TO {grantee}")
    await owner.sql("CREATE TABLE tenancy.other (id int)")
    assert (await owner.sql(f"SELECT has_table_privilege('{role}', 'tenancy.other', 'TRIGGER')"))[0][0]
    assert await owner.audit.ensure_partitions(6) == 3
    granted = await owner.sql(
        "SELECT DISTINCT r.rolname, a.privilege_type FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
        "CROSS JOIN LATERAL aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee "
        "WHERE i.inhparent = 'tenancy.audit_log'::regclass AND a.grantee <> c.relowner"
    )
    # what it reads of the log by its own right
    assert granted == [(role, "SELECT")]
    # the owner's own rights are as they were: it appends to the new partition
    await age(owner.control, owner.audit, datetime.now(UTC) + timedelta(days=150), 1)
    await owner.sql("DROP TABLE tenancy.other")
    await owner.sql("ALTER DEFAULT PRIVILEGES IN SCHEMA tenancy REVOKE ALL ON TABLES FROM PUBLIC")
    await grant(owner, role)
    await owner.sql("CREATE TABLE tenancy.other (id int)")
    assert not (await owner.sql(f"SELECT has_table_privilege('{role}', 'tenancy.other', 'SELECT')"))[0][0]


async def test_the_applications_policy_on_the_log_is_for_reading(restricted: Restricted) -> None:
    """Row-level security refuses its INSERT where a privilege does not."""
    await restricted.app.append()
    await restricted.owner.sql(f'GRANT ALL ON ALL TABLES IN SCHEMA tenancy TO "{restricted.role}"')
    forged = (
        "INSERT INTO tenancy.audit_log (sequence, occurred_at, action, actor_kind, database_role, previous_hash, hash) "
        "SELECT sequence + 1, occurred_at, action, actor_kind, database_role, hash, hash FROM tenancy.audit_log"
    )
    assert await state_of(restricted.app, forged) == DENIED
    assert await state_of(restricted.owner, forged) is None


# --- the owner ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["audit_log", "audit_log_{month}", "audit_cuts", "audit_keys"])
@pytest.mark.parametrize("verb", ["UPDATE {} SET {} = NULL", "DELETE FROM {}", "TRUNCATE {}"])
@pytest.mark.parametrize("replica", [False, True])
async def test_triggers_refuse_the_owner_too(plane: QuotaPlane, table: str, verb: str, replica: bool) -> None:
    """On the log, on each partition by name, on the cuts; and where replication's role would silence triggers."""
    await plane.append()
    month = (await plane.sql("SELECT to_char(now() AT TIME ZONE 'UTC', '\"y\"YYYY\"m\"MM')"))[0][0]
    async with plane.control.engine.begin() as connection:
        if replica:
            await connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        with pytest.raises(DBAPIError) as caught:
            column = "key_id" if table == "audit_keys" else "sequence"
            await connection.exec_driver_sql(verb.format("tenancy." + table.format(month=month), column))
        await connection.rollback()
    assert sqlstate_of(caught.value) == REFUSED
    assert (await plane.audit.verify()).entries == 1


async def test_the_head_cannot_be_removed(plane: QuotaPlane) -> None:
    """Without it the next entry would begin another chain."""
    for statement in ("DELETE FROM tenancy.audit_head", "TRUNCATE tenancy.audit_head"):
        assert await state_of(plane, statement) == REFUSED
        async with plane.control.engine.connect() as connection:
            await connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            with pytest.raises(DBAPIError) as caught:
                await connection.exec_driver_sql(statement)
        assert sqlstate_of(caught.value) == REFUSED
    assert await state_of(plane, "INSERT INTO tenancy.audit_head SELECT * FROM tenancy.audit_head") == "23505"


# --- whoever writes to the table of keys ------------------------------------------------------------------------------


async def test_a_public_key_counts_only_where_a_configured_key_vouches_for_it(plane: QuotaPlane) -> None:
    """The table's owner cannot have a cut accepted that no key of the installation signed."""
    for _ in range(3):
        await plane.append()
    forger = Signer({"9": b"f" * 32})
    public_key = base64.b64decode(forger.public_keys["9"])
    entry = (await plane.sql("SELECT hash, occurred_at FROM tenancy.audit_log WHERE sequence = 2"))[0]
    installation = plane.control.installation
    cut = forger.sign("cut", installation=installation, sequence=2, digest=entry[0], occurred_at=entry[1])
    await disarm(plane)
    await plane.sql("DELETE FROM tenancy.audit_log WHERE sequence < 3")
    await plane.sql(
        "INSERT INTO tenancy.audit_cuts VALUES (2, :occurred_at, :hash, :signed_at, '9', :signature)",
        occurred_at=cut.occurred_at,
        hash=cut.hash,
        signed_at=cut.signed_at,
        signature=cut.signature,
    )
    own = forger.vouch(installation=installation, key_id="9", public_key=public_key)
    for signed_by in ("9", "1"):
        await plane.sql(
            "INSERT INTO tenancy.audit_keys (signature, key_id, public_key, signed_by) VALUES (:word, '9', :key, :by)",
            word=own.signature + (b"" if signed_by == "9" else b"x"),
            key=public_key,
            by=signed_by,
        )
    report = await plane.audit.verify()
    assert report.first_bad == 3 and "not known" in str(report.problem)
    # the forgery itself is good: with that key's public key, the log would hold
    assert (await plane.audit.verify(verifier=Verifier(forger.public_keys))).ok


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
    """A clever forgery makes a chain that verifies by itself; the exported checkpoint reveals it."""
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
    async with plane.control.engine.begin() as connection:
        await connection.exec_driver_sql(broken)
    # of two at the same microsecond, the primary key refuses one
    await asyncio.gather(*(plane.append() for _ in range(4)), return_exceptions=True)
    assert not (await plane.audit.verify()).ok


async def test_writers_that_append_last_do_not_deadlock(plane: QuotaPlane) -> None:
    """Rows first and the head last is one order of locks, whatever the order of the rows."""
    tenants = [await plane.tenant(slug) for slug in ("acme", "globex")]

    async def change(number: int) -> None:
        async with plane.control.transaction() as connection:
            tenant = tenants[number % 2]
            await connection.execute(
                text("UPDATE tenancy.tenants SET metadata = '{}' WHERE id = :id"), {"id": tenant.id}
            )
            await plane.audit.append(connection, action="tenant.update", tenant_id=tenant.id)

    async with asyncio.timeout(HANGS):
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
