"""``alembic.op`` and ``alembic.context`` are local to the context that runs a migration."""

from __future__ import annotations

import asyncio
import importlib
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context
from pathlib import Path
from typing import Any

import alembic.context
import alembic.op
import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.op import create_table
from alembic.operations import MigrateOperation, Operations
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from tenancy_orm.migrations import local
from tests.support.alembic_proxies import uninstall


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    local.install()
    yield
    local.install()


def printing() -> tuple[MigrationContext, io.StringIO]:
    """A migration context that writes SQL to a buffer."""
    buffer = io.StringIO()
    options = {"as_sql": True, "output_buffer": buffer}
    return MigrationContext.configure(dialect_name="postgresql", opts=options), buffer


@contextmanager
def operations() -> Iterator[io.StringIO]:
    context, buffer = printing()
    with Operations.context(context):
        yield buffer


@pytest.fixture
def environment(tmp_path: Path) -> EnvironmentContext:
    return make_environment(tmp_path)


def make_environment(directory: Path, **options: Any) -> EnvironmentContext:
    (directory / "versions").mkdir(exist_ok=True)
    return EnvironmentContext(Config(), ScriptDirectory(directory), **options)


def test_a_call_outside_a_migration_says_what_is_missing() -> None:
    with pytest.raises(NameError, match="can't invoke function 'execute': no Alembic Operations is active"):
        alembic.op.execute("SELECT 1")
    with pytest.raises(NameError, match="no Alembic EnvironmentContext is active in this context"):
        alembic.context.get_context()


def test_an_attribute_outside_a_migration_says_what_is_missing() -> None:
    with pytest.raises(AttributeError, match=r"'alembic.context' has no attribute 'config' here"):
        _ = alembic.context.config
    with pytest.raises(AttributeError, match=r"'alembic.context' has no attribute 'nothing'$"):
        getattr(alembic.context, "nothing")  # noqa: B009 - mypy knows that it is not there
    assert not hasattr(alembic.context, "script")


def test_functions_imported_by_name_follow_the_context() -> None:
    for name in ("first", "second"):
        with operations() as buffer:
            create_table(name, sa.Column("id", sa.Integer))
        assert f"CREATE TABLE {name}" in buffer.getvalue()


def test_tasks_side_by_side_have_one_each() -> None:
    async def migrate(name: str, everyone: asyncio.Barrier) -> str:
        with operations() as buffer:
            await everyone.wait()
            alembic.op.create_table(name, sa.Column("id", sa.Integer))
            await everyone.wait()
            alembic.op.drop_table(name)
        return buffer.getvalue()

    async def main() -> list[str]:
        everyone = asyncio.Barrier(16)
        return await asyncio.gather(*(migrate(f"t{i}", everyone) for i in range(16)))

    for number, sql in enumerate(asyncio.run(main())):
        assert sql.split() == f"CREATE TABLE t{number} ( id INTEGER ); DROP TABLE t{number};".split()


def test_threads_side_by_side_have_one_each() -> None:
    everyone = threading.Barrier(16, timeout=30)

    def migrate(name: str) -> str:
        with operations() as buffer:
            everyone.wait()
            alembic.op.drop_table(name)
            everyone.wait()
        return buffer.getvalue()

    with ThreadPoolExecutor(16) as executor:
        results = list(executor.map(migrate, [f"t{i}" for i in range(16)]))
    assert results == [f"DROP TABLE t{i};\n\n" for i in range(16)]


def test_without_it_tasks_reach_each_others_database() -> None:
    """Without the patch, concurrent tasks reach each other's database."""
    uninstall()

    async def migrate(name: str, everyone: asyncio.Barrier) -> str:
        with operations() as buffer:
            await everyone.wait()
            alembic.op.drop_table(name)
            await everyone.wait()
        return buffer.getvalue()

    async def main() -> list[str]:
        everyone = asyncio.Barrier(4)
        return await asyncio.gather(*(migrate(f"t{i}", everyone) for i in range(4)))

    results = asyncio.run(main())
    assert sorted(result.count("DROP TABLE") for result in results) == [0, 0, 0, 4]


def test_environments_nest(tmp_path: Path) -> None:
    """Environments nest: ``alembic upgrade`` builds a template and upgrades the control database while it runs."""
    outer, inner = make_environment(tmp_path), make_environment(tmp_path)
    with outer:
        with inner:
            assert alembic.context.config is inner.config
        assert alembic.context.config is outer.config
        assert alembic.context.script is outer.script
    assert not hasattr(alembic.context, "config")


def test_environments_may_end_in_another_order(tmp_path: Path) -> None:
    first, second = make_environment(tmp_path), make_environment(tmp_path)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert alembic.context.config is second.config
    second.__exit__()
    assert not hasattr(alembic.context, "config")


def test_a_migration_that_fails_leaves_nothing_installed() -> None:
    with pytest.raises(ZeroDivisionError), operations():
        raise ZeroDivisionError
    with pytest.raises(NameError):
        alembic.op.execute("SELECT 1")


def test_a_thread_means_the_only_migration_of_the_process(environment: EnvironmentContext) -> None:
    """A thread without a context gets the only active migration, as code written for plain Alembic expects."""
    seen: list[Any] = []
    with environment:
        thread = threading.Thread(target=lambda: seen.append(alembic.context.config))
        thread.start()
        thread.join()
    assert seen == [environment.config]


def test_a_thread_cannot_mean_one_of_several_migrations(tmp_path: Path) -> None:
    first, second = make_environment(tmp_path), make_environment(tmp_path)
    with first, second, pytest.raises(AttributeError, match="no Alembic EnvironmentContext"):
        Context().run(lambda: alembic.context.config)


def test_a_thread_never_means_an_isolated_migration(environment: EnvironmentContext) -> None:
    with local.isolated(), environment:
        assert alembic.context.config is environment.config
        with pytest.raises(AttributeError, match="no Alembic EnvironmentContext"):
            Context().run(lambda: alembic.context.config)


def test_an_isolated_context_does_not_see_the_others(environment: EnvironmentContext) -> None:
    def look() -> bool:
        with local.isolated():
            return hasattr(alembic.context, "config")

    with environment:
        assert not Context().run(look)


def test_an_environment_active_before_installing_stays_active(environment: EnvironmentContext) -> None:
    """An environment that ``alembic upgrade`` entered before env.py imports this package stays active."""
    uninstall()
    with environment:
        local.install()
        assert alembic.context.config is environment.config
        assert alembic.context.get_x_argument() == []
    assert not hasattr(alembic.context, "config")


def test_an_environment_active_before_installing_inside_a_task_stays_active(environment: EnvironmentContext) -> None:
    async def importing() -> None:
        local.install()
        assert alembic.context.config is environment.config

    uninstall()
    with environment:
        asyncio.run(importing())
        assert alembic.context.config is environment.config


def test_installing_twice_changes_nothing() -> None:
    before = vars(alembic.op)["_proxy"]
    local.install()
    assert vars(alembic.op)["_proxy"] is before


def test_uninstalling_gives_alembic_its_own_back(environment: EnvironmentContext) -> None:
    uninstall()
    assert not local.is_installed()
    with environment:
        assert vars(alembic.context)["config"] is environment.config
    with operations() as buffer:
        alembic.op.drop_table("t")
    assert buffer.getvalue() == "DROP TABLE t;\n\n"


def test_operations_registered_later_work() -> None:
    @Operations.register_operation("say_hello")
    class SayHello(MigrateOperation):
        @classmethod
        def say_hello(cls, operations: Operations, name: str) -> None:
            operations.execute(f"SELECT 'hello {name}'")

    say_hello: Any = vars(alembic.op)["say_hello"]
    with operations() as buffer:
        say_hello("world")
    assert buffer.getvalue() == "SELECT 'hello world';\n\n"


def test_the_proxy_can_be_assigned_as_tests_of_migrations_do() -> None:
    module: Any = alembic.op
    context, buffer = printing()
    assert module._proxy is None
    module._proxy = Operations(context)
    try:
        alembic.op.drop_table("t")
        assert module._proxy.migration_context is context
    finally:
        del module._proxy
    assert buffer.getvalue() == "DROP TABLE t;\n\n"
    assert module._proxy is None


def test_batches_go_to_their_own_context() -> None:
    with operations() as buffer, alembic.op.batch_alter_table("t") as batch:
        batch.add_column(sa.Column("a", sa.Integer))
    assert "ALTER TABLE t ADD COLUMN a INTEGER" in buffer.getvalue()


def test_modules_are_still_what_is_imported() -> None:
    assert importlib.import_module("alembic.op") is alembic.op
    assert importlib.import_module("alembic.context") is alembic.context
