"""Bringing an archive of ``pg_dump`` into a new database, as the login that was made for this alone."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...cancellation import run_to_completion
from ...config import TenancyConfig
from ...errors import OperationError
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.programs import Programs, able_to_read, find_programs, run_program
from ..logins.copy_logins import UNBOUNDED, CopyLogin
from . import archives
from .empty_databases import InstalledExtension

_EXTENSION = re.compile(
    r'^CREATE EXTENSION (?:IF NOT EXISTS )?(?P<name>"(?:[^"]|"")+"|[^\s";]+)'
    r'(?: WITH)?(?: SCHEMA (?P<schema>"(?:[^"]|"")+"|[^\s";]+))?;$',
    re.MULTILINE,
)
_COUNTS = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name,
       c.relrowsecurity AND c.relforcerowsecurity AS forced
  FROM pg_catalog.pg_class c
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'm') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                      AND d.objid = c.oid AND d.deptype = 'e')
 ORDER BY 1
"""
_COUNTED_AT_ONCE = 200  # tables that are counted in one statement


class Filled(Protocol):
    """A database that is filled: ``NewDatabase``, or a scratch database."""

    @property
    def login(self) -> CopyLogin:
        """The login that owns what comes into it."""


class Restorable(Filled, Protocol):
    """One that an archive is brought into."""

    @property
    def server_version(self) -> int:
        """The major version of its server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was brought in.

    Attributes:
        left_out: What the archive has and the database has not, as ``pg_restore`` lists it.
    """

    left_out: tuple[str, ...] = ()


async def programs_for(config: TenancyConfig, server_version: int) -> Programs:
    """Return PostgreSQL's programs for a server.

    Raises:
        ConfigurationError: there are none.
    """
    # in a thread: it looks at many directories, and starts the programs
    return await asyncio.to_thread(find_programs, server_version, config.provisioning.client_programs)


async def extensions_in(programs: Programs, archive: Path, allowed: Collection[str]) -> tuple[InstalledExtension, ...]:
    """Return the extensions of an archive that an administrator may install for it.

    Args:
        programs: PostgreSQL's, of its server or newer.
        archive: A directory or a file of ``pg_dump``.
        allowed: The names of those that may be installed: an archive does not decide what a superuser runs.

    Raises:
        ProvisioningError: the archive cannot be read.
        ConfigurationError: it was made by programs that are newer than those on this machine.
    """
    if not allowed:
        return ()
    programs = await asyncio.to_thread(able_to_read, programs, archive)
    text = await run_program([programs.path("pg_restore"), "--schema-only", "--file=-", str(archive)], {})
    found = (
        InstalledExtension(_unquoted(match["name"]), _unquoted(match["schema"] or "public"))
        for match in _EXTENSION.finditer(text)
    )
    return tuple(one for one in found if one.name in allowed)


async def restore_archive(
    new: Restorable,
    programs: Programs,
    archive: Path,
    *,
    extensions: Collection[InstalledExtension] = (),
    without: Collection[str] = (),
) -> Restored:
    """Bring an archive in. The planner has no statistics of it.

    Args:
        new: The empty database.
        programs: PostgreSQL's, of its server or newer. Where the archive was made by newer ones, such are looked for.
        archive: A directory or a file of ``pg_dump``. It is trusted as far as its own files: which of them hold rows,
            its table of contents says.
        extensions: The extensions that the database has.
        without: Further kinds of entries that are left out, as ``pg_restore --list`` prints them.

    Raises:
        ProvisioningError: PostgreSQL refused something.
        ConfigurationError: the archive was made by programs that are newer than those on this machine.
    """
    login = new.login
    programs = await asyncio.to_thread(able_to_read, programs, archive)
    # without it, any other error fails the restore as well, at its end
    exact = ("--exit-on-error",) if programs.can_restore_exactly(new.server_version) else ()
    restore = programs.path("pg_restore")
    entries = await run_program([restore, "--list", str(archive)], {})
    schemas = {one.schema for one in extensions}
    kept, left_out = archives.select(entries, schemas)
    if without:
        kept = "".join(line for line in kept.splitlines(keepends=True) if not _is_of(line, without))
    with tempfile.TemporaryDirectory(prefix="tenancy-restore-") as directory:
        listing = Path(directory, "list")
        await asyncio.to_thread(listing.write_text, kept, "utf-8")
        await run_program(
            [
                restore,
                *exact,
                "--no-owner",
                "--no-acl",
                "--no-security-labels",
                "--no-publications",
                "--no-subscriptions",
                "--no-tablespaces",
                f"--use-list={listing}",
                f"--dbname={login.database}",
                str(archive),
            ],
            login.environment(),
        )
    return Restored(left_out=left_out)


@asynccontextmanager
async def connected(new: Filled, *, timeout: float) -> AsyncIterator[Connection]:
    """Connect to a filled database as its login, for statements that may take long.

    Args:
        new: The filled database.
        timeout: Seconds until the connection must be open.
    """
    connection = await new.login.connect(timeout=timeout, settings=UNBOUNDED, purpose="tenancy-restore")
    try:
        yield connection
    finally:
        await run_to_completion(connections.close(connection))


async def count_rows(connection: Connection, tables: Sequence[str]) -> dict[str, int]:
    """Return how many rows each table has, without those of its partitions, for ``check_rows``.

    Args:
        connection: As a login that reads all rows.
        tables: Names with the schema, quoted.
    """
    counts: dict[str, int] = {}
    for first in range(0, len(tables), _COUNTED_AT_ONCE):
        names = tables[first : first + _COUNTED_AT_ONCE]
        parts = (f"SELECT pg_catalog.count(*) FROM ONLY {name}" for name in names)  # noqa: S608 - quoted
        found = await connection.fetchrow(f"SELECT {', '.join(f'({part})' for part in parts)}")
        counts.update(zip(names, found or (), strict=True))
    return counts


async def check_rows(connection: Connection, counts: Mapping[str, int]) -> None:
    """Compare the rows of each table with what was counted when the archive was made.

    Args:
        connection: To the filled database, as the login that owns what is in it.
        counts: Rows by table, as ``schema.table``, each quoted where it must be.

    Raises:
        OperationError: a table has another number of rows, or is missing.
    """
    found = {}
    counting = connection.transaction()
    await counting.start()
    for row in await connection.fetch(_COUNTS):
        name = row["name"]
        if row["forced"]:
            # until the rollback; it would hide rows from their owner, which the login is
            await connection.execute(f"ALTER TABLE {name} NO FORCE ROW LEVEL SECURITY")
        found[name] = await connection.fetchval(f"SELECT count(*) FROM ONLY {name}")  # noqa: S608 - quoted
    await counting.rollback()
    wrong = [
        f"{name} has {found.get(name, 'no')} rows, not {count}"
        for name, count in counts.items()
        if found.get(name) != count
    ]
    if wrong:
        raise OperationError(f"what was restored is not what was backed up: {'; '.join(wrong[:5])}")


def _is_of(line: str, kinds: Collection[str]) -> bool:
    """Whether a line of an archive's list is an entry of one of these kinds."""
    return any(re.match(rf"\d+; \d+ \d+ {re.escape(kind)} ", line) for kind in kinds)


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


__all__ = ["Restored", "check_rows", "connected", "count_rows", "extensions_in", "programs_for", "restore_archive"]
