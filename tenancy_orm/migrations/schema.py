"""The schema of a template: that of Alembic's head, or the tables of a ``MetaData``.

Both classes implement ``SchemaSource`` of ``provisioning``.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, create_mock_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import URL
from sqlalchemy.schema import CreateSchema, CreateTable

from ..provisioning.templates import Connect
from .database import ConnectionAdapter, DatabaseMigration, Limits, Target, close
from .plan import Plan, format_revision
from .scripts import alembic_config, load, script_directory

_URL = URL.create("postgresql+asyncpg")

_dialect: Any = postgresql.dialect  # SQLAlchemy's dialects are untyped

_IS_SYSTEM_SCHEMA = re.compile(r"pg_|information_schema$")
# by a listener of the application's, as was needed before: a second CREATE SCHEMA would fail there
_CREATED_SCHEMA = re.compile(r'(?i)\bCREATE\s+SCHEMA\s+"?((?:[^"\s;]|"")+)"?')


class AlembicSchema:
    """The schema of a migration directory's revisions.

    Args:
        directory: The directory with env.py.
        limits: Time limits of migrating one database.
    """

    def __init__(self, directory: str | Path, *, limits: Limits | None = None) -> None:
        self._directory = Path(directory).absolute()
        self._limits = limits or Limits()
        # the scripts and their digest, as they were when the files had these times and sizes
        self._known: tuple[frozenset[tuple[str, int, int]], ScriptDirectory, str] | None = None

    def __repr__(self) -> str:
        """Return the directory."""
        return f"AlembicSchema({str(self._directory)!r})"

    def head(self) -> str | None:
        """Return the revision of a database with every migration: the heads, sorted, with commas; None without any.

        Raises:
            ConfigurationError: there is no migration directory, or its scripts cannot be loaded.
        """
        script, _ = self._read()
        return format_revision(script.revision_map._real_heads)

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that change with the heads, any revision file, or env.py.

        Raises:
            ConfigurationError: as ``head``.
        """
        return self._read()[1]

    async def apply(self, connect: Connect) -> str | None:
        """Migrate an empty database to head, and return its revision.

        Args:
            connect: Opens a connection to it as the owner of the schema.

        Raises:
            MigrationError: a revision failed.
            ConfigurationError: as ``head``.
        """
        environment = await asyncio.to_thread(lambda: load(alembic_config(self._directory)))
        migration = DatabaseMigration(
            Plan.of(environment, "upgrade", "heads"),
            Target(label="template", url=_URL, connect=connect),
            adapter=ConnectionAdapter(),
            limits=self._limits,
        )
        await migration.run()
        return format_revision(migration.after or ())

    def _read(self) -> tuple[ScriptDirectory, str]:
        if self._known is not None:
            stamp, script, digest = self._known
            if stamp == self._stamp(script):
                return script, digest
        script = script_directory(alembic_config(self._directory))
        stamp = self._stamp(script)
        digest = self._digest(script)
        self._known = stamp, script, digest
        return script, digest

    def _files(self, script: ScriptDirectory) -> Iterator[Path]:
        yield Path(script.env_py_location)
        pattern = "**/*" if script.recursive_version_locations else "*"
        suffixes = (".py", ".pyc", ".pyo") if script.sourceless else (".py",)
        for location in script._version_locations:
            yield from (path for path in sorted(location.glob(pattern)) if path.suffix in suffixes)

    def _stamp(self, script: ScriptDirectory) -> frozenset[tuple[str, int, int]]:
        found = ((path, path.stat()) for path in self._files(script))
        return frozenset((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in found)

    def _digest(self, script: ScriptDirectory) -> str:
        digest = hashlib.sha256()
        inputs = [*(head.encode() for head in sorted(script.get_heads())), b"files"]
        inputs += [path.read_bytes() for path in self._files(script)]
        for data in inputs:
            digest.update(len(data).to_bytes(8, "big") + data)
        return digest.hexdigest()


class MetadataSchema:
    """The tables of a ``MetaData``, for an application without migrations; this schema has no revision.

    Args:
        metadata: The application's tables.
    """

    def __init__(self, metadata: MetaData) -> None:
        self._metadata = metadata
        # the digest for these tables: compiling 30 of them takes 20 ms, and every creation needs it
        self._known: tuple[frozenset[tuple[str, int, int, int]], str] | None = None

    def head(self) -> str | None:
        """Return None: there are no revisions."""
        return None

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that change with the DDL of the tables."""
        tables = self._metadata.tables.items()
        stamp = frozenset((name, len(t.columns), len(t.indexes), len(t.constraints)) for name, t in tables)
        if self._known is None or self._known[0] != stamp:
            self._known = stamp, self._digest()
        return self._known[1]

    def _digest(self) -> str:
        statements: list[str] = []

        def compile_statement(statement: Any, *_: Any, **__: Any) -> None:
            statements.append(str(statement.compile(dialect=_dialect())))

        self._metadata.create_all(create_mock_engine(_URL, compile_statement), checkfirst=False)
        return hashlib.sha256("\0".join(statements).encode()).hexdigest()

    def _create_all(self, connection: Connection) -> None:
        for name in self._schemas():
            connection.execute(CreateSchema(name, if_not_exists=True))
        self._metadata.create_all(connection)

    def _schemas(self) -> list[str]:
        """The schemas of tables, sequences, enums and domains, except those that the application creates itself."""
        found: set[str] = set()
        created = ""

        def collect(statement: Any, *_: Any, **__: Any) -> None:
            nonlocal created
            if schema := getattr(getattr(statement, "element", None), "schema", None):
                found.add(str(schema))
            if not isinstance(statement, CreateTable):
                created += f"{statement.compile(dialect=_dialect())};"

        self._metadata.create_all(create_mock_engine(_URL, collect), checkfirst=False)
        created_by_listener = {name.replace('""', '"') for name in _CREATED_SCHEMA.findall(created)}
        return sorted(name for name in found - created_by_listener if not _IS_SYSTEM_SCHEMA.match(name))

    async def apply(self, connect: Connect) -> str | None:
        """Create the schemas and tables in an empty database.

        Args:
            connect: Opens a connection to it as the owner of the schema.
        """
        connection = await connect()
        try:
            async with ConnectionAdapter().adapt(connection, _URL) as adapted:
                await adapted.run_sync(self._create_all)
                await adapted.commit()
        finally:
            await close(connection)
        return None


__all__ = ["AlembicSchema", "MetadataSchema"]
