"""The way of a source into an empty database: ``pg_dump`` as its login, ``pg_restore`` as a restricted one.

The restorer owns what it brings in, and can do nothing outside of that database: see ``provisioning.copy_logins``. A
dump is what its source makes of it. So nothing here runs as an administrator, and roles, rights, foreign servers, event
triggers and extensions of the source are left out.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..cancellation import run_to_completion
from ..errors import AdoptionError, ProvisioningError
from ..postgres import connections
from ..postgres.programs import SCHEMA_ONLY, Programs, run_piped, run_program
from ..postgres.quoting import quote_identifier, quote_pattern
from ..provisioning.copies import archives
from ..provisioning.copies.materialized_views import fill_views
from ..provisioning.logins.copy_logins import CopyLogin
from ..provisioning.rights import event_trigger
from ..provisioning.rights.grants import CHECKPOINTS_SCHEMA
from ..provisioning.rights.tenant_rights import RECORD_SCHEMA
from .contents import Contents
from .source import OpenSource

_OWN_SCHEMAS = (event_trigger.NAME, CHECKPOINTS_SCHEMA, RECORD_SCHEMA)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One transfer.

    Attributes:
        programs: PostgreSQL's programs, of the target's version or newer.
        opened: The source.
        contents: What it contains.
        into: The login that restores.
        version: The target's major version.
        connect_timeout: Seconds that a connection to the target may take.
    """

    programs: Programs
    opened: OpenSource
    contents: Contents
    into: CopyLogin
    version: int
    connect_timeout: float

    async def run(self, *, with_rows: bool) -> tuple[str, ...]:
        """Bring the source into the database, and return what is left out, as ``pg_restore`` lists it.

        Raises:
            AdoptionError: one of the programs failed.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="tenancy-adopt-") as directory:
                return await self._run(Path(directory), with_rows)
        except ProvisioningError as exc:
            raise AdoptionError(f"{self.opened.source} cannot be restored: {exc}") from exc

    async def _run(self, directory: Path, with_rows: bool) -> tuple[str, ...]:
        await self._make_schemas()
        left_out: list[str] = []
        parts: list[tuple[str, list[str]]] = []
        schemas = {one.schema for one in self.contents.extensions}
        for number, scope in enumerate(self._scopes()):
            archive, listing = str(directory / f"{number}.dump"), directory / f"{number}.list"
            await self._dump(*scope, *SCHEMA_ONLY, f"--file={archive}")
            left_out += await archives.write_list(self.programs, archive, listing, schemas)
            parts.append((archive, [f"--use-list={listing}"]))
        for archive, options in parts:
            await self._restore(*options, "--section=pre-data", archive)
        if with_rows:
            for scope in self._scopes():
                await run_piped(
                    [*self._dump_command(), *scope, "--data-only", "--compress=0"],
                    [*self._restore_command(), "--data-only"],
                    self.opened.environment(),
                    self.into.environment(),
                )
        for archive, options in parts:
            await self._restore(*options, "--section=post-data", archive)
        if with_rows:
            await fill_views(self.into, self.contents.filled, timeout=self.connect_timeout)
        return tuple(dict.fromkeys(left_out))

    def _scopes(self) -> list[tuple[str, ...]]:
        """The options of each dump; what others refer to comes first."""
        source = self.opened.source
        if source.schema is None:
            return [tuple(f"--exclude-schema={quote_pattern(name)}" for name in _OWN_SCHEMAS)]
        scopes: list[tuple[str, ...]] = []
        if source.shared:
            # tables that are named take no others along, whatever schemas are named beside them
            scopes.append(tuple(f"--table={'.'.join(map(quote_pattern, name.split('.')))}" for name in source.shared))
        return [*scopes, (f"--schema={quote_pattern(source.schema)}",)]

    async def _make_schemas(self) -> None:
        """Create the schemas of shared tables, which a dump of tables does not."""
        names = {name.partition(".")[0] for name in self.opened.source.shared} - {"public"}
        if not names:
            return
        connection = await self.into.connect(timeout=self.connect_timeout)
        try:
            for name in sorted(names):
                await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(name)}")
        finally:
            await run_to_completion(connections.close(connection))

    def _dump_command(self) -> list[str]:
        without = (".".join(map(quote_pattern, table)) for table in self.contents.without)
        options = (f"--exclude-table={pattern}" for pattern in without)
        return self.programs.dump_command(*options, snapshot=self.opened.snapshot)

    def _restore_command(self) -> list[str]:
        return self.programs.restore_command(self.into.database, exact=self.programs.version == self.version)

    async def _dump(self, *options: str) -> None:
        await run_program([*self._dump_command(), *options], self.opened.environment())

    async def _restore(self, *options: str) -> None:
        await run_program([*self._restore_command(), *options], self.into.environment())


__all__ = ["Transfer"]
