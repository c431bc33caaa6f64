"""The pytest plugin, as suites of applications use it: in a pytest of their own, on this run's server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.postgres import Postgres
from tests.support.suites import APPLICATION, Suite


@pytest.fixture
async def suite(tmp_path: Path, postgres: Postgres) -> AsyncIterator[Suite]:
    """An empty suite; what its runs keep is dropped."""
    made = Suite(tmp_path, postgres)
    yield made
    await made.remove()


async def test_fixtures_work_in_every_event_loop_and_without_one(suite: Suite) -> None:
    """Loops of a test, of a module and of the run take turns, with anyio's and plain functions in between."""
    suite.settings["asyncio_mode"] = '"strict"'
    suite.write(
        test_shop="""
        import pytest
        from sqlalchemy import select
        from shop import Note

        @pytest.mark.asyncio
        async def test_in_a_loop_of_its_own(tenant_client, tenancy, tenant):
            assert (await tenant_client.post("/notes", json={"text": "a"})).json() == ["a"]
            async with tenancy.session(tenant.slug) as session:
                assert (await session.scalars(select(Note))).one().text == "a"

        @pytest.mark.asyncio(loop_scope="session")
        async def test_in_the_loop_of_the_run(tenant_session, tenant_client):
            tenant_session.add(Note(text="b"))
            await tenant_session.commit()
            assert (await tenant_client.get("/notes")).json() == ["b"]

        def test_without_a_loop(tenant_client, tenant_factory):
            assert tenant_client.post("/notes", json={"text": "c"}).json() == ["c"]
            assert tenant_factory().slug != tenant_factory().slug

        @pytest.mark.asyncio(loop_scope="module")
        async def test_in_the_loop_of_the_module(tenant_client, tenant, tenant_factory):
            assert (await tenant_client.get("/notes")).json() == []
            other = await tenant_factory("other", tier="pro")
            assert (other.slug, other.tenant.tier) == ("other", "pro")

        @pytest.mark.asyncio(loop_scope="session")
        async def test_in_the_loop_of_the_run_again(tenant_client):
            assert (await tenant_client.get("/notes")).json() == []

        @pytest.mark.anyio
        @pytest.mark.parametrize("anyio_backend", ["asyncio"])
        async def test_with_anyio(tenant_session, tenant_client):
            assert (await tenant_client.post("/notes", json={"text": "d"})).json() == ["d"]
            assert (await tenant_session.scalars(select(Note))).one().text == "d"

        def test_without_tenants():
            pass
        """
    )
    first = await suite.run()
    assert first.counts == {"passed": 7}, first.text


async def test_rollback_leaves_nothing_and_hides_nothing(suite: Suite) -> None:
    """The application commits and fails as ever, sessions may be open at once, and the next test finds nothing."""
    suite.settings["asyncio_default_test_loop_scope"] = '"module"'
    suite.write(
        test_shop="""
        import asyncio
        import pytest
        from sqlalchemy import func, select, text
        from sqlalchemy.exc import DBAPIError, IntegrityError
        from shop import Note
        from tenancy_orm.errors import CrossTenantError, NoTenantError
        from tenancy_orm.testing.errors import RollbackModeError

        async def count(session):
            return await session.scalar(select(func.count()).select_from(Note))

        seen = []

        @pytest.mark.parametrize("n", range(3))
        async def test_commits_are_seen_and_undone(tenant_session, tenant_client, tenant, n):
            assert await count(tenant_session) == 0
            assert (await tenant_client.post("/notes", json={"text": "a"})).json() == ["a"]
            tenant_session.add(Note(text="b"))
            await tenant_session.commit()
            assert (await tenant_client.get("/notes")).json() == ["a", "b"]
            seen.append(tenant.id)
            assert len(set(seen)) == 1  # one tenant for the worker

        async def test_an_error_undoes_its_own_transaction_alone(tenancy, tenant):
            async with tenancy.transaction(tenant.slug) as session:
                session.add(Note(id=1, text="kept"))
            with pytest.raises(IntegrityError):
                async with tenancy.transaction(tenant.slug) as session:
                    session.add(Note(id=1, text="twice"))
            async with tenancy.session(tenant.slug) as session:
                assert (await session.scalars(select(Note.text))).all() == ["kept"]
                session.add(Note(text="forgotten"))
                await session.flush()
            async with tenancy.session(tenant.slug) as session:
                assert await count(session) == 1
                with pytest.raises(IntegrityError):
                    async with session.begin_nested():
                        session.add(Note(id=1, text="again"))
                assert await count(session) == 1

        async def test_requests_at_once_are_served_one_statement_at_a_time(tenant_client, tenant_session):
            assert await count(tenant_session) == 0
            texts = [str(n) for n in range(8)]
            answers = await asyncio.gather(*(tenant_client.post("/notes", json={"text": t}) for t in texts))
            assert [answer.status_code for answer in answers] == [200] * 8
            assert sorted((await tenant_client.get("/notes")).json()) == texts

        async def test_what_one_transaction_cannot_do_is_refused(tenancy, tenant, tenant_session):
            with pytest.raises(DBAPIError) as caught:
                async with tenancy.session(tenant.slug) as session:
                    connection = await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
                    await connection.execute(text("VACUUM notes"))
            assert 'mode="clone"' in str(caught.value.orig.__cause__.__notes__)
            with pytest.raises(RollbackModeError, match="LISTEN"):
                await tenant_session.execute(text("LISTEN news"))
            raw = await (await tenant_session.connection()).get_raw_connection()
            with pytest.raises(RollbackModeError, match="LISTEN"):
                await raw.driver_connection.add_listener("news", print)
            def work():
                with tenancy.sync.session(tenant.slug) as session:
                    session.execute(text("SELECT 1"))
            with pytest.raises(RollbackModeError, match="tenancy.sync"):
                await asyncio.to_thread(work)
            with pytest.raises(RollbackModeError, match="isolation level"):
                async with tenancy.session(tenant.slug) as session:
                    await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
                    await count(session)

        async def test_a_rollback_that_would_undo_another_is_refused(tenancy, tenant):
            async with tenancy.session(tenant.slug) as first, tenancy.session(tenant.slug) as second:
                first.add(Note(text="1"))
                await first.flush()
                second.add(Note(text="2"))
                await second.flush()
                with pytest.raises(RollbackModeError, match="would lose its work"):
                    await first.rollback()
                await second.rollback()

        async def test_autocommit_and_its_errors_stay_in_the_test(tenancy, tenant):
            async with tenancy.session(tenant.slug) as session:
                connection = await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
                await connection.execute(text("INSERT INTO notes VALUES (1, 'a')"))
                with pytest.raises(IntegrityError):
                    await connection.execute(text("INSERT INTO notes VALUES (1, 'b')"))
                assert (await connection.execute(text("SELECT text FROM notes"))).scalars().all() == ["a"]

        async def test_reading_sees_what_the_test_wrote_and_writes_nothing(tenancy, tenant, tenant_session):
            tenant_session.add(Note(text="a"))
            await tenant_session.commit()
            insert = "INSERT INTO notes (text) VALUES ('b')"
            async with tenancy.session(tenant.slug, read_only=True) as session:
                assert await count(session) == 1
                with pytest.raises(DBAPIError, match="read-only"):
                    await session.execute(text(insert))
                await session.rollback()
                assert await count(session) == 1
            with pytest.raises(DBAPIError, match="read-only"):
                await tenancy.fetch_value(insert + " RETURNING 1", tenant=tenant.slug)
            assert await tenancy.execute(insert, tenant=tenant.slug) == 1
            assert await tenancy.fetch_value("SELECT count(*) FROM notes", tenant=tenant.slug) == 2
            assert await count(tenant_session) == 2

        async def test_another_tenant_stays_another(tenancy, tenant, tenant_client, tenant_factory):
            other = await tenant_factory()
            await tenant_client.post("/notes", json={"text": "secret"})
            theirs = await tenant_client.get("/notes", headers={"X-API-Key": other.api_key})
            assert theirs.json() == []
            with pytest.raises(NoTenantError):
                async with tenancy.session():
                    pass
            async with tenancy.scope(other.slug):
                with pytest.raises(CrossTenantError):
                    async with tenancy.session(tenant.slug):
                        pass
            async with tenancy.session(tenant.slug) as mine, tenancy.session(other.slug) as session:
                note = (await mine.scalars(select(Note))).one()
                mine.expunge(note)
                with pytest.raises(CrossTenantError):
                    session.add(note)

        async def test_guesses_are_slowed_down(tenant_client):
            answers = [await tenant_client.get("/notes", headers={"X-API-Key": f"ten_live_{n}"}) for n in range(30)]
            assert answers[-1].status_code == 429

        async def test_who_guessed_in_another_test_is_let_in(tenant_client):
            assert (await tenant_client.get("/notes")).status_code == 200

        async def test_a_tenant_that_was_changed_is_no_other_tests(tenancy, tenant, tenant_client):
            await tenancy.tenants.suspend(tenant.id)
            assert (await tenant_client.get("/notes")).status_code == 403

        async def test_the_next_one_is_as_new(tenant, tenant_client):
            assert (await tenant_client.get("/notes")).json() == []
        """
    )
    outcome = await suite.run()
    assert outcome.counts == {"passed": 14}, outcome.text


async def test_rollback_stays_whole_whatever_a_test_does(suite: Suite) -> None:
    """Statements that commit, tasks that are cancelled or outlive the test, connections that are lost."""
    suite.settings |= {"asyncio_default_test_loop_scope": '"session"', "filterwarnings": '["default"]'}
    suite.write(
        test_shop="""
        import asyncio
        import pytest
        from sqlalchemy import func, select, text
        from sqlalchemy.exc import DBAPIError
        from shop import Base, Note
        from tenancy_orm import Tenancy, TenancyConfig
        from tenancy_orm.postgres import login
        from tenancy_orm.postgres.dsn import Dsn
        from tenancy_orm.testing.errors import RollbackModeError

        async def count(session):
            return await session.scalar(select(func.count()).select_from(Note))

        async def raw(session):
            return (await (await session.connection()).get_raw_connection()).driver_connection

        async def commits(session):
            await session.execute(text("INSERT INTO notes (text) VALUES ('a')"))
            await session.execute(text("COMMIT"))

        async def begins_again(session):
            await (await raw(session)).execute("INSERT INTO notes (text) VALUES ('a'); COMMIT; BEGIN")

        async def loses_it(session):
            await (await raw(session)).execute("INSERT INTO notes (text) VALUES ('a'); COMMIT")
            (await raw(session)).terminate()

        @pytest.mark.parametrize("change", [commits, begins_again, loses_it, count])
        async def test_nothing_is_there(tenant_session, change):
            assert await count(tenant_session) == 0
            await change(tenant_session)

        async def test_a_task_may_be_cancelled_at_any_point(tenancy, tenant, tenant_session):
            tenant_session.add(Note(text="first"))
            await tenant_session.flush()

            async def work():
                async with tenancy.transaction(tenant.slug) as session:
                    session.add(Note(text="a"))

            for turns in range(60):
                task = asyncio.create_task(work())
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or task.exception() is None
                assert await count(tenant_session) >= 1
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1), tenancy.transaction(tenant.slug) as session:
                    session.add(Note(text="never"))
                    await session.flush()
                    await session.execute(text("SELECT pg_sleep(60)"))
            texts = set(await tenant_session.scalars(select(Note.text)))
            assert "first" in texts and "never" not in texts

        tasks = []

        async def test_tasks_outlive_this_one(tenancy, tenant):
            async def opens_later():
                await asyncio.sleep(0)
                await next_test.wait()
                async with tenancy.transaction(tenant.slug) as session:
                    session.add(Note(text="late"))

            async def goes_on():
                async with tenancy.transaction(tenant.slug) as session:
                    await count(session)
                    opened.set()
                    await next_test.wait()
                    session.add(Note(text="late"))

            next_test, opened = asyncio.Event(), asyncio.Event()
            tasks.extend([next_test, asyncio.create_task(opens_later()), asyncio.create_task(goes_on())])
            await opened.wait()

        async def test_they_do_not_reach_this_one(tenancy, tenant):
            next_test, *others = tasks
            next_test.set()
            for task in others:
                with pytest.raises(RollbackModeError):
                    await task
            async with tenancy.session(tenant.slug) as session:
                assert await count(session) == 0

        async def test_a_statement_still_runs(tenancy, tenant):
            async def sleeps():
                async with tenancy.session(tenant.slug) as session:
                    await session.execute(text("SELECT pg_sleep(60)"))

            tasks[:] = [asyncio.create_task(sleeps())]
            await asyncio.sleep(0.1)

        async def test_the_next_one_does_not_wait(tenant_session):
            assert await count(tenant_session) == 0
            await asyncio.wait(tasks)
            assert tasks[0].exception() is not None

        PRODUCTION = TenancyConfig(control_url="postgresql://app:secret@db.example.com/control", metadata=Base.metadata)

        async def test_another_tenancy_has_no_session_beside_it(tenancy, tenant):
            async with Tenancy(PRODUCTION) as other:
                with pytest.raises(RollbackModeError, match="not the application's"):
                    async with other.session(tenant.slug) as session:
                        await count(session)

                def work():
                    with other.sync.session(tenant.slug) as session:
                        session.execute(text("SELECT 1"))

                with pytest.raises(RollbackModeError, match="not the application's"):
                    await asyncio.to_thread(work)
                await other.tenants.create("stray")

        async def test_administrators_are_let_through(tenancy, tenant):
            assert await tenancy.tenants.count() == 1
            server = Dsn.parse(tenancy.config.servers["default"])
            connection = await login.connect(server, purpose="x", timeout=9, database=tenant.tenant.placement.database)
            await connection.execute("INSERT INTO notes (text) VALUES ('a')")
            await connection.close()

        async def test_what_they_write_is_no_other_tests(tenant_session):
            assert await count(tenant_session) == 0

        async def test_a_tenant_may_be_purged(tenancy, tenant):
            await tenancy.tenants.delete(tenant.id)
            await tenancy.tenants.purge(tenant.id)

        async def test_a_failure_that_takes_another_session_with_it_is_an_error(tenancy, tenant):
            async with tenancy.session(tenant.slug) as first, tenancy.session(tenant.slug) as second:
                await count(first)
                await count(second)
                with pytest.raises(DBAPIError, match="division by zero"):
                    await first.execute(text("SELECT 1 / 0"))
                with pytest.raises(RollbackModeError, match="would lose"):
                    await first.rollback()
        """
    )
    outcome = await suite.run()
    assert outcome.counts["passed"] == 14, outcome.text
    assert "the test has left tenants stray" in outcome.text
    assert not {"failed", "error"} & {*outcome.counts}, outcome.text
    assert outcome.text.count("what it has committed by a statement, COMMIT or ROLLBACK: call the methods") == 2
    assert "a statement that still runs: await or cancel the tasks" in outcome.text


async def test_clone_gives_each_test_a_database_and_both_modes_mix(suite: Suite) -> None:
    """Two connections, LISTEN and DDL work as in production; what one test has done no other finds."""
    suite.write(
        test_shop="""
        import asyncio
        import pytest
        from sqlalchemy import text
        from shop import Note

        clone = pytest.mark.tenancy(mode="clone")

        @clone
        @pytest.mark.parametrize("n", range(5))
        async def test_alone(tenant_client, tenancy, tenant, n):
            assert (await tenant_client.post("/notes", json={"text": "a"})).json() == ["a"]
            async with tenancy.session(tenant.slug) as session:
                assert await session.scalar(text("SELECT last_value FROM notes_id_seq")) == 1

        @clone
        async def test_two_connections(tenancy, tenant):
            async with tenancy.session(tenant.slug) as session, tenancy.session(tenant.slug) as other:
                pids = {await one.scalar(text("SELECT pg_backend_pid()")) for one in (session, other)}
                assert len(pids) == 2
                received = asyncio.Queue()
                raw = await (await session.connection()).get_raw_connection()
                await raw.driver_connection.add_listener("news", lambda *given: received.put_nowait(given[-1]))
                await session.commit()
                await other.execute(text("NOTIFY news, 'x'"))
                await other.commit()
                assert await received.get() == "x"
                await session.invalidate()

        def test_rolled_back(tenant_client):
            assert tenant_client.post("/notes", json={"text": "a"}).json() == ["a"]

        @clone
        def test_cloned_without_a_loop(tenant_client, tenant_factory):
            assert tenant_client.post("/notes", json={"text": "a"}).json() == ["a"]
            other = tenant_factory()
            assert tenant_client.get("/notes", headers={"X-API-Key": other.api_key}).json() == []

        def test_a_session_without_a_loop(tenant_client, tenant_session):
            tenant_session.add(Note(text="a"))
            tenant_session.commit()
            assert tenant_client.get("/notes").json() == ["a"]

        def test_rolled_back_again(tenant_client):
            assert tenant_client.get("/notes").json() == []

        @pytest.mark.tenancy(mode="copy")
        def test_no_such_mode(tenant):
            pass

        @pytest.mark.tenancy(mod="clone")
        def test_misspelt_mode(tenant):
            pass
        """
    )
    outcome = await suite.run()
    assert outcome.counts == {"passed": 10, "error": 2}, outcome.text
    for name in ("test_no_such_mode", "test_misspelt_mode"):
        assert f'{name}: write @pytest.mark.tenancy(mode="rollback") or mode="clone"' in outcome.text


async def test_what_a_test_leaves_is_reported_and_removed(suite: Suite) -> None:
    """Tenants, sessions and transactions, each with the remedy; the next test is not concerned."""
    suite.settings["filterwarnings"] = '["default"]'
    suite.write(
        test_shop="""
        import gc
        import pytest
        from shop import Note

        kept = []

        async def test_leaves_much(tenancy, tenant):
            await tenancy.tenants.create("stray")
            context = tenancy.session(tenant.slug)
            session = await context.__aenter__()
            session.add(Note(text="x"))
            await session.flush()
            kept.append((context, session))

        async def test_leaves_it_to_the_garbage_collector(tenancy, tenant):
            session = await tenancy.session(tenant.slug).__aenter__()
            session.add(Note(text="x"))
            await session.flush()

        async def test_next(tenancy, tenant_client):
            gc.collect()
            assert (await tenant_client.get("/notes")).json() == []
            assert [one.slug for one in (await tenancy.tenants.list(slug="str*")).items] == []
        """
    )
    outcome = await suite.run()
    assert outcome.counts["passed"] == 3, outcome.text
    assert "garbage collector" not in outcome.text
    assert "the test has left tenants stray: create them by the fixture tenant_factory" in outcome.text
    assert "the test has left open sessions of a tenant: leave the block" in outcome.text
    assert "the test has left 1 open transaction of tenant" in outcome.text


async def test_what_stays_bound_concerns_no_other_test(suite: Suite) -> None:
    """It is reported and unbound after a plain function too, and the end of the run removes the tenants."""
    suite.settings |= {"filterwarnings": '["default"]', "asyncio_default_test_loop_scope": '"session"'}
    suite.write(
        test_shop="""
        import shop
        from tenancy_orm import current_tenant_or_none

        kept = []

        def keep(tenant):
            kept.append(shop.tenancy.sync.scope(tenant.slug))
            kept[-1].__enter__()

        def test_keeps(tenancy, tenant):
            keep(tenant)

        def test_next(tenant_client):
            assert current_tenant_or_none() is None
            assert tenant_client.get("/notes").json() == []

        async def test_next_coroutine(tenant_client, tenant):
            assert (await tenant_client.get("/notes")).json() == []
            kept.append(tenant.tenant)

        def test_keeps_without_fixtures():
            from tenancy_orm.context import set_current
            set_current(kept[-1])

        async def test_a_coroutine_after_it(tenant_client):
            assert current_tenant_or_none() is None
            assert (await tenant_client.get("/notes")).json() == []

        def test_keeps_it_to_the_end():
            assert current_tenant_or_none() is not None
        """
    )
    outcome = await suite.run()
    assert outcome.counts["passed"] == 6 and "error" not in outcome.counts, outcome.text
    assert "bound: bind it by `async with tenancy.scope(...)`, or in a plain function by `with tenancy" in outcome.text
    assert "Traceback" not in outcome.text and "could not be removed" not in outcome.text

    suite.write(
        conftest="""
        from tenancy_orm.testing._lending import Lending

        async def remove_all(*_):
            raise OSError("the server has stopped")

        Lending.remove_all = remove_all
        """,
        test_shop="def test_passes(tenant): pass",
    )
    lost = await suite.run()
    assert lost.status == 0 and "Traceback" not in lost.text, lost.text
    assert "could not be removed, and the next run removes it: OSError: the server has stopped" in lost.text


async def test_no_test_reaches_production(suite: Suite, postgres: Postgres) -> None:
    """Neither by the variables, nor by an explicit URL, nor by a Tenancy made aside; other servers are refused."""
    production = postgres.url("production")
    suite.write(
        shop="""
        import asyncio, os
        from sqlalchemy import MetaData
        from tenancy_orm import Tenancy, TenancyConfig

        class Provider:
            async def get(self, name): raise AssertionError("the secrets of production were read")
            async def close(self): pass

        at_import = dict(os.environ)
        tenancy = Tenancy(TenancyConfig.from_env(metadata=MetaData()))
        explicit = TenancyConfig(control_url=PRODUCTION, metadata=MetaData(), secrets={"provider": Provider()})

        async def started_by_the_application():
            async with Tenancy(explicit) as another:
                assert "production" not in another.config.control_url
        asyncio.run(started_by_the_application())
        """.replace("PRODUCTION", repr(production)),
        conftest="import shop",
        test_shop="""
        import asyncio
        import pytest
        import shop
        from tenancy_orm.control.database import ControlDatabase
        from tenancy_orm.errors import ConfigurationError, ControlUnavailableError

        def test_the_variables_lead_nowhere():
            assert "production" not in str(shop.at_import)
            assert "TENANCY_SECRETS_PROVIDER" not in shop.at_import

        async def test_a_tenancy_is_redirected(tenancy, tenant):
            assert "production" not in tenancy.config.control_url

        async def test_another_server_is_refused(tenancy):
            control = ControlDatabase("postgresql://app:secret@db.example.com/control")
            with pytest.raises(ConfigurationError, match="no other server"):
                async with control.connect():
                    pass
        """,
    )
    suite.settings["tenancy_app"] = '"shop:tenancy"'
    suite.write_configuration()
    outcome = await suite.run(
        TENANCY_CONTROL_URL=production,
        TENANCY_SERVERS=f"eu={production}",
        TENANCY_DEFAULT_SERVER="eu",
        TENANCY_SECRETS_PROVIDER="shop:provider",
    )
    assert outcome.counts == {"passed": 3}, outcome.text


async def test_workers_and_killed_runs_keep_out_of_each_others_way(suite: Suite, postgres: Postgres) -> None:
    """Each worker has an installation of its own; what a killed one has left is removed by the next."""
    suite.write(
        test_shop="""
        import os, signal
        import pytest

        @pytest.mark.parametrize("n", range(6))
        async def test_alone(tenancy, tenant, n):
            assert [one.slug for one in (await tenancy.tenants.list()).items] == [tenant.slug]
            if os.environ.get("KILLED"):
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    killed = await suite.run(KILLED="1")
    assert killed.status == -9
    workers = await suite.run("-n", "2")
    assert workers.counts == {"passed": 6}, workers.text
    async with postgres.connect() as connection:
        names = [name for (name,) in await connection.fetch("SELECT datname FROM pg_database ORDER BY 1")]
    assert {f"{suite.prefix(0)}_control", f"{suite.prefix(1)}_control"} <= set(names)
    assert [name for name in names if name.startswith((suite.prefix(0), suite.prefix(1))) and "_t_" in name] == []


async def test_an_installation_is_initialised_once_and_its_tiers_are_those_that_are_configured(
    suite: Suite, postgres: Postgres
) -> None:
    """Another version of the package initialises it again; what a test of a former run has applied does not stay."""
    suite.write(
        test_shop="""
        from tenancy_orm import Tier

        async def test_tiers(tenancy, tenant):
            assert set(await tenancy.tiers.in_force()) == set(tenancy.config.tiers)
            await tenancy.tiers.apply({**tenancy.config.tiers, "strange": Tier("strange")})
        """
    )
    database = f"{suite.prefix()}_control"
    granted = (
        "SELECT count(*) FROM information_schema.column_privileges "
        "WHERE table_schema = 'tenancy' AND grantee LIKE '%\\_viewer'"
    )
    outcome = await suite.run()
    assert outcome.counts == {"passed": 1}, outcome.text
    async with postgres.connect(database) as connection:
        before = await connection.fetchval(granted)
        (viewer,) = await connection.fetchrow("SELECT viewer FROM tenancy.installation")
        for comment, expected in (("tenancy-orm 0.0", before), (None, 0)):
            await connection.execute(f'REVOKE ALL ON ALL TABLES IN SCHEMA tenancy FROM "{viewer}"')
            if comment is not None:
                await connection.execute(f"COMMENT ON DATABASE \"{database}\" IS '{comment}'")
            outcome = await suite.run()
            assert outcome.counts == {"passed": 1}, outcome.text
            assert await connection.fetchval(granted) == expected
    assert before > 0


async def test_what_hinders_all_tests_is_said_in_short(suite: Suite) -> None:
    """At the start where a setting is malformed, else with each test; with the setting, and without frames."""
    suite.settings["asyncio_default_test_loop_scope"] = '"session"'
    suite.write(
        broken="import os\nos.nothing\n",
        bare=APPLICATION.replace(", metadata=Base.metadata", ""),
        test_shop="""
        import pytest

        def test_plain(tenant):
            pass

        async def test_coroutine(tenant):
            pass

        def test_without():
            pass
        """,
    )
    for setting, said in {
        "tenancy_app=shop": "tenancy_app = 'shop' is not of the form \"module:attribute\"",
        "tenancy_object=:tenancy": "tenancy_object = ':tenancy' is not of the form",
        "tenancy_mode=clne": 'tenancy_mode = \'clne\' is not a mode: write "rollback" or "clone"',
    }.items():
        outcome = await suite.run("-o", setting)
        assert outcome.status == 4 and outcome.text.strip().startswith(f"ERROR: {said}"), outcome.text
    outcome = await suite.run(TENANCY_TEST_DSN="db:secret@nowhere")
    assert outcome.status == 4 and "ERROR: TENANCY_TEST_DSN, or tenancy_test_dsn" in outcome.text
    assert "secret" not in outcome.text and "Traceback" not in outcome.text

    for setting, said in {
        "tenancy_app=shopp:app": "No module named 'shopp'; set pythonpath = [\".\"]",
        "tenancy_app=broken:app": "broken.py, line 2)",
        "tenancy_object=shop:app": "tenancy_object = 'shop:app' is a Starlette, not a Tenancy",
    }.items():
        outcome = await suite.run("-o", setting)
        assert outcome.counts == {"passed": 1, "error": 2}, outcome.text
        assert outcome.text.count(f"{setting.partition('=')[0]} = ") == 4, outcome.text  # and in the summary
        assert said in outcome.text and len(outcome.text.splitlines()) < 20, outcome.text
    outcome = await suite.run(TENANCY_TEST_DSN="postgresql://u:secret@127.0.0.1:1/none")
    assert outcome.counts == {"passed": 1, "error": 2} and len(outcome.text.splitlines()) < 20, outcome.text
    assert "the server of the tests at 127.0.0.1:1/none does not answer" in outcome.text
    assert "; TENANCY_TEST_DSN, or tenancy_test_dsn" in outcome.text and "secret" not in outcome.text
    bare = await suite.run("-o", "tenancy_app=bare:app")
    assert bare.counts == {"passed": 1, "error": 2} and len(bare.text.splitlines()) < 20, bare.text
    assert "neither migrations nor metadata is set" in bare.text and "TENANCY_METADATA" in bare.text
    frames = await suite.run("--full-trace", "-o", "tenancy_app=shopp:app")
    assert "importlib" in frames.text


async def test_only_the_client_needs_httpx(suite: Suite) -> None:
    """A session imports none; without it, the client says how to install it."""
    suite.write(
        conftest="import sys; sys.modules['httpx'] = None",
        test_shop="""
        async def test_session(tenant_session):
            pass

        async def test_client(tenant_client):
            pass
        """,
    )
    outcome = await suite.run()
    assert outcome.counts == {"passed": 1, "error": 1}, outcome.text
    assert "tenant_client: httpx is not installed; run: pip install 'tenancy-orm[testing]'" in outcome.text


async def test_nothing_changes_where_it_is_not_asked_for(suite: Suite) -> None:
    """Without tenancy_app there is no fixture, no marker and no change; with it, the project's own fixtures win."""
    suite.settings = {}
    suite.write(
        conftest="""
        import os, sys
        assert os.environ["TENANCY_CONTROL_URL"] == "postgresql://u@h/production"
        assert not {"sqlalchemy", "asyncpg", "starlette", "tenancy_orm.tenancy"} & set(sys.modules)
        """,
        test_shop="""
        def test_tenant(tenant):
            pass
        """,
    )
    outcome = await suite.run(TENANCY_CONTROL_URL="postgresql://u@h/production")
    assert "fixture 'tenant' not found" in outcome.text
    suite.settings = {"tenancy_app": '"shop:app"'}
    suite.write(
        conftest="""
        import pytest

        @pytest.fixture
        def tenant():
            return "mine"
        """,
        test_shop="""
        def test_tenant(tenant):
            assert tenant == "mine"
        """,
    )
    outcome = await suite.run(TENANCY_TEST_DSN="postgresql://nobody@127.0.0.1:1/none")
    assert outcome.counts == {"passed": 1}, outcome.text
