"""Passwords and keys are rotated while requests are served, and an interruption loses neither."""

from __future__ import annotations

import asyncio
import base64
import secrets
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm import Status, Tenancy, TenancyConfig, Tenant, assembly
from tenancy_orm.errors import (
    ConfigurationError,
    ControlUnavailableError,
    InvalidInvitationError,
    InvalidTransitionError,
    LoginRefusedError,
    ProvisioningError,
    SecretError,
    SecretProviderError,
    TenantNotFoundError,
)
from tenancy_orm.provisioning.server_objects import roles
from tenancy_orm.routing.connector import Connector
from tenancy_orm.routing.route import TenantRoute
from tenancy_orm.secrets import sealed
from tenancy_orm.secrets.providers import EnvironmentSecrets, SecretKeyWrapper
from tenancy_orm.secrets.sealed import ResealReport, SealedPasswords
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.proxy import proxied
from tests.support.waiting import HANGS, until


def new_key() -> str:
    """A key as it is configured."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


@asynccontextmanager
async def deaf(config: TenancyConfig) -> AsyncIterator[Tenancy]:
    """Another process that is not notified of changes, and caches what it has read."""
    async with proxied(config.control_url) as proxy:
        proxy.refuse()
        async with opened(
            config.replace(control={"listen_url": proxy.url(config.control_url)}, directory={"ttl": 3_600.0})
        ) as other:
            yield other


async def created(tenancy: Tenancy, *slugs: str) -> list[Tenant]:
    """New tenants."""
    return [(await tenancy.tenants.create(slug)).tenant for slug in slugs]


async def works(tenancy: Tenancy, tenant: Tenant) -> bool:
    """Whether a new connection to the tenant's database works."""
    tenancy.internals.router.retire(tenant.id)
    return bool(await tenancy.fetch_value("SELECT current_user = :role", {"role": role(tenant)}, tenant=tenant))


def role(tenant: Tenant) -> str:
    """The tenant's role."""
    assert tenant.placement is not None
    return tenant.placement.role


async def stored(tenancy: Tenancy, tenant: Tenant) -> tuple[bytes | None, bytes | None]:
    """The two columns."""
    query = text("SELECT sealed_password, next_sealed_password FROM tenancy.tenants WHERE id = :id")
    async with tenancy.internals.control.connect() as connection:
        return tuple((await connection.execute(query, {"id": tenant.id})).one())


async def log_in(postgres: Postgres, tenant: Tenant, password: str) -> None:
    """Log in as the tenant's role, by hand."""
    assert tenant.placement is not None
    url = postgres.url(tenant.placement.database, user=role(tenant), password=password)
    await (await asyncpg.connect(url, timeout=10)).close()


async def interrupt(tenancy: Tenancy, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation that was interrupted when the role had the new password and the registry did not say so."""

    async def fail(*args: Any, **options: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(tenancy.secrets._sealed, "finish_rotation", fail)
        with pytest.raises(ProvisioningError):
            await tenancy.secrets.rotate_password(tenant)


async def damage(tenancy: Tenancy, tenant: Tenant, column: str) -> None:
    """Damage a stored password, so that it cannot be opened."""
    async with tenancy.internals.control.transaction() as connection:
        query = text(f"UPDATE tenancy.tenants SET {column} = {column} || 'x' WHERE id = :id")
        await connection.execute(query, {"id": tenant.id})


# --- passwords ------------------------------------------------------------------------------------------------------


async def test_a_rotated_password_replaces_the_old_one(tenancy: Tenancy, postgres: Postgres) -> None:
    """The old password no longer works; open connections stay; it is audited."""
    (acme,) = await created(tenancy, "acme")
    old = tenancy.internals.provisioner.password(acme)
    async with tenancy.session("acme") as session:
        before = await session.scalar(text("SELECT pg_backend_pid()"))
        await tenancy.secrets.rotate_password(acme)
        assert await session.scalar(text("SELECT pg_backend_pid()")) == before
    new = tenancy.internals.provisioner.password(await tenancy.tenants.get("acme"))
    assert new != old
    await log_in(postgres, acme, new)
    with pytest.raises(asyncpg.InvalidPasswordError):
        await log_in(postgres, acme, old)
    assert await works(tenancy, acme)
    (entry,) = await tenancy.audit.events(action="tenant.rotate_password")
    assert entry.tenant_id == acme.id
    assert old not in repr(entry)
    assert new not in repr(entry)


async def test_all_passwords_are_rotated(tenancy: Tenancy) -> None:
    """Suspended and deleted tenants' too: they may be restored. Progress is reported."""
    tenants = await created(tenancy, "acme", "globex", "initech")
    await tenancy.tenants.suspend("globex")
    await tenancy.tenants.delete("initech")
    before = [await stored(tenancy, tenant) for tenant in tenants]
    seen: list[int] = []
    report = await tenancy.secrets.rotate_passwords(concurrency=2, progress=seen.append)
    assert (report.rotated, report.failed, seen) == (3, {}, [1, 2, 3])
    after = [await stored(tenancy, tenant) for tenant in tenants]
    assert all(one[0] != other[0] and other[1] is None for one, other in zip(before, after, strict=True))
    await tenancy.tenants.activate("globex")
    assert await works(tenancy, tenants[1])
    with pytest.raises(ConfigurationError, match="concurrency"):
        await tenancy.secrets.rotate_passwords(concurrency=0)


async def test_one_failure_does_not_stop_the_others(tenancy: Tenancy, postgres: Postgres) -> None:
    """It is reported by slug; a purged tenant is left out."""
    acme, globex, initech = await created(tenancy, "acme", "globex", "initech")
    await tenancy.tenants.delete("initech")
    await tenancy.tenants.purge("initech")
    async with postgres.connect() as connection:
        await connection.execute(f'ALTER ROLE "{role(acme)}" RENAME TO "{role(acme)}_away"')
        try:
            report = await tenancy.secrets.rotate_passwords([acme, globex, initech])
        finally:
            await connection.execute(f'ALTER ROLE "{role(acme)}_away" RENAME TO "{role(acme)}"')
    assert report.rotated == 1
    assert list(report.failed) == ["acme"]
    assert "does not exist" in report.failed["acme"]
    assert await works(tenancy, globex)
    with pytest.raises(TenantNotFoundError):
        await tenancy.secrets.rotate_password(initech)


async def test_a_process_that_has_received_nothing_reads_the_registry_once_more(
    tenancy: Tenancy, tenancy_config: TenancyConfig
) -> None:
    """It has cached the old password, is refused, and connects with the new one; without a look-up it would fail."""
    (acme,) = await created(tenancy, "acme")
    async with deaf(tenancy_config) as other:
        assert await works(other, acme)
        await tenancy.secrets.rotate_password(acme)
        connector = other.internals.router._connector("default")
        asked, connector._passwords = connector._passwords, None
        with pytest.raises(LoginRefusedError):
            await works(other, acme)
        connector._passwords = asked
        assert await works(other, acme)
        # its cached tenant is as new as what it has read
        remembered = (await other.internals.directory.tenant("acme")).placement
        assert remembered is not None
        assert remembered.sealed_password == (await stored(tenancy, acme))[0]


async def test_two_logins_that_are_refused_at_once_both_find_the_new_password(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is refused after the second has put the new password into the pool that they share."""
    (acme,) = await created(tenancy, "acme")
    first_refused, second_connected = asyncio.Event(), asyncio.Event()
    real, logins = Connector._log_in_with, 0

    async def log_in_with(self: Connector, route: TenantRoute, sealed: bytes) -> Any:
        nonlocal logins
        logins += 1
        number = logins
        try:
            return await real(self, route, sealed)
        except LoginRefusedError:
            if number == 1:
                first_refused.set()
                await second_connected.wait()
            raise

    async def use(other: Tenancy) -> None:
        async with other.session("acme") as session:
            await session.scalar(text("SELECT 1"))

    async with deaf(tenancy_config) as other:
        assert await works(other, acme)
        other.internals.router.retire(acme.id)
        await tenancy.secrets.rotate_password(acme)
        monkeypatch.setattr(Connector, "_log_in_with", log_in_with)
        async with asyncio.timeout(HANGS), asyncio.TaskGroup() as group:
            first = group.create_task(use(other))
            await first_refused.wait()
            async with other.session("acme") as session:
                await session.scalar(text("SELECT 1"))
                # held, so that the first must open a connection of its own
                second_connected.set()
                await first


async def test_a_new_password_that_works_is_kept_in_the_pool(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """The registry is queried once, and not for every later connection."""
    (acme,) = await created(tenancy, "acme")
    async with deaf(tenancy_config) as other:
        assert await works(other, acme)
        other.internals.router.retire(acme.id)
        await tenancy.secrets.rotate_password(acme)
        connector, asked = other.internals.router._connector("default"), []

        class Asked(SealedPasswords):
            async def candidates(self, tenant_id: UUID) -> tuple[bytes, ...]:
                asked.append(tenant_id)
                return await super().candidates(tenant_id)

        # nobody subscribed to it: the directory is left as it is, or the next session would have another pool
        connector._passwords = Asked(other.internals.control, other.audit, other._lifetime.parts.keyring)
        async with AsyncExitStack() as stack:
            for _ in range(3):
                session = await stack.enter_async_context(other.session("acme"))
                await session.scalar(text("SELECT 1"))
        assert asked == [acme.id]


async def test_a_damaged_password_does_not_hide_the_one_that_works(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a rotation that was interrupted after the role had the next one."""
    (acme,) = await created(tenancy, "acme")
    await interrupt(tenancy, acme, monkeypatch)
    await damage(tenancy, acme, "sealed_password")
    async with opened(tenancy_config) as other:
        assert await works(other, acme)


async def test_a_next_password_that_does_not_open_is_replaced(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The role has it already, and nobody can log in any more; another rotation repairs it."""
    (acme,) = await created(tenancy, "acme")
    await interrupt(tenancy, acme, monkeypatch)
    await damage(tenancy, acme, "next_sealed_password")
    with pytest.raises((LoginRefusedError, SecretError)):
        await works(tenancy, acme)
    report = await tenancy.secrets.finish_rotations()
    assert (report.rotated, report.failed) == (1, {})
    assert await works(tenancy, acme)
    assert (await stored(tenancy, acme))[1] is None


async def test_the_server_is_given_a_verifier_and_no_password(
    tenancy: Tenancy, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stores the verifier as it came, with one iteration, where it would make one of its own from a password."""
    (acme,) = await created(tenancy, "acme")
    given: list[str] = []
    real = roles.set_password

    async def set_password(connection: Any, name: str, *, verifier: str) -> None:
        given.append(verifier)
        await real(connection, name, verifier=verifier)

    monkeypatch.setattr(roles, "set_password", set_password)
    await tenancy.secrets.rotate_password(acme)
    async with postgres.connect() as connection:
        (kept,) = await connection.fetchrow("SELECT rolpassword FROM pg_authid WHERE rolname = $1", role(acme))
    assert kept == given[0]
    assert kept.startswith("SCRAM-SHA-256$1:")
    assert tenancy.internals.provisioner.password(await tenancy.tenants.get("acme")) not in kept


async def test_housekeeping_finishes_what_was_interrupted(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to call it."""
    (acme,) = await created(tenancy, "acme")
    await interrupt(tenancy, acme, monkeypatch)
    report = await tenancy.run_housekeeping()
    assert report.chores["finish_rotations"].rotated == 1
    assert (await stored(tenancy, acme))[1] is None
    assert await works(tenancy, acme)


async def test_a_tenant_that_is_being_created_gets_no_other_password(tenancy: Tenancy) -> None:
    """Its role may not exist yet, and its creation continues with the password that it has."""
    (acme,) = await created(tenancy, "acme")
    async with tenancy.internals.control.transaction() as connection:
        # without the trigger that checks changes of status
        await connection.execute(text("SET LOCAL session_replication_role = replica"))
        await connection.execute(text("UPDATE tenancy.tenants SET status = 'provisioning'"))
    before = await stored(tenancy, acme)
    with pytest.raises(InvalidTransitionError):
        await tenancy.secrets.rotate_password(acme)
    assert await stored(tenancy, acme) == before


async def test_a_tenant_is_named_as_everywhere(tenancy: Tenancy) -> None:
    """By slug, id or ``Tenant``; an unknown slug is an error, and nothing is rotated."""
    (acme,) = await created(tenancy, "acme")
    for ref in ("acme", acme.id, str(acme.id), acme):
        before = await stored(tenancy, acme)
        await tenancy.secrets.rotate_password(ref)
        assert await stored(tenancy, acme) != before
    assert (await tenancy.secrets.rotate_passwords(["acme"])).rotated == 1
    before = await stored(tenancy, acme)
    for call in (tenancy.secrets.rotate_password("nobody"), tenancy.secrets.rotate_passwords(["acme", "nobody"])):
        with pytest.raises(TenantNotFoundError):
            await call
    assert await stored(tenancy, acme) == before


async def test_a_failed_rotation_holds_no_password_in_its_frames(tenancy: Tenancy, postgres: Postgres) -> None:
    """An error reporter that sends local variables would leak it, and a repeated rotation sets it on the role."""
    (acme,) = await created(tenancy, "acme")
    async with postgres.connect() as connection:
        await connection.execute(f'ALTER ROLE "{role(acme)}" RENAME TO "{role(acme)}_away"')
        try:
            with pytest.raises(ProvisioningError) as caught:
                await tenancy.secrets.rotate_password(acme)
        finally:
            await connection.execute(f'ALTER ROLE "{role(acme)}_away" RENAME TO "{role(acme)}"')
    # before this function holds it itself
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "acme" in shown
    pending = (await stored(tenancy, acme))[1]
    assert pending is not None
    assert tenancy._lifetime.parts.keyring.open_password(acme.id, pending) not in shown


async def test_without_the_registry_the_refusal_itself_is_raised(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the control database is unavailable too, the error still says why the connection failed."""
    (acme,) = await created(tenancy, "acme")

    class Away(SealedPasswords):
        async def candidates(self, tenant_id: UUID) -> tuple[bytes, ...]:
            raise ControlUnavailableError("the control database is not available")

    async with deaf(tenancy_config) as other:
        assert await works(other, acme)
        await tenancy.secrets.rotate_password(acme)
        away = Away(other.internals.control, other.audit, other._lifetime.parts.keyring)
        monkeypatch.setattr(other.internals.router._connector("default"), "_passwords", away)
        with pytest.raises(LoginRefusedError) as caught:
            await works(other, acme)
        assert caught.value.sqlstate == "28P01"


@pytest.mark.parametrize("step", ["before the role has it", "after the role has it"])
async def test_an_interrupted_rotation_fails_no_connection_and_is_finished(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """One of the two stored passwords is the role's; only PostgreSQL knows which."""
    (acme,) = await created(tenancy, "acme")

    async def fail(*args: Any, **options: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        if step == "before the role has it":
            patched.setattr(roles, "set_password", fail)
        else:
            patched.setattr(tenancy.secrets._sealed, "finish_rotation", fail)
        with pytest.raises(ProvisioningError, match="not rotated"):
            await tenancy.secrets.rotate_password(acme)
    current, pending = await stored(tenancy, acme)
    assert pending is not None
    async with opened(tenancy_config) as other:
        assert await works(other, acme)
        report = await other.secrets.finish_rotations()
        assert (report.rotated, report.failed) == (1, {})
        assert await works(other, acme)
    assert await stored(tenancy, acme) == (pending, None)
    assert current != pending
    assert await works(tenancy, acme)
    assert (await tenancy.secrets.finish_rotations()).rotated == 0


async def test_rotations_of_one_tenant_take_turns(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """However many processes rotate it at once, it has one password in the end."""
    (acme,) = await created(tenancy, "acme")
    async with opened(tenancy_config) as other:
        await asyncio.gather(*(each.secrets.rotate_password(acme) for each in (tenancy, other) * 4))
    assert (await stored(tenancy, acme))[1] is None
    assert await works(tenancy, acme)
    assert len(await tenancy.audit.events(action="tenant.rotate_password")) == 8


async def test_a_tenant_is_purged_with_both_passwords(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a rotation."""
    (acme,) = await created(tenancy, "acme")

    async def fail(*args: Any, **options: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(roles, "set_password", fail)
        with pytest.raises(ProvisioningError):
            await tenancy.secrets.rotate_password(acme)
    await tenancy.tenants.delete("acme")
    await tenancy.tenants.purge("acme")
    assert await stored(tenancy, acme) == (None, None)


class Load:
    """Requests to every tenant from several processes, as fast as they go, each on a new connection now and then."""

    def __init__(self, processes: list[Tenancy], tenants: list[Tenant]) -> None:
        self.done = 0
        self.failures: list[BaseException] = []
        self._stop = False
        self._tasks = [
            asyncio.create_task(self._use(process, tenant))
            for process in processes
            for tenant in tenants
            for _ in range(2)  # at once: logins that share a pool
        ]

    async def _use(self, process: Tenancy, tenant: Tenant) -> None:
        while not self._stop:
            try:
                if self.done % 3 == 0:
                    process.internals.router.retire(tenant.id)
                query = "SELECT current_user = :role"
                assert await process.fetch_value(query, {"role": role(tenant)}, tenant=tenant)
                self.done += 1
            except BaseException as error:
                self.failures.append(error)
                raise

    async def stop(self) -> None:
        """Let every request end."""
        self._stop = True
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_rotating_everything_under_load_fails_no_request(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """All passwords, three times, and the key that seals them; one of three processes is never notified."""
    tenants = await created(tenancy, "acme", "globex", "initech", "umbrella")
    keys = {**(tenancy_config.encryption_keys or {}), "2": new_key()}
    rotating = tenancy_config.replace(encryption_keys=keys)
    # every process knows the new key before one of them seals with it
    known = tenancy_config.replace(encryption_keys=dict(reversed(keys.items())))
    async with opened(known) as other, deaf(known) as third, opened(rotating) as operator:
        load = Load([other, third], tenants)
        for _ in range(3):
            before = load.done
            report = await operator.secrets.rotate_passwords()
            assert (report.rotated, report.failed) == (4, {})
            await until(lambda: load.done > before + 20 or load.failures)  # noqa: B023 - called at once
        resealed = await operator.secrets.rotate_encryption_key()
        assert resealed.key_id == "2"
        before = load.done
        await until(lambda: load.done > before + 20 or load.failures)
        await load.stop()
    assert load.failures == []
    assert load.done > 80


# --- keys -----------------------------------------------------------------------------------------------------------


async def test_passwords_are_sealed_again_under_the_newest_key(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """Then the old key can be removed. The second time it does nothing."""
    tenants = await created(tenancy, "acme", "globex")
    both = {**(tenancy_config.encryption_keys or {}), "2": new_key()}
    async with opened(tenancy_config.replace(encryption_keys=both)) as other:
        report = await other.secrets.rotate_encryption_key()
        assert (report.key_id, report.resealed, report.failed) == ("2", 2, {})
        assert (report.keys_in_use, report.remaining) == (frozenset({"2"}), frozenset())
        assert (await other.secrets.reseal()).resealed == 0
        assert await other.secrets.keys_in_use() == {"2"}
        (entry,) = await other.audit.events(action="secrets.reseal")
        assert entry.detail == {"key_id": "2", "count": 2}
        with pytest.raises(ConfigurationError, match="encryption_keys"):
            await other.secrets.forget_unused_keys()
    async with opened(tenancy_config.replace(encryption_keys={"2": both["2"]})) as other:
        for tenant in tenants:
            assert await works(other, tenant)


async def test_a_rotation_under_way_is_sealed_again_as_well(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both passwords, or the old key could not be removed."""
    (acme,) = await created(tenancy, "acme")

    async def fail(*args: Any, **options: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(tenancy.secrets._sealed, "finish_rotation", fail)
        with pytest.raises(ProvisioningError):
            await tenancy.secrets.rotate_password(acme)
    both = {**(tenancy_config.encryption_keys or {}), "2": new_key()}
    async with opened(tenancy_config.replace(encryption_keys=both)) as other:
        assert (await other.secrets.rotate_encryption_key()).resealed == 2
    async with opened(tenancy_config.replace(encryption_keys={"2": both["2"]})) as other:
        assert await works(other, acme)
        assert (await other.secrets.finish_rotations()).rotated == 1
        assert await works(other, acme)


async def test_what_stays_locked_is_reported(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is the key that it needs; once the lock is released, a repetition finds nothing left."""
    acme, _ = await created(tenancy, "acme", "globex")
    monkeypatch.setattr(sealed, "_WAIT_SECONDS", 0.1)
    both = {**(tenancy_config.encryption_keys or {}), "2": new_key()}
    async with opened(tenancy_config.replace(encryption_keys=both)) as other:
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text("SELECT 1 FROM tenancy.tenants WHERE id = :id FOR UPDATE"), {"id": acme.id})
            report = await other.secrets.rotate_encryption_key()
        assert (report.resealed, list(report.failed)) == (1, ["acme"])
        assert (report.keys_in_use, report.remaining) == (frozenset({"1", "2"}), frozenset({"1"}))
        assert "locked" in report.failed["acme"]
        again = await other.secrets.reseal()
        assert (again.resealed, again.failed, again.remaining) == (1, {}, frozenset())


async def test_what_is_locked_for_a_while_is_waited_for(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes skip it; the lock is released after them."""
    acme, _ = await created(tenancy, "acme", "globex")
    monkeypatch.setattr(sealed, "_WAIT_SECONDS", 60.0)
    passed, real = asyncio.Event(), SealedPasswords._reseal_locked

    async def reseal_locked(self: SealedPasswords, *args: Any) -> int:
        passed.set()
        return await real(self, *args)

    monkeypatch.setattr(SealedPasswords, "_reseal_locked", reseal_locked)
    both = {**(tenancy_config.encryption_keys or {}), "2": new_key()}
    async with opened(tenancy_config.replace(encryption_keys=both)) as other:
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text("SELECT 1 FROM tenancy.tenants WHERE id = :id FOR UPDATE"), {"id": acme.id})
            resealing = asyncio.create_task(other.secrets.rotate_encryption_key())
            await passed.wait()
        report = await resealing
        assert (report.resealed, report.failed, report.keys_in_use) == (2, {}, frozenset({"2"}))


async def test_a_row_is_locked_while_it_is_sealed_again(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a rotation that ended between reading and writing would be undone, though the role has its password."""
    (acme,) = await created(tenancy, "acme")
    free: list[list[UUID]] = []
    real = SealedPasswords._reseal_rows

    async def reseal_rows(self: SealedPasswords, *args: Any) -> int:
        query = text("SELECT id FROM tenancy.tenants FOR NO KEY UPDATE SKIP LOCKED")
        async with tenancy.internals.control.transaction() as connection:
            free.append(list(await connection.scalars(query)))
        return await real(self, *args)

    monkeypatch.setattr(SealedPasswords, "_reseal_rows", reseal_rows)
    both = {**(tenancy_config.encryption_keys or {}), "2": new_key()}
    async with opened(tenancy_config.replace(encryption_keys=both)) as other:
        # in a pass
        assert (await other.secrets.rotate_encryption_key()).resealed == 1
    await tenancy.secrets.rotate_password(acme)
    monkeypatch.setattr(sealed, "_PASSES", 0)
    async with opened(tenancy_config.replace(encryption_keys=both)) as other:
        # after the passes
        assert (await other.secrets.rotate_encryption_key()).resealed == 1
    assert free == [[], []]


async def test_a_damaged_value_stops_neither_a_reseal_nor_the_keys_in_use(
    tenancy: Tenancy, tenancy_config: TenancyConfig
) -> None:
    """Truncated or empty: it is reported, and the others are resealed."""
    acme, globex, initech = await created(tenancy, "acme", "globex", "initech")
    async with tenancy.internals.control.transaction() as connection:
        query = text("UPDATE tenancy.tenants SET sealed_password = substring(sealed_password for :kept) WHERE id = :id")
        for tenant, kept in ((acme, 0), (globex, 16)):
            await connection.execute(query, {"id": tenant.id, "kept": kept})
    both = {**(tenancy_config.encryption_keys or {}), "2": new_key()}
    async with opened(tenancy_config.replace(encryption_keys=both)) as other:
        report = await other.secrets.rotate_encryption_key()
        assert (report.resealed, sorted(report.failed)) == (1, ["acme", "globex"])
        assert await works(other, initech)


async def test_a_password_that_does_not_open_is_reported(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """It is left as it is; the others are resealed."""
    acme, globex = await created(tenancy, "acme", "globex")
    async with tenancy.internals.control.transaction() as connection:
        query = text("UPDATE tenancy.tenants SET sealed_password = sealed_password || 'x' WHERE id = :id")
        await connection.execute(query, {"id": acme.id})
    damaged = await stored(tenancy, acme)
    both = {**(tenancy_config.encryption_keys or {}), "2": new_key()}
    async with opened(tenancy_config.replace(encryption_keys=both)) as other:
        report = await other.secrets.rotate_encryption_key()
        assert (report.resealed, list(report.failed)) == (1, ["acme"])
        assert await stored(other, acme) == damaged
        with pytest.raises(SecretError):
            await works(other, acme)
        assert await works(other, globex)
        # a new password repairs it
        assert (await other.secrets.rotate_passwords([acme])).failed == {}
        assert await works(other, acme)


# --- envelope encryption --------------------------------------------------------------------------------------------


@pytest.fixture
def wrapped_config(tenancy_config: TenancyConfig) -> TenancyConfig:
    """Data keys in the control database, wrapped by a key that is elsewhere."""
    environ = {"W_WRAPPING_KEYS": f"1:{new_key()}"}
    wrapper = SecretKeyWrapper(EnvironmentSecrets("W_", environ))
    return tenancy_config.replace(encryption_keys=None, secrets={"key_wrapper": wrapper})


async def data_keys(tenancy: Tenancy) -> list[str]:
    """The ids of the data keys, oldest first."""
    async with tenancy.internals.control.connect() as connection:
        return list(await connection.scalars(text("SELECT id FROM tenancy.data_keys ORDER BY number")))


async def test_invitations_outlive_a_rotation_of_the_data_key(wrapped_config: TenancyConfig) -> None:
    """Every process verifies those that were signed before and after, also one that does not know the new key yet.

    Those of a key that is deleted end with it.
    """
    async with opened(wrapped_config, initialise=True) as tenancy, deaf(wrapped_config) as other:
        await created(tenancy, "acme")
        texts = [(await tenancy.members.invite("acme")).text or ""]
        await tenancy.secrets.rotate_encryption_key()
        texts += [(await tenancy.members.invite("acme")).text or "" for _ in range(2)]
        left = await tenancy.members.invite("acme")
        await tenancy.members.accept(texts[0], "before")
        await tenancy.members.accept(texts[1], "after")

        await other.members.accept(texts[2], "elsewhere")
        await tenancy.secrets.rotate_encryption_key()
        await tenancy.secrets.forget_unused_keys()
    async with opened(wrapped_config) as later:
        with pytest.raises(InvalidInvitationError):
            await later.members.accept(left.text or "", "late")


async def test_data_keys_seal_and_the_wrapper_opens_them(wrapped_config: TenancyConfig) -> None:
    """Without the wrapper's key the control database opens nothing."""
    async with opened(wrapped_config, initialise=True) as tenancy:
        (acme,) = await created(tenancy, "acme")
        assert len(await data_keys(tenancy)) == 1
    async with opened(wrapped_config) as tenancy:
        assert await works(tenancy, acme)
        assert len(await data_keys(tenancy)) == 1
    other = SecretKeyWrapper(EnvironmentSecrets("W_", {"W_WRAPPING_KEYS": f"1:{new_key()}"}))
    with pytest.raises(SecretProviderError):
        await Tenancy(wrapped_config.replace(secrets={"key_wrapper": other})).open()


async def test_processes_that_open_at_once_agree_on_the_first_data_key(
    wrapped_config: TenancyConfig, tenancy: Tenancy
) -> None:
    """Each of them opens what any of them seals."""
    processes = [Tenancy(wrapped_config) for _ in range(4)]
    try:
        await asyncio.gather(*(process.open() for process in processes))
        assert len(await data_keys(tenancy)) == 1
    finally:
        for process in processes:
            await process.close()


async def test_a_new_data_key_is_used_at_once_by_processes_that_run(wrapped_config: TenancyConfig) -> None:
    """Those that are notified, and those that are not: they look it up when a password cannot be opened."""
    async with opened(wrapped_config, initialise=True) as tenancy:
        tenants = await created(tenancy, "acme", "globex")
        async with opened(wrapped_config) as other, deaf(wrapped_config) as third:
            load = Load([other, third], tenants)
            await until(lambda: load.done > 5 or load.failures)
            report = await tenancy.secrets.rotate_encryption_key()
            assert (report.resealed, report.failed) == (2, {})
            before = load.done
            await until(lambda: load.done > before + 20 or load.failures)
            await load.stop()
            assert load.failures == []
            third.internals.directory.invalidate()
            assert await works(third, tenants[0])
            newest = (await data_keys(tenancy))[-1]
            await until(lambda: other._lifetime.parts.keyring.current == newest)


async def test_unused_data_keys_are_forgotten(wrapped_config: TenancyConfig) -> None:
    """Never the newest, and none that something is still sealed under."""
    async with opened(wrapped_config, initialise=True) as tenancy:
        (acme,) = await created(tenancy, "acme")
        first = await data_keys(tenancy)
        assert await tenancy.secrets.forget_unused_keys() == []
        await tenancy.secrets.rotate_encryption_key()
        assert await tenancy.secrets.forget_unused_keys() == first
        assert len(await data_keys(tenancy)) == 1
    async with opened(wrapped_config) as tenancy:
        assert await works(tenancy, acme)


async def test_a_data_key_that_something_is_sealed_under_is_kept(wrapped_config: TenancyConfig) -> None:
    """Although it is not the newest; even if only a next password needs it."""
    async with opened(wrapped_config, initialise=True) as tenancy:
        await created(tenancy, "acme")
        (first,) = await data_keys(tenancy)
        assert tenancy._lifetime.parts._data_keys is not None
        await tenancy._lifetime.parts._data_keys.rotate()
        assert await tenancy.secrets.forget_unused_keys() == []
        assert await tenancy.secrets.keys_in_use() == {first}
        async with tenancy.internals.control.transaction() as connection:
            query = "UPDATE tenancy.tenants SET next_sealed_password = sealed_password, sealed_password = 'x'"
            await connection.execute(text(query))
        assert await tenancy.secrets.keys_in_use() == {first}
        assert await tenancy.secrets.forget_unused_keys() == []
        assert (await data_keys(tenancy))[0] == first


async def test_the_newest_data_key_is_kept_though_nothing_is_sealed_under_it(wrapped_config: TenancyConfig) -> None:
    """The next password will be."""
    async with opened(wrapped_config, initialise=True) as tenancy:
        (first,) = await data_keys(tenancy)
        report = await tenancy.secrets.rotate_encryption_key()
        assert await tenancy.secrets.forget_unused_keys() == [first]
        assert await tenancy.secrets.forget_unused_keys() == []
        assert await data_keys(tenancy) == [report.key_id]


class Told(SecretKeyWrapper):
    """Records the contexts of the keys that it wraps."""

    def __init__(self, secrets: EnvironmentSecrets) -> None:
        super().__init__(secrets)
        self.contexts: list[dict[str, str]] = []

    async def wrap(self, key: bytes, *, context: Mapping[str, str]) -> bytes:
        """Record the context."""
        self.contexts.append(dict(context))
        return await super().wrap(key, context=context)


async def test_data_keys_are_bound_to_the_installation_and_to_their_ids(tenancy_config: TenancyConfig) -> None:
    """Swapped rows cannot be unwrapped, nor can a row of another installation."""
    wrapper = Told(EnvironmentSecrets("W_", {"W_WRAPPING_KEYS": f"1:{new_key()}"}))
    config = tenancy_config.replace(encryption_keys=None, secrets={"key_wrapper": wrapper})
    async with opened(config, initialise=True) as tenancy:
        await tenancy.secrets.rotate_encryption_key()
        installation = str(tenancy.internals.control.installation)
        ids = await data_keys(tenancy)
        assert wrapper.contexts == [
            {"purpose": "tenancy-data-key", "installation": installation, "id": key_id} for key_id in ids
        ]
        async with tenancy.internals.control.transaction() as connection:
            query = "UPDATE tenancy.data_keys k SET wrapped = o.wrapped FROM tenancy.data_keys o WHERE o.id <> k.id"
            await connection.execute(text(query))
    with pytest.raises(SecretProviderError, match="does not unwrap"):
        await Tenancy(config).open()


async def test_a_data_key_has_256_bits(tenancy_config: TenancyConfig) -> None:
    """A wrapper that returns something shorter would have it seal with a weaker cipher."""

    class Short(SecretKeyWrapper):
        async def unwrap(self, wrapped: bytes, *, context: Mapping[str, str]) -> bytes:
            return (await super().unwrap(wrapped, context=context))[:16]

    wrapper = Short(EnvironmentSecrets("W_", {"W_WRAPPING_KEYS": f"1:{new_key()}"}))
    with pytest.raises(SecretError, match="16 bytes"):
        await Tenancy(tenancy_config.replace(encryption_keys=None, secrets={"key_wrapper": wrapper})).open(
            initialise=True
        )


async def test_a_data_key_that_does_not_unwrap_stops_nothing_else(wrapped_config: TenancyConfig) -> None:
    """Neither opening nor rotating fails; it seals nothing, and is deleted once it is not the last."""
    async with opened(wrapped_config, initialise=True) as tenancy:
        (acme,) = await created(tenancy, "acme")
        (first,) = await data_keys(tenancy)
        async with tenancy.internals.control.transaction() as connection:
            query = "INSERT INTO tenancy.data_keys (id, wrapped, wrapper) VALUES ('junk', 'x', 'x')"
            await connection.execute(text(query))
    async with opened(wrapped_config) as tenancy:
        assert await works(tenancy, acme)
        assert tenancy._lifetime.parts.keyring.current == first
        # another process may have created it, and be about to seal with it
        assert await tenancy.secrets.forget_unused_keys() == []
        report = await tenancy.secrets.rotate_encryption_key()
        assert (report.resealed, report.failed) == (1, {})
        assert sorted(await tenancy.secrets.forget_unused_keys()) == sorted([first, "junk"])
        assert await works(tenancy, acme)


async def test_rotations_of_the_key_at_once_end_under_the_newest(
    wrapped_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one reads the newer key rather than failing on it, and does not reseal under the older one."""
    async with opened(wrapped_config, initialise=True) as tenancy:
        await created(tenancy, "acme", "globex")
        async with deaf(wrapped_config) as other:
            real = SealedPasswords.reseal

            async def reseal(self: SealedPasswords, **options: Any) -> ResealReport:
                if self is other.secrets._sealed:
                    # the other has created its key; this one creates a newer one, and finishes before the other begins
                    assert (await tenancy.secrets.rotate_encryption_key()).resealed == 2
                return await real(self, **options)

            monkeypatch.setattr(SealedPasswords, "reseal", reseal)
            report = await other.secrets.rotate_encryption_key()
        newest = (await data_keys(tenancy))[-1]
        assert (report.key_id, report.resealed, report.failed) == (newest, 0, {})
        assert report.keys_in_use == {newest}


async def test_a_process_that_receives_nothing_learns_of_the_newest_key(
    wrapped_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From time to time, and whenever it rotates a password: otherwise deleted keys would still seal."""
    async with opened(wrapped_config, initialise=True) as tenancy:
        (acme,) = await created(tenancy, "acme")
        async with deaf(wrapped_config) as rotating:
            monkeypatch.setattr(assembly, "_UPDATE_SECONDS", 0.05)
            async with deaf(wrapped_config) as waiting:
                report = await tenancy.secrets.rotate_encryption_key()
                await until(lambda: waiting._lifetime.parts.keyring.current == report.key_id)
            assert rotating._lifetime.parts.keyring.current != report.key_id
            await rotating.secrets.rotate_password(acme)
            assert await tenancy.secrets.keys_in_use() == {report.key_id}
            assert await works(tenancy, acme)


async def test_no_request_fails_after_the_wrapping_keys_are_rotated(tenancy_config: TenancyConfig) -> None:
    """A process reads them again when the new one has wrapped a data key that it needs."""
    first, second = new_key(), new_key()
    environ = {"W_WRAPPING_KEYS": f"1:{first}"}

    def config() -> TenancyConfig:
        wrapper = SecretKeyWrapper(EnvironmentSecrets("W_", environ))
        return tenancy_config.replace(encryption_keys=None, secrets={"key_wrapper": wrapper})

    async with opened(config(), initialise=True) as tenancy:
        (acme,) = await created(tenancy, "acme")
        async with deaf(config()) as other:
            assert await works(other, acme)
            environ["W_WRAPPING_KEYS"] = f"1:{first},2:{second}"
            async with opened(config()) as operator:
                await operator.secrets.rotate_encryption_key()
            other.internals.directory.invalidate(tenant_id=acme.id)
            assert await works(other, acme)


async def test_an_installation_whose_keys_come_from_a_provider_can_change_over(
    tenancy: Tenancy, wrapped_config: TenancyConfig
) -> None:
    """The options that ``secret_options`` names are read besides the wrapper's keys."""
    (acme,) = await created(tenancy, "acme")
    keys = tenancy.config.encryption_keys or {}
    environ = {"S_ENCRYPTION_KEYS": ",".join(f"{key_id}:{value!s}" for key_id, value in keys.items())}
    changing = wrapped_config.replace(
        secrets={"provider": EnvironmentSecrets("S_", environ), "options": ("encryption_keys",)}
    )
    async with opened(changing) as other:
        assert await works(other, acme)
        report = await other.secrets.rotate_encryption_key()
        assert (report.resealed, report.failed, report.remaining) == (1, {}, frozenset())
    async with opened(wrapped_config) as other:
        assert await works(other, acme)


async def test_an_installation_can_change_over_to_data_keys(tenancy: Tenancy, wrapped_config: TenancyConfig) -> None:
    """With both configured, old passwords can be opened and are resealed; then the old key can be removed."""
    (acme,) = await created(tenancy, "acme")
    changing = wrapped_config.replace(encryption_keys=tenancy.config.encryption_keys)
    async with opened(changing) as other:
        assert await works(other, acme)
        assert (await other.secrets.rotate_encryption_key()).resealed == 1
    async with opened(wrapped_config) as other:
        assert await works(other, acme)
        assert (await other.tenants.get("acme")).status is Status.ACTIVE


# --- providers ------------------------------------------------------------------------------------------------------


async def test_a_tenancy_reads_its_keys_from_a_provider(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """It opens what was sealed under them."""
    (acme,) = await created(tenancy, "acme")
    keys = tenancy_config.encryption_keys or {}
    environ = {"S_ENCRYPTION_KEYS": ",".join(f"{key_id}:{value!s}" for key_id, value in keys.items())}
    config = tenancy_config.replace(encryption_keys=None, secrets={"provider": EnvironmentSecrets("S_", environ)})
    async with opened(config) as other:
        assert await works(other, acme)


async def test_nothing_stored_is_a_password_or_a_key(wrapped_config: TenancyConfig) -> None:
    """Neither in the registry nor in a repr."""
    async with opened(wrapped_config, initialise=True) as tenancy:
        (acme,) = await created(tenancy, "acme")
        await tenancy.secrets.rotate_password(acme)
        password = tenancy.internals.provisioner.password(await tenancy.tenants.get("acme"))
        parts = tenancy._lifetime.parts
        keys = [key.hex() for key in parts.config.sealing_keys.values()]
        shown = repr((tenancy, parts.config, parts.keyring, parts._data_keys, parts.secrets, parts.sealed, acme))
        rows: list[str] = [shown]
        async with tenancy.internals.control.connect() as connection:
            for table in ("tenants", "data_keys", "audit_log"):
                rows.extend(await connection.scalars(text(f"SELECT t::text FROM tenancy.{table} t")))
        assert str(acme.id) in "".join(rows)
        assert [row for row in rows if password in row or any(key in row for key in keys)] == []
