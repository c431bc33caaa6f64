"""``SeededSchema``: the schema of a template, and the rows that do not depend on the tenant.

Reference data and the seeds for the template are run once, when it is built. A clone has the rows and their record, so
they cost nothing at a creation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from sqlalchemy.engine import URL

from ..migrations.database import ConnectionAdapter, close
from ..provisioning.templates.building import Connect, SchemaSource
from . import records, reference, running
from .loading import SeedSet

_URL = URL.create("postgresql+asyncpg")
_INPUT = "reference:"


class SeededSchema:
    """A ``SchemaSource`` that fills what another one has made.

    Args:
        schema: The schema.
        seeds: The seeds and reference tables.
        timeout: Seconds that each of them may take.
    """

    def __init__(self, schema: SchemaSource, seeds: SeedSet, *, timeout: float) -> None:
        self._schema = schema
        self._seeds = seeds
        self._timeout = timeout
        self._recorded: Mapping[str, str] = {}

    def head(self) -> str | None:
        """Return the revision that ``apply`` migrates to."""
        return self._schema.head()

    def fingerprint(self) -> str:
        """Return a text that changes with the schema, the seeds for the template, and the files of reference data.

        Raises:
            ConfigurationError: a seed cannot be loaded.
        """
        found = self._schema.fingerprint()
        if not self._seeds:
            return found
        parts = [found, *(seed.digest for seed in self._seeds.for_template())]
        parts += [source.fingerprint() for source in self._seeds.references]
        return hashlib.sha256("\0\0".join(parts).encode()).hexdigest()

    def inputs(self) -> Mapping[str, str]:
        """Return the files that the last ``apply`` used, and digests of the rows that functions gave."""
        return {**self._schema.inputs(), **self._recorded}

    def changed_input(self, inputs: Mapping[str, str]) -> str | None:
        """Return the name of one of ``inputs`` that has changed since; a function counts once it was called again."""
        if not self._seeds.references:
            return self._schema.changed_input(inputs)
        now = {
            _INPUT + source.name: source.loaded.digest
            for source in self._seeds.references
            if source.is_function and source.loaded is not None
        }
        others = {}
        for name, digest in inputs.items():
            if not name.startswith(_INPUT):
                others[name] = digest
            elif now.get(name, digest) != digest:
                return name
        return self._schema.changed_input(others)

    async def apply(self, connect: Connect) -> str | None:
        """Make the schema in an empty database, and fill it.

        Raises:
            SeedError, ReferenceDataError: what could not be run; the template is not used then.
            TenancyError: as the schema's own ``apply``.
        """
        revision = await self._schema.apply(connect)
        self._recorded = {}
        if not self._seeds:
            return revision
        sources = [(source, await source.load()) for source in self._seeds.references]
        connection = await connect()
        try:
            await records.create_tables(connection)
            for _, rows in sources:
                await reference.bring(connection, rows, timeout=self._timeout)
            if seeds := self._seeds.for_template():
                async with ConnectionAdapter().adapt(connection, _URL) as adapted:
                    for seed in seeds:
                        await running.run_as_owner(adapted, seed, timeout=self._timeout)
        finally:
            await close(connection)
        self._recorded = {_INPUT + source.name: rows.digest for source, rows in sources if source.is_function}
        return revision
