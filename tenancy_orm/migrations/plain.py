"""Reads the options of an env.py that was written for plain Alembic, without letting it connect to a database.

Such an env.py makes an engine, connects, passes the connection to ``context.configure`` and calls
``context.run_migrations``. A fleet needs only what else it passes to ``configure``: the connections to the tenants'
databases are made elsewhere. So while it is read, each engine gives it a ``StandIn``: a connection that leads nowhere
and refuses statements. It is also in ``config.attributes["connection"]``, where Alembic's cookbook looks for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NoReturn

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, event
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from ..errors import ConfigurationError
from .substitution import Substitution

REMEDY = (
    "let it call environment.run(context, target_metadata=target_metadata) of tenancy_orm in place of the code that "
    "connects; tenancy init prints the lines to change"
)

_URL = make_url("postgresql+asyncpg://")
_SHOWN = 60  # characters of a statement in an error

_given: ContextVar[StandIn | None] = ContextVar("tenancy_orm.migrations.plain", default=None)


class _NoDriverConnection:
    """A driver's connection that can be begun, committed and closed, and nothing else."""

    def commit(self) -> None:
        pass

    rollback = close = terminate = commit


class StandIn(Connection):
    """A connection that leads nowhere. ``connect`` returns itself: some env.py files expect an engine in its place."""

    def __init__(self) -> None:
        dialect: Any = PGDialect_asyncpg(dbapi=PGDialect_asyncpg.import_dbapi())  # type: ignore[no-untyped-call]
        engine = Engine(NullPool(_NoDriverConnection, dialect=dialect), dialect, _URL)  # type: ignore[arg-type]
        event.listen(engine, "before_execute", _refuse_statement)
        super().__init__(engine)

    def connect(self) -> AbstractContextManager[StandIn]:
        """Return the connection itself, as an engine would return one."""
        return nullcontext(self)

    def close(self) -> None:
        """End the transaction, and stay open: an env.py may connect more than once."""
        self.rollback()

    def end(self) -> None:
        """Close the connection."""
        super().close()

    def exec_driver_sql(self, statement: str, *_: Any, **__: Any) -> NoReturn:
        """Refuse the statement."""
        _refuse_statement(self, statement)

    def execution_options(self, **options: Any) -> Any:
        """Refuse options that the fleet's connections will not have."""
        _refuse_options(options)
        return self


class PlainEnvironment(EnvironmentContext):
    """Collects what an env.py passes to ``configure``, and migrates nothing."""

    def __init__(self, config: Config, script: ScriptDirectory, **options: Any) -> None:
        super().__init__(config, script, **options)
        self.given: dict[str, Any] = {}
        self.runs = 0

    def configure(  # type: ignore[override]  # the names of the other options do not matter here
        self, connection: Any = None, url: Any = None, dialect_name: Any = None, **options: Any
    ) -> None:
        """Collect the options, all but those that choose the database."""
        stand_in = _given.get()
        if stand_in is None:
            raise ConfigurationError(f"it calls context.configure, and not environment.run; {REMEDY}")
        self.given.update(options)
        super().configure(connection=stand_in, **options)

    def begin_transaction(self) -> AbstractContextManager[Any]:
        """Begin nothing."""
        return nullcontext()

    def run_migrations(self, **arguments: Any) -> None:
        """Count the call."""
        if arguments:
            raise ConfigurationError(
                f"it passes {', '.join(sorted(arguments))} to context.run_migrations; a revision of tenants' schemas "
                "has no arguments"
            )
        self.runs += 1

    def execute(self, sql: Any, execution_options: Any = None) -> NoReturn:
        """Refuse the statement."""
        _refuse_statement(None, sql)

    def options(self) -> Mapping[str, Any]:
        """Return what was collected.

        Raises:
            ConfigurationError: the env.py runs the migrations not at all, or several times.
        """
        if self.runs == 1:
            return self.given
        if self.runs:
            raise ConfigurationError(
                f"it runs the migrations {self.runs} times, for several databases or schemas; tenancy_orm migrates one "
                f"schema in each tenant's database. {REMEDY}"
            )
        raise ConfigurationError(f"it calls neither context.run_migrations nor environment.run; {REMEDY}")


@contextmanager
def without_connections(config: Config) -> Iterator[None]:
    """Give the env.py that the body runs a stand-in, whichever way it connects.

    An engine that the env.py makes of ``sqlalchemy.url`` exists, whatever the ini file says: Alembic's templates have
    ``driver://user:pass@localhost/dbname``.
    """
    stand_in = StandIn()
    before = dict(config.attributes)
    token = _given.set(stand_in)
    config.attributes["connection"] = stand_in
    config.set_main_option("sqlalchemy.url", _URL.render_as_string())
    try:
        with _connect.active(), _raw_connection.active():
            yield
    finally:
        _given.reset(token)
        stand_in.end()
        config.attributes.clear()
        config.attributes.update(before)


def _give(engine: Engine) -> StandIn | None:
    _refuse_options(engine.get_execution_options())
    return _given.get()


def _refuse_raw(engine: Engine) -> NoReturn:
    raise ConfigurationError(f"it uses a driver's connection of its own, which is not a tenant's; {REMEDY}")


def _refuse_options(options: Mapping[str, Any]) -> None:
    if options.get("schema_translate_map"):
        raise ConfigurationError(
            "it translates names of schemas, and tenants have databases instead; leave out schema_translate_map"
        )


def _refuse_statement(connection: Any, statement: Any, *_: Any) -> NoReturn:
    text = " ".join(str(statement).split())
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    raise ConfigurationError(
        f"it executes {shown!r} on its connection, which is not a tenant's; move that into a revision, or {REMEDY}"
    )


_connect = Substitution(Engine, "connect", _give)
_raw_connection = Substitution(Engine, "raw_connection", _refuse_raw)

__all__ = ["REMEDY", "PlainEnvironment", "StandIn", "without_connections"]
