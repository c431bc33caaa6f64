"""A tenant's role, with its own valid password, against another tenant's purge and against its own end.

Everything that PostgreSQL lets every role lock or name is tried: each attack is first shown to block or fail the plain
statement. Then the operation as a whole must succeed, with either kind of administrator, on every version.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from tenancy_orm.audit.log import AuditLog
from tenancy_orm.errors import ProvisioningError
from tenancy_orm.postgres.failures import SERVER_FAILURES
from tenancy_orm.postgres.quoting import quote_identifier
from tenancy_orm.provisioning.rights import event_trigger
from tenancy_orm.provisioning.server_objects import removal, roles
from tenancy_orm.provisioning.server_objects.scram import scram_verifier
from tenancy_orm.rotation import SecretManager
from tenancy_orm.secrets.sealed import SealedPasswords
from tenancy_orm.tenant import Status, Tenant
from tests.support.arena import PURGE_SECONDS, Arena, hostile, open_arena
from tests.support.postgres import Postgres
from tests.support.provisioning import (
    VERSIONS,
    Workshops,
    names_of,
    open_workshops,
    placement,
    running_server,
)
from tests.support.waiting import until

LOCKED = "55P03"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"pg{version}")
def server(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[Postgres]:
    """A server of each version, of this module's own, that admits prepared transactions."""
    with running_server(request.param, f"{postgres.worker}-hostile", max_prepared_transactions="10") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workshops(server: Postgres) -> AsyncIterator[Workshops]:
    """The workshops of that server."""
    async with open_workshops(server) as opened:
        yield opened


@pytest_asyncio.fixture(params=["superuser", "plain"], loop_scope="module")
async def arena(request: pytest.FixtureRequest, workshops: Workshops) -> AsyncIterator[Arena]:
    """Two tenants, with either kind of administrator."""
    async with open_arena(workshops, request.param) as opened:
        yield opened


# --- against another tenant's purge ---------------------------------------------------------------------------------

# attack, and the plain statement that it blocks (55P03, a lock) or fails (2BP01, something still refers to the role)
DEFAULTS = "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO <other>"
LARGE_OBJECT = "SELECT lo_create(4242)", "GRANT SELECT ON LARGE OBJECT 4242 TO <other>"
SETTING = "ALTER ROLE CURRENT_USER IN DATABASE <other> SET work_mem = '1MB'"
PREPARE = "PREPARE TRANSACTION 'it''s mine'"
DROP_ROLE, DROP_DATABASE = "DROP ROLE <other>", "DROP DATABASE <other> WITH (FORCE)"

AGAINST_OTHERS = {
    "default privileges": ((DEFAULTS,), DROP_ROLE, "2BP01"),
    "large object": (LARGE_OBJECT, DROP_ROLE, "2BP01"),
    "default privileges, open": (("BEGIN", DEFAULTS), DROP_ROLE, LOCKED),
    "large object, open": (("BEGIN", *LARGE_OBJECT), DROP_ROLE, LOCKED),
    "default privileges, prepared": (("BEGIN", DEFAULTS, PREPARE), DROP_ROLE, LOCKED),
    "setting, open": (("BEGIN", SETTING), DROP_DATABASE, LOCKED),
    "setting, in a savepoint": (("BEGIN", "SAVEPOINT s", SETTING, "SAVEPOINT t"), DROP_DATABASE, LOCKED),
    "setting, prepared": (("BEGIN", SETTING, PREPARE), DROP_DATABASE, LOCKED),
    # PostgreSQL drops these with either of the two: they block nothing by themselves
    "setting": ((SETTING,), None, None),
    "everything": ((DEFAULTS, *LARGE_OBJECT, SETTING, "BEGIN", DEFAULTS, SETTING, PREPARE), DROP_DATABASE, LOCKED),
}


@pytest.mark.parametrize("attack", AGAINST_OTHERS)
async def test_a_tenant_does_not_block_anothers_purge(arena: Arena, attack: str) -> None:
    """Whatever it has written or locked: database, role and secrets of the other are gone, the attacker stays."""
    statements, plain, sqlstate = AGAINST_OTHERS[attack]
    await arena.attack(*statements)
    if plain is not None:
        if plain == DROP_ROLE:
            # the role's own rights would fail it as well: revoke them first
            await take_everything(arena)
        assert await arena.plainly(plain) == sqlstate
    await arena.purge(arena.victim)
    assert await arena.workshop.present() == names_of(arena.attacker)
    assert await arena.retired() == set()
    assert await arena.workshop.slugs() == {"mallory": "active", "acme": "purged"}
    await arena.workshop.create("acme")
    async with arena.workshop.connect(arena.attacker) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('still served')")
    await arena.purge(arena.attacker)


async def take_everything(arena: Arena) -> None:
    """Drop the victim's database, so that nothing but the attack keeps its role."""
    async with arena.workshop.admin() as connection:
        await connection.execute(arena.fill("DROP DATABASE <other> WITH (FORCE)"))


async def test_a_tenant_that_repeats_its_attack_all_the_time_does_not_block_a_purge(arena: Arena) -> None:
    """From every connection it may have, again as soon as one is ended."""

    async def on_and_on() -> None:
        while True:
            try:
                async with hostile(arena.workshop, arena.attacker) as connection:
                    await connection.execute(arena.fill(DEFAULTS))
                    for statement in ("BEGIN", DEFAULTS, SETTING, "SELECT pg_sleep(60)"):
                        await connection.execute(arena.fill(statement))
            except (asyncpg.UndefinedObjectError, asyncpg.InvalidCatalogNameError):
                return  # there is nothing left to attack
            except SERVER_FAILURES:
                continue

    attacks = [asyncio.create_task(on_and_on()) for _ in range(4)]
    try:
        await until(lambda: _is(arena, arena.attacker, 3))
        await arena.purge(arena.victim)
        assert await arena.workshop.present() == names_of(arena.attacker)
    finally:
        for task in attacks:
            task.cancel()
        await asyncio.gather(*attacks, return_exceptions=True)
    await arena.purge(arena.attacker)
    report = await arena.workshop.provisioner.reconcile()
    assert report.errors == ()
    assert await arena.retired() == set()


async def _is(arena: Arena, tenant: Tenant, count: int) -> bool:
    return await arena.connections(tenant) >= count


async def test_a_role_that_cannot_be_dropped_is_left_powerless(arena: Arena) -> None:
    """Something of a stranger's names it, which is not ours to drop: the purge ends, and reconcile reports the role."""
    name = arena.server.new_name("stranger")
    await arena.server.create_database(name)
    async with arena.server.connect(name) as connection:
        await connection.execute(arena.fill("CREATE TABLE t (); ALTER TABLE t OWNER TO <other>"))
        await connection.execute(arena.fill("CREATE ROLE above; GRANT above TO <other>"))
        await connection.execute(arena.fill("CREATE ROLE below; GRANT <other> TO below"))
    password = arena.workshop.provisioner.password(arena.victim)
    await arena.purge(arena.victim)
    assert await arena.workshop.present() == names_of(arena.attacker)
    (role,) = await arena.retired()
    async with arena.server.connect(name) as connection:
        kept = await connection.fetchrow("SELECT rolcanlogin, rolpassword FROM pg_authid WHERE rolname = $1", role)
        assert tuple(kept) == (False, None)
        members = "SELECT count(*) FROM pg_auth_members WHERE 'above'::regrole = roleid OR 'below'::regrole = member"
        async with arena.workshop.admin() as administrator:
            superuser = await roles.is_superuser(administrator)
        assert await connection.fetchval(members) == (0 if superuser or arena.server.version < "16" else 2)
        with pytest.raises(asyncpg.PostgresError):
            await asyncpg.connect(arena.server.url(name, user=role, password=password))
    report = await arena.workshop.provisioner.reconcile()
    assert len(report.errors) == 1 and role in report.errors[0] and name in report.errors[0]
    assert (await arena.workshop.create("acme")).status is Status.ACTIVE
    async with arena.server.connect(name) as connection:
        await connection.execute("DROP TABLE t; DROP ROLE above; DROP ROLE below")
    assert (await arena.workshop.provisioner.reconcile()).orphans == (role,)
    assert await arena.retired() == set()


async def test_a_role_that_takes_long_to_drop_does_not_stop_a_purge(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others can grant it any number of large objects: the grants are revoked in batches, and reconcile goes on."""
    monkeypatch.setattr(removal, "_BATCH", 10)
    grant = "GRANT SELECT ON LARGE OBJECT " + ", ".join(map(str, range(1, 31))) + " TO <other>"
    await arena.attack("SELECT lo_create(n) FROM generate_series(1, 30) AS n", grant)
    left = """
        SELECT count(*) FROM pg_shdepend
        WHERE classid = 'pg_largeobject'::regclass AND deptype = 'a' AND refobjid = $1::regrole
    """
    async with arena.server.connect(placement(arena.attacker).database) as operator:
        assert await operator.fetchval(left, placement(arena.victim).role) == 30
        # nobody's session that may be ended, as long as it likes
        await operator.execute("BEGIN; GRANT SELECT ON LARGE OBJECT 30 TO PUBLIC")
        deleted = await arena.change(arena.victim, Status.DELETED)
        await arena.workshop.provisioner_of(provisioning={"timeout": 4.0}).purge(deleted)
        assert (await arena.workshop.slugs())["acme"] == "purged"
        assert await arena.workshop.present() == names_of(arena.attacker)
        (role,) = await arena.retired()
        await operator.execute("ROLLBACK")
        assert await operator.fetchval(left, role) == 10
    assert (await arena.workshop.provisioner.reconcile()).orphans == (role,)
    assert await arena.retired() == set()


async def test_a_purge_that_cannot_drop_the_role_has_erased_the_secrets(arena: Arena) -> None:
    """The data is gone by then, and neither a password nor a key stays."""
    async with arena.server.connect() as operator:
        await operator.execute(arena.fill(f"BEGIN; {DEFAULTS}"))
        deleted = await arena.change(arena.victim, Status.DELETED)
        assert placement(deleted).sealed_password != b""
        with pytest.raises(ProvisioningError, match="purging"):
            await arena.workshop.provisioner_of(provisioning={"timeout": 3.0}).purge(deleted)
        after = await arena.workshop.registry.get(deleted.id)
        assert (after.status, placement(after).sealed_password) == (Status.DELETED, b"")
        assert await arena.workshop.present() == names_of(arena.attacker) | {f"role {placement(deleted).role}"}
        await operator.execute("ROLLBACK")
    assert (await arena.workshop.provisioner.reconcile()).purged == ("acme",)


# --- against its own suspension, deletion, purge and password -------------------------------------------------------

ROW = "ALTER ROLE CURRENT_USER PASSWORD 'x'"
OPTIONS = "ALTER ROLE CURRENT_USER SET work_mem = '1MB'"
OWN_GRANT = "GRANT CONNECT ON DATABASE <own> TO CURRENT_USER"  # PostgreSQL warns, and writes the row all the same
NOLOGIN, REVOKE = "ALTER ROLE <own> NOLOGIN", "REVOKE CONNECT ON DATABASE <own> FROM <own>"

AGAINST_ITSELF = {
    "password": (("BEGIN", ROW), NOLOGIN),
    "password, in a savepoint": (("BEGIN", "SAVEPOINT s", ROW), NOLOGIN),
    "password, prepared": (("BEGIN", ROW, PREPARE), NOLOGIN),
    "grant": (("BEGIN", OWN_GRANT), REVOKE),
    "grant, prepared": (("BEGIN", OWN_GRANT, PREPARE), REVOKE),
    "owned": (("BEGIN", "DROP OWNED BY CURRENT_USER"), REVOKE),
    "setting": (("BEGIN", OPTIONS), "ALTER ROLE <own> SET work_mem = '2MB'"),
    "both": (("BEGIN", ROW, OWN_GRANT, OPTIONS), NOLOGIN),
}


@pytest.mark.parametrize("attack", AGAINST_ITSELF)
async def test_a_tenant_does_not_block_its_own_suspension(arena: Arena, attack: str) -> None:
    """Nor its return, nor its deletion, nor its purge."""
    statements, plain = AGAINST_ITSELF[attack]
    await arena.attack(*statements)
    assert await arena.plainly(plain) == LOCKED
    tenant = await arena.change(arena.attacker, Status.SUSPENDED)
    await arena.workshop.provisioner.align(tenant, timeout=10)
    assert await arena.connections(tenant) == 0
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        async with hostile(arena.workshop, tenant):
            pass
    async with arena.workshop.admin() as connection:
        (state,) = (await roles.states(connection, placement(tenant).role)).values()
    assert (state.can_login, state.connected, state.connect_granted_on) == (False, False, frozenset())
    tenant = await arena.change(tenant, Status.ACTIVE)
    await arena.workshop.provisioner.align(tenant, timeout=10)
    await arena.attack(*statements)
    await arena.purge(tenant)
    assert await arena.workshop.present() == names_of(arena.victim)


@pytest.mark.parametrize("attack", ["both", "password, prepared"])
async def test_reconcile_is_not_blocked(arena: Arena, attack: str) -> None:
    """It blocks the logins of tenants suspended while the server did not answer, and finishes a purge."""
    await arena.attack(*AGAINST_ITSELF[attack][0])
    tenant = await arena.change(arena.attacker, Status.SUSPENDED)
    async with asyncio.timeout(PURGE_SECONDS):
        report = await arena.workshop.provisioner.reconcile()
    assert (report.corrected, report.errors) == (("mallory",), ())
    assert await arena.connections(tenant) == 0
    await arena.change(tenant, Status.DELETED)
    await arena.workshop.registry.begin_purge(tenant.id)
    async with asyncio.timeout(PURGE_SECONDS):
        report = await arena.workshop.provisioner.reconcile()
    assert (report.purged, report.errors) == (("mallory",), ())


def secrets_of(arena: Arena) -> SecretManager:
    """What rotates passwords."""
    workshop = arena.workshop
    return SecretManager(
        config=workshop.config,
        registry=workshop.registry,
        sealed=SealedPasswords(workshop.control, AuditLog(workshop.control), workshop.keyring),
        servers=workshop.servers,
        names=workshop.names,
        keyring=workshop.keyring,
    )


@pytest.mark.parametrize("attack", ["password", "password, prepared"])
async def test_a_tenant_does_not_block_the_rotation_of_its_password(arena: Arena, attack: str) -> None:
    """What holds its row is ended; the new password is in force."""
    await arena.attack(*AGAINST_ITSELF[attack][0])
    assert await arena.plainly("ALTER ROLE <own> CONNECTION LIMIT 7") == LOCKED
    secrets = secrets_of(arena)
    try:
        async with asyncio.timeout(PURGE_SECONDS):
            await secrets.rotate_password(arena.attacker)
    finally:
        await secrets.close()
    async with hostile(arena.workshop, await arena.workshop.registry.get(arena.attacker.id)) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def changing_all_the_time(arena: Arena, statement: str, stop: asyncio.Event) -> None:
    """Log in and change the role's own row, again and again, however often the connection is ended."""
    while not stop.is_set():
        try:
            async with hostile(arena.workshop, await arena.workshop.registry.get(arena.attacker.id)) as connection:
                while not stop.is_set():
                    try:
                        await connection.execute(arena.fill(statement))
                    except asyncpg.InternalServerError:
                        continue  # tuple concurrently updated: by the administrator, or another of these
        except SERVER_FAILURES:
            await asyncio.sleep(0)


@asynccontextmanager
async def under_fire(arena: Arena, statement: str) -> AsyncIterator[None]:
    """While the body runs, all of the attacker's connections do nothing else."""
    statement = statement.replace("<verifier>", scram_verifier(arena.workshop.provisioner.password(arena.attacker)))
    stop = asyncio.Event()
    tasks = [asyncio.create_task(changing_all_the_time(arena, statement, stop)) for _ in range(4)]
    try:
        await until(lambda: _is(arena, arena.attacker, 3))
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    "statement", ["ALTER ROLE CURRENT_USER PASSWORD '<verifier>'", "GRANT CONNECT ON DATABASE <own> TO <own>"]
)
async def test_a_role_that_changes_its_row_all_the_time_is_suspended(arena: Arena, statement: str) -> None:
    """Losing a race for the row is repeated, after its connections are ended."""
    async with under_fire(arena, statement):
        tenant = await arena.change(arena.attacker, Status.SUSPENDED)
        await arena.workshop.provisioner.align(tenant, timeout=10)
        assert await arena.connections(tenant) == 0


# --- against the whole server ---------------------------------------------------------------------------------------

LOCK_BEFORE_RIGHTS = {
    "rule": "CREATE RULE r AS ON INSERT TO pg_authid DO INSTEAD NOTHING",
    "trigger": "CREATE TRIGGER t BEFORE INSERT ON pg_authid FOR EACH ROW "
    "EXECUTE FUNCTION suppress_redundant_updates_trigger()",
}


@pytest.mark.parametrize("kind", LOCK_BEFORE_RIGHTS)
@pytest.mark.parametrize("arena", ["superuser"], indirect=True)
async def test_a_tenant_does_not_freeze_the_server(arena: Arena, kind: str) -> None:
    """By a command that it has no right to, but that waits for a lock on the roles first: it is refused at once."""
    async with arena.server.connect(placement(arena.attacker).database) as superuser:
        first = await arena.attack("BEGIN", "SELECT count(*) FROM pg_roles", OPTIONS, ROW)
        second = await arena.attack()
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await second.execute(LOCK_BEFORE_RIGHTS[kind], timeout=10)
        await superuser.execute(f"ALTER EVENT TRIGGER {event_trigger.NAME} DISABLE")
        attack = asyncio.create_task(second.execute(LOCK_BEFORE_RIGHTS[kind]))
        queued = "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND relation = 'pg_authid'::regclass"

        async def waits() -> bool:
            return bool(await superuser.fetchval(queued))

        await until(waits)
        assert await arena_is_frozen(arena, kind, superuser)
        first.terminate()
        with pytest.raises(asyncpg.InsufficientPrivilegeError):  # now that it has the lock, PostgreSQL asks
            await attack


@pytest.mark.parametrize("arena", ["superuser"], indirect=True)
async def test_a_dump_that_is_restored_elsewhere_takes_triggers(arena: Arena) -> None:
    """The roles of the installation are not there: its event trigger refuses nobody then."""
    owner = quote_identifier(arena.workshop.names.owner)
    create = (
        "CREATE TRIGGER t BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
    )
    async with arena.server.connect(placement(arena.victim).database) as elsewhere:
        assert await elsewhere.fetchval("SELECT count(*) FROM pg_event_trigger") == 1
        await elsewhere.execute(f"ALTER ROLE {owner} RENAME TO elsewhere")
        try:
            await elsewhere.execute(create)
        finally:
            await elsewhere.execute(f"ALTER ROLE elsewhere RENAME TO {owner}")


async def arena_is_frozen(arena: Arena, kind: str, superuser: Any) -> bool:
    """Whether logins (for a rule), or changes of any role (for a trigger), wait behind the attacker."""
    try:
        if kind == "rule":
            await asyncpg.connect(arena.server.admin_url, timeout=0.5)
        else:
            await superuser.execute("SET lock_timeout = '200ms'")
            await superuser.execute(arena.fill("ALTER ROLE <other> CONNECTION LIMIT 5"))
    except TimeoutError:
        return True
    except asyncpg.LockNotAvailableError:
        return True
    return False


# --- strangers ------------------------------------------------------------------------------------------------------


async def test_nobody_elses_session_is_ended(arena: Arena) -> None:
    """An operator who holds the lock keeps it, and the operation fails at its deadline with the truth."""
    tenant = await arena.change(arena.attacker, Status.SUSPENDED)
    async with arena.server.connect() as operator:
        await operator.execute(arena.fill("BEGIN; ALTER ROLE <own> CONNECTION LIMIT 3"))
        with pytest.raises(Exception, match="login") as caught:
            await arena.workshop.provisioner.align(tenant, timeout=2)
        assert "right to connect" not in str(caught.value)
        assert await operator.fetchval("SELECT 1") == 1
        await operator.execute("ROLLBACK")
    async with arena.workshop.admin() as connection:
        (state,) = (await roles.states(connection, placement(tenant).role)).values()
    assert (state.can_login, state.connect_granted_on) == (True, frozenset())
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with hostile(arena.workshop, tenant):
            pass
    assert (await arena.workshop.provisioner.reconcile()).corrected == ("mallory",)


async def test_a_stranger_that_waits_for_a_tenant_goes_on(arena: Arena) -> None:
    """It keeps the administrator waiting, and a tenant it: the tenant's session is ended, and no other."""
    await arena.attack("BEGIN", "INSERT INTO notes (body) VALUES ('x')")
    tenant = await arena.change(arena.victim, Status.SUSPENDED)
    async with arena.server.connect(placement(arena.attacker).database) as operator, arena.server.connect() as observer:
        await operator.execute(arena.fill("BEGIN; ALTER ROLE <other> CONNECTION LIMIT 3"))
        waiting = asyncio.create_task(operator.execute("LOCK TABLE notes; COMMIT"))
        await until(lambda: observer.fetchval("SELECT count(*) = 1 FROM pg_locks WHERE NOT granted"))
        assert await arena.plainly("ALTER ROLE <other> NOLOGIN") == LOCKED
        await arena.workshop.provisioner.align(tenant, timeout=10)
        await waiting
    assert await arena.connections(arena.attacker) == 0


async def test_a_strangers_prepared_transaction_stays(arena: Arena) -> None:
    """The purge says which statement ends it; done, it goes on."""
    async with arena.server.connect(placement(arena.victim).database) as connection:
        await connection.execute("BEGIN; INSERT INTO notes (body) VALUES ('x'); PREPARE TRANSACTION 'stranger'")
        with pytest.raises(Exception, match=r"ROLLBACK PREPARED E'stranger'"):
            await arena.purge(arena.victim)
        await connection.execute("ROLLBACK PREPARED 'stranger'")
    assert (await arena.workshop.provisioner.reconcile()).purged == ("acme",)
