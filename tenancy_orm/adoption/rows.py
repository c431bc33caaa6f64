"""``RowsAdoption``: the rows of one customer are taken out of a shared database, and become a tenant."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_while_bound
from .frame import Tell
from .refusals import open_adoptable
from .rows_report import RowsReport
from .rows_work import GivenMapping, RowsWork, read_mapping, report_of, silent
from .source import Source


class RowsAdoption:
    """Makes tenants of the rows of a shared database; ``tenancy.adoption.rows``.

    The source is only read. What is made of it is all or nothing. Rows that do not clearly belong to the customer
    refuse the adoption, and tables that nothing reaches do as well.

    Args:
        work: Does it.
    """

    def __init__(self, work: RowsWork) -> None:
        self._work = work
        self._services = work.services

    async def check(
        self,
        slug: str,
        url: str,
        *,
        where: str | None = None,
        mapping: GivenMapping = None,
        at: str | None = None,
        server: str | None = None,
        region: str | None = None,
        tier: str | None = None,
        tell: Tell | None = None,
    ) -> RowsReport:
        """Look at how each table is reached, and count its rows. Nothing is changed.

        Args:
            slug: The slug that the tenant would have.
            url: The URL of the database. Its password is neither stored nor shown.
            where: The root condition, as SQL: it holds in every table that has its column.
            mapping: What tables become, and what to do where references do not say it.
            at: The revision that the rows are brought to; the newest where None.
            server: The server to place it on; chosen as for a new tenant where None.
            region: Where its data has to stay.
            tier: The tenant's tier.
            tell: Called with a line about what is done now.

        Raises:
            AdoptionError: the source cannot be read, or the mapping does not fit it.
            ConfigurationError: an argument is malformed.
            MigrationError: the migrations do not have the revision, or one of them fails.
            PlacementError: no server takes the tenant.
        """
        refuse_while_bound("adopting rows")
        started, tell = time.monotonic(), tell or silent
        described, said = Source.parse(url), read_mapping(mapping, where)
        chosen = await self._work.choose(slug, server, region, tier)
        building = await self._work.build(chosen, at, tell)
        async with open_adoptable(self._services, described) as opened:
            look = await self._work.look(opened, said, building, tell)
            return report_of(slug, opened, said, building, chosen, look, started)

    async def adopt(
        self,
        slug: str,
        url: str,
        *,
        where: str | None = None,
        mapping: GivenMapping = None,
        at: str | None = None,
        server: str | None = None,
        region: str | None = None,
        tier: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        key_name: str = "default",
        scopes: Sequence[str] = (),
        tell: Tell | None = None,
        actor: Actor = SYSTEM,
    ) -> RowsReport:
        """Make a tenant of the rows of one customer.

        The rows are one snapshot. A login that may do nothing else runs the revisions in an empty database, copies
        the rows into it, and runs the missing revisions; references, sequences and numbers of rows are verified. If
        anything fails, nothing remains of it. If the process dies, call this again with the same arguments; where the
        tenant is complete already, this returns its report.

        Args:
            slug: The tenant's slug.
            url: The URL of the database. Its password is neither stored nor shown.
            where: The root condition, as SQL: it holds in every table that has its column.
            mapping: What tables become, and what to do where references do not say it.
            at: The revision that the rows are brought to; the newest where None.
            server: The server to place it on; chosen as for a new tenant where None.
            region: Where its data has to stay.
            tier: The tenant's tier.
            metadata: A JSON object, kept with the tenant.
            key_name: The name of its first API key.
            scopes: The key's scopes.
            tell: Called with a line about what is done now.
            actor: Who does this, for the audit log.

        Raises:
            AdoptionError: rows or tables do not clearly belong to anybody, or the source cannot be read; nothing
                remains.
            TenancyError: as ``TenantManager.create``, and ``check``.
        """
        refuse_while_bound("adopting rows")
        described, said = Source.parse(url), read_mapping(mapping, where)
        values = {"tier": tier, "region": region, "metadata": metadata, "key_name": key_name, "scopes": scopes}
        tell = tell or silent
        if (former := await self._work.former(slug, described, said, actor=actor)) is not None:
            return former
        chosen = await self._work.choose(slug, server, region, tier)
        building = await self._work.build(chosen, at, tell)
        return await self._work.create(slug, described, said, building, chosen, values=values, tell=tell, actor=actor)


__all__ = ["RowsAdoption"]
