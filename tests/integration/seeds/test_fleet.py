"""``tenancy.seeds``: bringing seeds and reference data to existing tenants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncSession

from tenancy_orm import Tenancy, Tenant
from tenancy_orm.audit.actor import Actor
from tenancy_orm.config import ReferenceTable
from tenancy_orm.errors import ConfigurationError, FleetSeedError, SeedError
from tenancy_orm.events import TenantSeeded, TenantSeedingFailed
from tenancy_orm.seeds import Seed, records, reference, seed
from tenancy_orm.seeds.reference import ReferenceChange
from tenancy_orm.seeds.source import Reference
from tests.integration.seeds.conftest import ROLES, Configure, Opened
from tests.support.fleet import Fleet, count_queries, until

CODES = "SELECT code, name FROM countries ORDER BY 1"


def role(name: str, version: int = 1, *, template: bool = False) -> Seed:
    """A seed that adds a role, or notes its version in it."""

    async def add(session: AsyncSession, previous: int | None) -> None:
        if previous is None:
            await session.execute(insert(ROLES).values(name=name, note=f"{version}"))
        else:
            change = ROLES.update().where(ROLES.c.name == name).values(note=ROLES.c.note + f" {previous}>{version}")
            await session.execute(change)

    return seed(name=name, version=version, template=template)(add)


def write(path: Path, content: str) -> None:
    """Write a file."""
    path.write_text(content, "utf-8")


async def roles(fleet: Fleet, slug: str) -> dict[str, str]:
    """The roles of a tenant."""
    return {row[0]: row[1] for row in await fleet.fetch(slug, "SELECT name, note FROM roles")}


async def test_existing_tenants_get_new_and_raised_versions_once(opened: Opened) -> None:
    """Each version is applied once, in each tenant, and is audited and announced; a dry run changes nothing."""
    async with opened([role("owner")]) as fleet:
        await fleet.create("acme", "globex")
    seeds = [role("owner", 2), role("clerk"), role("base", template=True)]
    async with opened(seeds) as fleet:
        seen: list[Any] = []
        fleet.tenancy.events.subscribe(TenantSeeded, seen.append)
        planned = await fleet.tenancy.seeds.apply(dry_run=True)
        expected = {"owner": 2, "clerk": 1, "base": 1}
        assert [dict(x.applied) for x in planned.outcomes] == [expected, expected]
        assert await roles(fleet, "acme") == {"owner": "1"}
        only = await fleet.tenancy.seeds.apply(["acme"], only="clerk")
        assert [(x.slug, dict(x.applied)) for x in only.outcomes] == [("acme", {"clerk": 1})]
        report = await fleet.tenancy.seeds.apply(actor=Actor("operator", "cli:me"))
        assert [dict(x.applied) for x in report.outcomes] == [
            {"base": 1, "owner": 2},
            {"base": 1, "owner": 2, "clerk": 1},
        ]
        assert await roles(fleet, "globex") == {"owner": "1 1>2", "clerk": "1", "base": "1"}
        assert (await fleet.tenancy.seeds.apply()).changed == ()
        assert [(x.slug, x.names) for x in seen] == [
            ("acme", ("clerk",)),
            ("acme", ("base", "owner")),
            ("globex", ("base", "owner", "clerk")),
        ]
        entries = await fleet.tenancy.audit.events(action="tenant.seed")
        written = [x.detail["applied"] for x in entries if x.actor == Actor("operator", "cli:me")]
        assert len(written) == 2
        assert all(dict(x.applied) in written for x in report.outcomes)
        again = await fleet.tenancy.seeds.apply("acme", only=["clerk"], force=True)
        assert again.summary().startswith("seed: 1 tenant, 1 seeded, 0 unchanged, 0 failed")
        assert (await roles(fleet, "acme"))["clerk"] == "1 1>1"
        with pytest.raises(ConfigurationError, match="pass only="):
            await fleet.tenancy.seeds.apply(force=True)
        with pytest.raises(ConfigurationError, match=r"reference table 'x'; there are: base, owner, clerk"):
            await fleet.tenancy.seeds.apply(only="x")


async def test_partial_failures_are_listed_and_the_others_go_on(opened: Opened) -> None:
    """The failed tenant keeps what was applied before, and a repeated run takes up where it ended."""
    async with opened() as fleet:
        await fleet.create("acme", "globex", "initech")
        await fleet.execute("globex", "DROP TABLE countries CASCADE")
    fails = True

    async def fragile(session: AsyncSession, tenant: Tenant) -> None:
        if fails:
            await session.execute(text("SELECT count(*) FROM countries"))
        await session.execute(insert(ROLES).values(name="fragile"))

    async with opened([role("first"), fragile, role("last")]) as fleet:
        failed: list[Any] = []
        fleet.tenancy.events.subscribe(TenantSeedingFailed, failed.append)
        await fleet.tenancy.tenants.suspend("initech")
        report = await fleet.tenancy.seeds.apply()
        assert [(x.slug, tuple(x.applied), x.skipped, x.sqlstate) for x in report.outcomes] == [
            ("acme", ("first", "fragile", "last"), (), None),
            ("globex", ("first",), (), "42P01"),
            # PostgreSQL refuses its login, so only what runs as the owner can be done
            ("initech", (), ("first", "fragile", "last"), None),
        ]
        with pytest.raises(FleetSeedError, match="1 of 3 tenants failed to be seeded: globex"):
            report.raise_for_failures()
        assert [x.slug for x in failed] == ["globex"]
        assert set(await roles(fleet, "globex")) == {"first"}
        fails = False
        await fleet.tenancy.tenants.activate("initech")
        assert [tuple(x.applied) for x in (await fleet.tenancy.seeds.apply()).outcomes] == [
            (),
            ("fragile", "last"),
            ("first", "fragile", "last"),
        ]


async def test_a_failure_in_the_template_touches_no_tenant(opened: Opened) -> None:
    """The template is built before the first tenant."""
    async with opened() as fleet:
        await fleet.create("acme")

    @seed(template=True)
    async def broken(session: AsyncSession) -> None:
        raise LookupError("no such thing")

    async with opened([role("owner"), broken]) as fleet:
        with pytest.raises(SeedError, match="seed 'broken' failed: LookupError: no such thing"):
            await fleet.tenancy.seeds.apply()
        assert await roles(fleet, "acme") == {}


@pytest.mark.parametrize("template", [False, True])
async def test_a_seed_cannot_end_its_transaction(opened: Opened, template: bool) -> None:
    """Else it would count as applied although it failed afterwards. A savepoint is its own affair."""

    async def committing(session: AsyncSession) -> None:
        await session.execute(insert(ROLES).values(name="half"))
        await session.commit()
        raise LookupError("the other half")

    async def rolling_back(session: AsyncSession) -> None:
        await session.execute(insert(ROLES).values(name="half"))
        await session.rollback()

    async def sending(session: AsyncSession) -> None:
        await session.execute(insert(ROLES).values(name="half"))
        await session.execute(text("/* at once */ COMMIT"))
        raise LookupError("the other half")

    async def nested(session: AsyncSession) -> None:
        async with session.begin_nested():
            await session.execute(insert(ROLES).values(name="nested"))
        async with session.begin_nested() as savepoint:
            await session.execute(text("INSERT INTO roles VALUES ('END; COMMIT')"))
            await savepoint.rollback()

    async with opened() as fleet:
        await fleet.create("acme")
    for function, reason in (
        (committing, "must not commit"),
        (rolling_back, "must not end its transaction; raise an error"),
        (sending, "must not end its transaction: leave COMMIT out"),
    ):
        async with opened([seed(template=template)(function)]) as fleet:
            if template:
                with pytest.raises(SeedError, match=reason):
                    await fleet.tenancy.seeds.apply()
            else:
                [outcome] = (await fleet.tenancy.seeds.apply()).outcomes
                assert reason in (outcome.error or "")
                assert outcome.applied == {}
            assert await roles(fleet, "acme") == {}
    async with opened([seed(template=template)(nested)]) as fleet:
        assert (await fleet.tenancy.seeds.apply()).ok
        assert set(await roles(fleet, "acme")) == {"nested"}


async def test_two_runs_at_once_apply_each_seed_once(opened: Opened, configure: Configure) -> None:
    """The second one waits for the first one's transaction, and finds the version that it has left."""
    async with opened() as fleet:
        tenants = await fleet.create("acme", "globex")
    meeting = asyncio.Event()
    waiting = 0

    @seed
    async def slow(session: AsyncSession) -> None:
        nonlocal waiting
        waiting += 1
        await meeting.wait()
        await session.execute(text("INSERT INTO roles SELECT 'slow' || count(*) FROM roles"))

    seeds = [role("base", template=True), slow]
    async with opened(seeds) as fleet, Tenancy(configure(seeds)) as other:
        runs = [asyncio.create_task(x.seeds.apply()) for x in (fleet.tenancy, other)]
        fleet.tenants = {tenant.slug: tenant for tenant in tenants}
        async with fleet.connect("acme") as connection:
            blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = ANY($1)"
            names = [fleet.database("acme"), fleet.database("globex")]
            await until(lambda: connection.fetchval(blocked, names), 2)
        meeting.set()
        reports = await asyncio.gather(*runs)
        assert waiting == 2
        assert all(report.ok for report in reports)
        applied = [name for report in reports for x in report.outcomes for name in x.applied]
        assert sorted(applied) == ["base", "base", "slow", "slow"]
        assert set(await roles(fleet, "acme")) == {"base", "slow1"}


# --- reference data -------------------------------------------------------------------------------------------------


def table(source: Any, **options: Any) -> dict[str, Any]:
    """The setting."""
    return {"countries": {"table": "countries", "key": ["code"], "source": source, **options}}


async def test_reference_data_is_brought_changed_and_removed(
    opened: Opened, countries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that it brought go when the source has them no longer; a referenced one and a tenant's own row stay."""
    async with opened() as fleet:
        await fleet.create("old")
        await fleet.execute("old", "INSERT INTO countries (code, name) VALUES ('ZZ', 'its own')")
    async with opened(reference=table(countries)) as fleet:
        await fleet.create("acme")
        assert await fleet.fetch("acme", CODES) == [("AT", "Austria"), ("BE", "Belgium"), ("CH", "Switzerland")]
        [lacks, has] = await fleet.tenancy.seeds.status()
        assert (lacks.outstanding, has.outstanding) == (("countries",), ())
        report = await fleet.tenancy.seeds.apply()
        assert [dict(x.applied) for x in report.outcomes] == [dict(has.applied), {}]
        assert len(await fleet.fetch("old", CODES)) == 4
        # a customer refers to one, with ON DELETE CASCADE, and a column that the source lacks is the tenant's
        await fleet.execute("acme", "INSERT INTO customers VALUES (1, 'BE'); UPDATE countries SET seen = 5")
        write(countries, "code,name\nAT,Österreich\nDE,Germany\n")
        report = await fleet.tenancy.seeds.apply()
        assert [dict(x.kept) for x in report.outcomes] == [{}, {"countries": ('{"code":"BE"}',)}]
        assert await fleet.fetch("old", CODES) == [("AT", "Österreich"), ("DE", "Germany"), ("ZZ", "its own")]
        assert await fleet.fetch("acme", CODES) == [("AT", "Österreich"), ("BE", "Belgium"), ("DE", "Germany")]
        assert await fleet.fetch("acme", "SELECT seen FROM countries ORDER BY code") == [(5,), (5,), (0,)]
        # a kept row goes with a later run, once nobody refers to it
        await fleet.execute("acme", "DELETE FROM customers")
        await fleet.tenancy.seeds.apply("acme", only="countries", force=True)
        assert [row[0] for row in await fleet.fetch("acme", CODES)] == ["AT", "DE"]
        # what has not changed costs a connection and one statement
        queries = count_queries(fleet.services.servers["default"], monkeypatch)
        assert (await fleet.tenancy.seeds.apply()).changed == ()
        asked = [found for database, found in queries.items() if database is not None]
        assert [len([x for x in found if not x.startswith(("SET ", "RESET"))]) for found in asked] == [1, 1]


async def test_a_renamed_key_and_json_in_a_csv(opened: Opened, countries: Path) -> None:
    """A new row may have what is unique in one that goes; a text of JSON becomes JSON, and not a string in it."""
    async with opened() as fleet:
        await fleet.create("acme")
        await fleet.execute("acme", "ALTER TABLE countries ADD j jsonb, ADD k json, ADD UNIQUE (name)")
        kinds = "SELECT code, jsonb_typeof(j), json_typeof(k) FROM countries ORDER BY name DESC"
        for eu in ("Eu", "EU"):
            write(countries, f'code,name,j,k\n{eu},Europe,"{{""a"": 1}}",\nAT,Austria,,[1]\n')
            [source] = [Reference(name, ReferenceTable(**one)) for name, one in table(countries).items()]
            async with fleet.connect("acme") as connection:
                await records.create_tables(connection)
                change = await reference.bring(connection, await source.load(), timeout=10)
            assert change == ReferenceChange(*((2, 0) if eu == "Eu" else (1, 1)))
            assert await fleet.fetch("acme", kinds) == [(eu, "object", None), ("AT", None, "array")]


async def test_a_table_that_was_made_again_gets_its_rows_again(opened: Opened, countries: Path) -> None:
    """A migration down and up again, for example: the record is of another table."""
    async with opened(reference=table(countries)) as fleet:
        await fleet.create("acme")
        owner = fleet.provisioner.names.owner
        again = "CREATE TABLE countries AS TABLE gone WITH NO DATA; ALTER TABLE countries ADD PRIMARY KEY (code)"
        await fleet.execute("acme", f'SET ROLE "{owner}"; ALTER TABLE countries RENAME TO gone; {again}')
        assert [x.outstanding for x in await fleet.tenancy.seeds.status()] == [("countries",)]
        assert (await fleet.tenancy.seeds.apply()).ok
        assert len(await fleet.fetch("acme", CODES)) == 3
        async with fleet.tenancy.session("acme") as session:
            assert not await session.scalar(text("SELECT has_table_privilege('countries', 'INSERT')"))


async def test_the_template_has_reference_data_and_follows_the_file(opened: Opened, countries: Path) -> None:
    """New tenants are born with the rows of the file as it is now."""
    async with opened(reference=table(countries)) as fleet:
        await fleet.create("acme")
        write(countries, "code,name\nFR,France\n")
        await fleet.create("globex")
        assert await fleet.fetch("globex", CODES) == [("FR", "France")]
        assert [x.outstanding for x in await fleet.tenancy.seeds.status()] == [("countries",), ()]


@pytest.mark.parametrize("kind", ["json", "jsonl", "sql", "function", "generator", "async generator"])
async def test_sources_of_every_kind(opened: Opened, tmp_path: Path, kind: str) -> None:
    """Rows that refer to each other are written together, and removed with those that refer to them."""
    rows: list[dict[str, Any]] = [
        {"code": "EU", "name": "Europe", "part_of": None},
        {"code": "AT", "name": "Austria", "part_of": "EU"},
    ]

    async def generate() -> AsyncIterator[dict[str, Any]]:
        for row in rows:
            yield row

    async def give() -> list[dict[str, Any]]:
        return rows

    def source() -> Any:
        match kind:
            case "json":
                write(tmp_path / "c.json", json.dumps(rows))
            case "jsonl":
                write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows)))
            case "sql":
                values = ", ".join(
                    f"('{x['code']}', '{x['name']}', {repr(x['part_of']).replace('None', 'NULL')})" for x in rows
                )
                query = f"SELECT * FROM (VALUES {values or '(1, 2, 3)'}) v (code, name, part_of) WHERE {bool(values)};"
                write(tmp_path / "c.sql", query)
            case "function":
                return give
            case "generator":
                return lambda: iter(rows)
            case "async generator":
                return generate
        return tmp_path / f"c.{kind}"

    async with opened(reference=table(source())) as fleet:
        await fleet.create("acme")
        query = "SELECT code, name, part_of FROM countries ORDER BY 1 DESC"
        assert await fleet.fetch("acme", query) == [("EU", "Europe", None), ("AT", "Austria", "EU")]
        assert [x.outstanding for x in await fleet.tenancy.seeds.status()] == [()]
        rows.clear()
        source()
        report = await fleet.tenancy.seeds.apply()
        assert [bool(x.applied) for x in report.outcomes] == [True]
        assert await fleet.fetch("acme", query) == []
        # the rows that a function gave count for the template, once this process has called it again
        await fleet.create("globex")
        assert await fleet.fetch("globex", query) == []


@pytest.mark.parametrize("protected", [False, True])
async def test_a_tenant_may_read_a_protected_table_only(opened: Opened, countries: Path, protected: bool) -> None:
    """In a new tenant and in one that was there before, also after a reconcile; and never the record."""
    async with opened() as fleet:
        await fleet.create("old")
    async with opened(reference=table(countries, protected=protected)) as fleet:
        await fleet.create("new")
        assert (await fleet.tenancy.seeds.apply()).ok
        assert (await fleet.provisioner.reconcile()).clean
        for slug in ("old", "new"):
            async with fleet.tenancy.session(slug) as session:
                rights = text(
                    "SELECT p, has_table_privilege('countries', p), "
                    "has_table_privilege('tenancy_orm.reference_data', p) "
                    "FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE']) p"
                )
                found = (await session.execute(rights)).all()
            writes = not protected
            assert [tuple(row) for row in found] == [
                ("SELECT", True, True),
                ("INSERT", writes, False),
                ("UPDATE", writes, False),
                ("DELETE", writes, False),
                ("TRUNCATE", False, False),
            ]
    async with opened(reference=table(countries, protected=not protected)) as fleet:
        assert (await fleet.tenancy.seeds.apply()).ok
        async with fleet.tenancy.session("old") as session:
            may = await session.scalar(text("SELECT has_table_privilege('countries', 'UPDATE')"))
        assert may is protected


async def test_reconcile_takes_the_right_to_write_a_protected_table(opened: Opened, countries: Path) -> None:
    """Whoever has given it, also for a column; and to the record, with which a tenant could hide what it lacks."""
    async with opened(reference=table(countries)) as fleet:
        await fleet.create("acme")
        owner, tenant = fleet.provisioner.names.owner, fleet.database("acme")
        await fleet.execute(
            "acme",
            f'SET ROLE "{owner}"; GRANT INSERT, UPDATE (name) ON countries TO "{tenant}"; '
            f'GRANT DELETE ON tenancy_orm.reference_data TO "{tenant}"; GRANT TRUNCATE ON roles TO "{tenant}"',
        )
        found = await fleet.provisioner.reconcile(check=True)
        assert [(one.kind, one.dangerous, one.mended) for one in found.differences] == [
            ("right.read_only", False, False)
        ]
        [mended] = (await fleet.provisioner.reconcile()).differences
        assert mended.mended
        assert "UPDATE on TABLE public.countries (name)" in mended.detail
        rights = "SELECT has_any_column_privilege('{0}', 'countries', 'INSERT, UPDATE'), "
        rights += "has_table_privilege('{0}', 'tenancy_orm.reference_data', 'DELETE')"
        assert await fleet.fetch("acme", rights.format(tenant)) == [(False, False)]
        assert (await fleet.provisioner.reconcile()).clean


@pytest.mark.parametrize(
    ("text_", "reason"),
    [
        ("code,name\nAT,Austria\nAT,Austria\n", "rows 1 and 2 have the same key"),
        ("code,name\n,Austria\n", "row 1 has no code, which is its key"),
        ("code,name\nAT\n", "line 2 has another number of cells"),
        ("name\nAustria\n", "row 1 has no code"),
        ('code,name\nAT,"Austria\n', "cannot be read: unexpected end of data"),
        ("code,name,name\nAT,Austria,Austria\n", "two columns are named 'name'"),
    ],
)
async def test_a_malformed_source_is_refused_before_any_tenant(
    opened: Opened, countries: Path, text_: str, reason: str
) -> None:
    """The message names the setting and the row."""
    write(countries, text_)
    async with opened(reference=table(countries)) as fleet:
        with pytest.raises(ConfigurationError, match=rf"reference.countries.*{reason}"):
            await fleet.tenancy.seeds.apply()


async def test_a_table_that_does_not_fit_fails_for_its_tenant(opened: Opened, countries: Path) -> None:
    """A drifted tenant is listed; a key without a unique constraint is named."""
    async with opened() as fleet:
        await fleet.create("acme", "globex", "initech")
        await fleet.execute("acme", "DROP TABLE countries CASCADE")
        await fleet.execute("globex", "ALTER TABLE countries DROP CONSTRAINT countries_pkey CASCADE")
    async with opened(reference=table(countries)) as fleet:
        report = await fleet.tenancy.seeds.apply()
        errors = [x.error or "" for x in report.outcomes]
        assert "reference data 'countries' failed: relation" in errors[0]
        assert errors[1].endswith('failed: table "public"."countries" has no unique constraint on its key (code)')
        assert len(await fleet.fetch("initech", CODES)) == 3


def test_settings_are_checked(configure: Configure, tmp_path: Path) -> None:
    """Where the configuration is made, or where it is loaded."""
    for given, reason in (
        ({"countries": {"table": "a.b.c", "key": ["x"], "source": "x.csv"}}, "countries.table: must be table, or"),
        ({"countries": {"table": "c", "key": [], "source": "x.csv"}}, "countries.key: must name one column"),
        ({"countries": {"table": "c", "key": ["x"]}}, "countries.source: is missing"),
        ({"countries": {"table": "c", "key": ["x"], "source": "x", "typo": 1}}, "countries.typo: there is no such"),
        ({"countries": 1}, "countries: must be a table"),
    ):
        with pytest.raises(ConfigurationError, match=f"reference.{reason}"):
            configure(reference=given)
    with pytest.raises(ConfigurationError, match="must be a list of functions"):
        configure([1])
    assert configure(reference={"c": ReferenceTable(table="c", key=("x",), source=tmp_path)}).reference["c"].protected
