"""Seeds of new tenants: those in the template, and those that run before a tenant becomes active."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tenancy_orm import Tenancy, Tenant
from tenancy_orm.context import current_tenant_or_none
from tenancy_orm.errors import ConfigurationError, CrossTenantError, SeedError, TenantNotFoundError
from tenancy_orm.provisioning.creation.pipeline import Creation
from tenancy_orm.seeds import running, seed
from tests.integration.seeds.conftest import COUNTRIES, ROLES, Configure, Opened


@seed(version=3)
async def owner_role(session: AsyncSession, tenant: Tenant) -> None:
    """Depends on the tenant."""
    bound = current_tenant_or_none()
    assert bound is not None
    await session.execute(insert(ROLES).values(name="owner", note=f"{tenant.slug} {bound.slug} {tenant.tier}"))


def member_role(session: Session, previous: int | None) -> None:
    """A plain function gets a plain session."""
    session.execute(insert(ROLES).values(name="member", note=str(previous)))


def write(path: Path, content: str) -> None:
    """Write a file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, "utf-8")


async def test_new_tenants_are_born_with_their_seeds(opened: Opened, tmp_path: Path) -> None:
    """Async and plain functions get the session, the tenant where they ask for it, and their versions are recorded."""
    write(tmp_path / "seeds" / "0002_at.sql", "INSERT INTO countries (code, name) VALUES ('AT', 'x;y')")
    write(
        tmp_path / "seeds" / "0001_own.sql",
        "-- seed: version=2, template=false\nINSERT INTO roles VALUES ('clerk', session_user); -- as the tenant\n"
        "UPDATE roles SET note = 'me' WHERE note = current_user",
    )
    seeds = [owner_role, member_role, f"{__name__}:template_country", tmp_path / "seeds"]
    async with opened(seeds) as fleet:
        await fleet.create("acme", "globex")
        roles = await fleet.fetch("globex", "SELECT name, note FROM roles ORDER BY 1")
        assert roles == [("clerk", "me"), ("member", "None"), ("owner", "globex globex free")]
        names = await fleet.fetch("globex", "SELECT code, name FROM countries ORDER BY 1")
        # in the template there is no tenant, and the owner of the tables does it
        assert [row[0] for row in names] == ["AT", "XX"]
        assert names[1][1] == fleet.provisioner.names.owner
        assert {(x.slug, x.outstanding) for x in await fleet.tenancy.seeds.status()} == {("acme", ()), ("globex", ())}
        [found] = await fleet.tenancy.seeds.status("acme")
        assert found.applied == {
            "owner_role": 3,
            "member_role": 1,
            "template_country": 1,
            "0001_own": 2,
            "0002_at": 1,
        }


def template_country_function(session: Session) -> None:
    """Does not depend on the tenant."""
    assert current_tenant_or_none() is None
    session.execute(insert(COUNTRIES).values(code="XX", name=text("current_user")))


template_country = seed(name="template_country", template=True)(template_country_function)


async def test_a_template_seed_runs_once_and_a_changed_one_builds_another_template(
    opened: Opened, tmp_path: Path
) -> None:
    """It costs nothing at a creation; the template's key has its content, and the old one is superseded."""
    calls: list[str] = []

    @seed(template=True)
    async def counted(session: AsyncSession) -> None:
        calls.append("called")

    file = tmp_path / "roles.sql"
    write(file, "INSERT INTO roles VALUES ('first')")
    async with opened([counted, file]) as fleet:
        await fleet.create("acme", "globex")
        assert len(calls) == 1
        [first] = [x.name for x in await fleet.tenancy.templates.list() if x.state == "current"]
        write(file, "INSERT INTO roles VALUES ('second')")
        await fleet.create("initech")
        assert await fleet.fetch("globex", "SELECT name FROM roles") == [("first",)]
        assert await fleet.fetch("initech", "SELECT name FROM roles") == [("second",)]
        states = {x.name: x.state for x in await fleet.tenancy.templates.list()}
        assert states.pop(first) == "in use"
        assert "current" in states.values()
        # the version is the same, so existing tenants are not touched
        assert (await fleet.tenancy.seeds.apply()).changed == ()
        write(file, "COMMIT")
        with pytest.raises(ConfigurationError, match="one transaction: leave COMMIT out"):
            await fleet.create("hooli")


async def test_a_failing_seed_undoes_the_creation(opened: Opened) -> None:
    """The error names the seed, what earlier ones did is gone, and the slug is free."""
    fails = True

    @seed(name="stocks")
    async def failing(session: AsyncSession) -> None:
        await session.execute(insert(ROLES).values(name="owner"))

    async def after(session: AsyncSession) -> None:
        if fails:
            await session.execute(insert(ROLES).values(name="owner"))

    async with opened([failing, after]) as fleet:
        with pytest.raises(SeedError, match=r"seed 'after' failed: .*SQLSTATE 23505.* for tenant 'acme'") as caught:
            await fleet.create("acme")
        assert (caught.value.seed, caught.value.tenant, caught.value.step) == ("after", "acme", "seeds")
        with pytest.raises(TenantNotFoundError):
            await fleet.tenancy.tenants.get("acme")
        assert (await fleet.provisioner.reconcile()).clean
        fails = False
        await fleet.create("acme")
        assert await fleet.fetch("acme", "SELECT name FROM roles") == [("owner",)]


async def test_a_process_without_the_seeds_does_not_finish_a_creation(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``Tenancy.on_create`` is known to processes that import it; the name of the last step may be lost in a crash."""

    async def killed(session: AsyncSession) -> None:
        raise LookupError

    async def leave(self: Creation, error: BaseException) -> bool:
        return False

    async with opened([killed]) as fleet:
        registry = fleet.services.registry
        record = registry.record_step

        async def lose_the_last(tenant_id: UUID, step: str) -> None:
            if step != "seeds":
                await record(tenant_id, step)

        monkeypatch.setattr(registry, "record_step", lose_the_last)
        monkeypatch.setattr(Creation, "_undo_started", leave)
        with pytest.raises(SeedError):
            await fleet.tenancy.tenants.create("acme")
    async with opened() as fleet:
        assert (await fleet.provisioner.reconcile()).removed == ("acme",)


@pytest.mark.parametrize("template", [False, True])
async def test_a_hanging_seed_is_bounded(opened: Opened, template: bool) -> None:
    """In the creation and in the template alike, whether it hangs in PostgreSQL or not."""

    @seed(template=template)
    async def sleeper(session: AsyncSession) -> None:
        await session.execute(text("SELECT pg_sleep(100)"))

    @seed(template=template)
    async def waiter(session: AsyncSession) -> None:
        await asyncio.Event().wait()

    for one in (sleeper, waiter):
        async with opened([one], seed_timeout=0.3) as fleet:
            with pytest.raises(SeedError, match=rf"seed '{one.name}' did not end within 0.3 s"):
                await fleet.create("acme")
            assert (await fleet.provisioner.reconcile()).clean


@pytest.mark.parametrize("protected", [False, True])
async def test_a_seed_opens_no_session_of_another_tenant(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    """The new tenant is bound while its seeds run; without that, the seed would get in."""
    reached: list[str] = []

    async def curious(session: AsyncSession, tenant: Tenant) -> None:
        if tenant.slug == "globex":
            async with fleet.tenancy.session("acme") as other:
                reached.append(str(await other.scalar(text("SELECT current_database()"))))

    if not protected:
        monkeypatch.setattr(running, "bind", nullcontext)
    async with opened([curious]) as fleet:
        await fleet.create("acme")
        if not protected:
            await fleet.create("globex")
            assert reached == [fleet.database("acme")]
            return
        with pytest.raises(SeedError) as caught:
            await fleet.create("globex")
        assert isinstance(caught.value.__cause__, CrossTenantError)
        assert reached == []


async def test_a_seed_has_the_rights_of_the_tenant_alone(opened: Opened) -> None:
    """In PostgreSQL as well: it cannot become another tenant's role, or the owner."""
    wanted: list[str] = []

    async def climber(session: AsyncSession) -> None:
        for role in wanted:
            await session.execute(text(f'SET ROLE "{role}"'))

    async with opened([climber]) as fleet:
        await fleet.create("acme")
        for role in (fleet.database("acme"), fleet.provisioner.names.owner):
            wanted[:] = [role]
            with pytest.raises(SeedError, match="42501"):
                await fleet.create("globex")


async def test_a_tenant_can_be_created_without_seeds(opened: Opened) -> None:
    """For a tenant that gets its rows from elsewhere; those of the template it has all the same."""
    async with opened([owner_role, template_country]) as fleet:
        await fleet.tenancy.tenants.create("acme", seed=False)
        [found] = await fleet.tenancy.seeds.status()
        assert (found.applied, found.outstanding) == ({"template_country": 1}, ("owner_role",))


async def test_an_application_registers_seeds_in_code(configure: Configure) -> None:
    """``on_create`` with and without arguments; a later one counts at once."""
    tenancy = Tenancy(configure())

    @tenancy.on_create
    async def first(session: AsyncSession) -> None:
        await session.execute(insert(ROLES).values(name="first"))

    await tenancy.open(initialise=True)
    try:
        await tenancy.tenants.create("acme")

        @tenancy.on_create(version=7, template=True)
        def second(session: Session) -> None:
            session.execute(insert(ROLES).values(name="second"))

        await tenancy.tenants.create("globex")
        async with tenancy.session("globex") as session:
            assert set(await session.scalars(select(ROLES.c.name))) == {"first", "second"}
        assert [(x.name, x.version) for x in (first, second)] == [("first", 1), ("second", 7)]
        assert [x.outstanding for x in await tenancy.seeds.status()] == [("second",), ()]
    finally:
        await tenancy.close()


async def test_without_seeds_nothing_is_added(opened: Opened) -> None:
    """No further step, no schema for records, and the same template as before."""
    async with opened() as fleet:
        await fleet.create("acme")
        found = await fleet.fetch("acme", "SELECT count(*) FROM pg_namespace WHERE nspname = 'tenancy_orm'")
        assert found == [(0,)]
        assert await fleet.tenancy.seeds.status() == []
        assert (await fleet.tenancy.seeds.apply()).outcomes == ()
