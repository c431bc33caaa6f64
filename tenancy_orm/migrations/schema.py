"""The schema of a template: that of Alembic's head, or the tables of a ``MetaData``.

Both classes implement ``SchemaSource`` of ``provisioning``.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import alembic
import sqlalchemy
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, create_mock_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import URL
from sqlalchemy.schema import CreateIndex, CreateSchema, CreateTable

from ..config import MigrationConfig
from ..provisioning.templates.building import Connect
from .configuration import alembic_config, influences
from .database import ConnectionAdapter, DatabaseMigration, Target, close
from .inputs import Inputs, digest_of, files_below, stamps_below
from .limits import Limits
from .plan import Plan, format_revision
from .recording import normal, recorded
from .scripts import load, script_directory

_URL = URL.create("postgresql+asyncpg")

_dialect: Any = postgresql.dialect  # SQLAlchemy's dialects are untyped

# times and sizes of files
_Stamp: TypeAlias = tuple[Mapping[str, object], ...]

_IS_SYSTEM_SCHEMA = re.compile(r"pg_|information_schema$")
# by a listener of the application's, as was needed before: a second CREATE SCHEMA would fail there
_CREATED_SCHEMA = re.compile(r'(?i)\bCREATE\s+SCHEMA\s+"?((?:[^"\s;]|"")+)"?')


class AlembicSchema:
    """The schema of a migration directory's revisions.

    Args:
        directory: The directory with env.py.
        limits: Time limits of migrating one database.
        settings: The settings that name Alembic's file and section.
    """

    def __init__(
        self, directory: str | Path, *, limits: Limits | None = None, settings: MigrationConfig | None = None
    ) -> None:
        self._directory = Path(directory).absolute()
        self._settings = settings
        self._limits = limits or Limits()
        # the places of the scripts, the scripts and their digest, as they were when the files had this stamp
        self._known: tuple[_Stamp, list[Path], ScriptDirectory, str] | None = None
        self._settings_files: list[Path] = []
        self._inputs = Inputs(self._directory)
        self._recorded: Mapping[str, str] = {}

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
        """Return 64 hexadecimal digits that change with any file in the directory, and with Alembic's settings.

        Those are the heads, all files that are not hidden or caches, the settings of the ini file, and the versions of
        Alembic and SQLAlchemy.

        Raises:
            ConfigurationError: as ``head``.
        """
        return self._read()[1]

    def inputs(self) -> Mapping[str, str]:
        """Return the files outside the directory that the last ``apply`` used, by name, with their digests."""
        return self._recorded

    def changed_input(self, inputs: Mapping[str, str]) -> str | None:
        """Return the name of a file that is not as it was when ``inputs`` were recorded; None if all are."""
        return self._inputs.changed(inputs)

    async def apply(self, connect: Connect) -> str | None:
        """Migrate an empty database to head, and return its revision.

        Args:
            connect: Opens a connection to it as the owner of the schema.

        Raises:
            MigrationError: a revision failed.
            ConfigurationError: as ``head``.
        """
        with recorded() as recording:
            config = alembic_config(self._directory, self._settings)
            environment = await asyncio.to_thread(load, config)
            migration = DatabaseMigration(
                Plan.of(environment, "upgrade", "heads"),
                Target(label="template", url=_URL, connect=connect),
                adapter=ConnectionAdapter(),
                limits=self._limits,
            )
            await migration.run()
        # of these two the fingerprint has the settings
        recording.paths -= {
            normal(name) for name in (config.config_file_name, config.toml_file_name) if name is not None
        }
        self._recorded = await asyncio.to_thread(self._inputs.digests, recording)
        return format_revision(migration.after or ())

    def _read(self) -> tuple[ScriptDirectory, str]:
        if self._known is not None:
            stamp, places, script, digest = self._known
            if stamp == self._stamp(places, compiled=script.sourceless):
                return script, digest
        config = alembic_config(self._directory, self._settings)
        self._settings_files = [Path(x) for x in (config.config_file_name, config.toml_file_name) if x is not None]
        script = script_directory(config)
        places = self._places(script)
        stamp = self._stamp(places, compiled=script.sourceless)
        digest = self._digest(config, script, places)
        self._known = stamp, places, script, digest
        return script, digest

    def _places(self, script: ScriptDirectory) -> list[Path]:
        """The directory, and version locations elsewhere."""
        others = (Path(place).absolute() for place in script._version_locations)
        return [self._directory, *(place for place in others if not place.is_relative_to(self._directory))]

    def _stamp(self, places: list[Path], *, compiled: bool) -> _Stamp:
        settings = tuple(
            (path.stat().st_mtime_ns, path.stat().st_size) for path in self._settings_files if path.exists()
        )
        return (*(stamps_below(place, compiled=compiled) for place in places), {"settings": settings})

    def _digest(self, config: Config, script: ScriptDirectory, places: list[Path]) -> str:
        heads = ((head, b"head") for head in sorted(script.get_heads()))
        settings = ((option, b"option") for option in influences(config))
        versions = (("alembic", alembic.__version__.encode()), ("sqlalchemy", sqlalchemy.__version__.encode()))
        files = (
            (f"{number}/{name}", path.read_bytes())
            for number, place in enumerate(places)
            for name, path in files_below(place, compiled=script.sourceless)
        )
        return digest_of((*heads, *settings, *versions, *files))


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

    def inputs(self) -> Mapping[str, str]:
        """Return nothing: the fingerprint has all."""
        return {}

    def changed_input(self, inputs: Mapping[str, str]) -> str | None:
        """Return None: there are no inputs."""
        return None

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that change with the DDL of the tables, and with SQLAlchemy's version."""
        tables = self._metadata.tables.items()
        stamp = frozenset((name, len(t.columns), len(t.indexes), len(t.constraints)) for name, t in tables)
        if self._known is None or self._known[0] != stamp:
            self._known = stamp, self._digest()
        return self._known[1]

    def _digest(self) -> str:
        statements = [sqlalchemy.__version__, *self._schemas()]
        indexes: list[str] = []

        def compile_statement(statement: Any, *_: Any, **__: Any) -> None:
            found = indexes if isinstance(statement, CreateIndex) else statements
            found.append(str(statement.compile(dialect=_dialect())))

        self._metadata.create_all(create_mock_engine(_URL, compile_statement), checkfirst=False)
        # a table's indexes are a set, and its order is another one in each process
        return hashlib.sha256("\0".join([*statements, *sorted(indexes)]).encode()).hexdigest()

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
