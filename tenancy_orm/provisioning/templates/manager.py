"""``TemplateManager``: lists the templates of all servers, builds them again, and drops those that nobody uses."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from ...audit.actor import SYSTEM, Actor
from ...cancellation import run_to_completion
from ...config import TenancyConfig
from ...context import refuse_while_bound
from ...control.names import Names
from ...errors import ServerUnavailableError
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.errors import describe
from ...postgres.failures import SERVER_FAILURES
from ...servers.server import Server
from ..preparation.prepared_servers import PreparedServers
from ..server_objects import advisory_locks, databases, removal
from ..server_objects.blockers import Blockers
from ..server_objects.databases import DatabaseState
from . import building as templates
from .building import USE_SECONDS, TemplateInfo, Templates
from .records import TemplateRecord, TemplateRecords

logger = logging.getLogger("tenancy_orm.provisioning")

# A process that runs records its use every ``USE_SECONDS``; two of these records may fail.
IN_USE_SECONDS = 3 * USE_SECONDS

_LONG_AGO = datetime.min.replace(tzinfo=UTC)

TemplateState = Literal["current", "in use", "superseded", "incomplete"]
"""Whether this configuration uses a template now; else whether another process did so within ``IN_USE_SECONDS``; else
it is superseded. An incomplete one is being built, or its builder died: ``reconcile`` drops it then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A template on a server.

    ``built_at`` is None for one that another version of this package built. ``last_used_by`` is the host and process
    that used it last; ``size_bytes`` is None where the administrator may not ask for it.
    """

    server: str
    name: str
    revision: str | None
    state: TemplateState
    built_at: datetime | None
    last_used_at: datetime | None
    last_used_by: str | None
    size_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatePruneReport:
    """The templates that were dropped, or would be; and what failed, by server or template."""

    removed: tuple[Template, ...]
    errors: tuple[str, ...] = ()


class TemplateManager:
    """The templates of all servers (``tenancy.templates``).

    Args:
        config: The configuration.
        names: The names of the installation.
        templates: Builds them.
        records: The control database's rows.
        servers: The servers, by name.
        prepared: Makes servers ready for templates.
        blockers: Returns the ``Blockers`` of a server.
    """

    def __init__(
        self,
        *,
        config: TenancyConfig,
        names: Names,
        templates: Templates,
        records: TemplateRecords,
        servers: Mapping[str, Server],
        prepared: PreparedServers,
        blockers: Callable[[Server], Blockers],
    ) -> None:
        self._config = config
        self._names = names
        self._templates = templates
        self._records = records
        self._servers = servers
        self._prepared = prepared
        self._blockers = blockers

    async def rebuild(self, *, servers: Iterable[str] | None = None, actor: Actor = SYSTEM) -> list[TemplateInfo]:
        """Build the template of the current schema again on ``servers``, or on all, and use it from now on.

        For what no digest shows: an extension's new version, or data that a revision gets from elsewhere. Other
        processes use the new one within five minutes.

        Raises:
            TemplateError, MigrationError: it could not be built; the former one stays in force.
            UnknownServerError, ServerUnavailableError, ControlUnavailableError: as ``list``.
        """
        refuse_while_bound("building a template")
        return [
            await self._templates.rebuild(await self._prepared.server(name), actor=actor)
            for name in self._chosen(servers)
        ]

    async def prune(
        self,
        *,
        servers: Iterable[str] | None = None,
        unused_seconds: float | None = None,
        dry_run: bool = False,
        actor: Actor = SYSTEM,
    ) -> TemplatePruneReport:
        """Drop templates that no process has used for ``unused_seconds``. Those in use, and the current one, stay.

        A server that does not answer is in the report's ``errors``. If a dropped template is needed after all, the next
        creation builds it again.

        Args:
            servers: The servers; all where None.
            unused_seconds: ``retention.template_seconds`` where None; nothing is dropped if that is 0. In any case a
                template counts as used for 15 minutes.
            dry_run: Report what would be dropped, and drop nothing.
            actor: Who does this, for the audit log.

        Raises:
            ControlUnavailableError: the control database does not answer.
            ConfigurationError: the migrations cannot be loaded, so it is not known which template is current.
        """
        refuse_while_bound("dropping templates")
        kept = (self._config.retention.template_seconds or math.inf) if unused_seconds is None else unused_seconds
        unused = max(kept, IN_USE_SECONDS)
        removed: list[Template] = []
        errors: list[str] = []
        for name in self._chosen(servers):
            try:
                removed += await self._prune(name, unused, dry_run, actor)
            except (ServerUnavailableError, *SERVER_FAILURES) as exc:
                logger.warning("templates of server %s are not dropped: %s", name, describe(exc))
                errors.append(f"{name}: {describe(exc)}")
        return TemplatePruneReport(removed=tuple(removed), errors=tuple(errors))

    def _chosen(self, servers: Iterable[str] | None) -> list[str]:
        return [self._servers[name].name for name in (self._servers if servers is None else servers)]

    async def _survey(self, server: Server) -> list[tuple[Template, TemplateRecord | None]]:
        """Return the templates of a server with their rows, the newest first."""
        connection = await self._blockers(server).connect()
        try:
            base = self._templates.base(restricted=await advisory_locks.may_restrict(connection))
            states = await databases.states(connection, self._names.template(""))
            records = {record.name: record for record in await self._records.of_server(server.name)}
            sizes = await databases.sizes(connection, [state.name for state in states])
        finally:
            await run_to_completion(connections.close(connection))
        found = []
        for state in states:
            record = records.get(state.name)
            found.append((self._describe(server.name, state, record, base, sizes.get(state.name)), record))
        return sorted(found, key=lambda pair: pair[0].built_at or _LONG_AGO, reverse=True)

    def _describe(
        self, server: str, state: DatabaseState, record: TemplateRecord | None, base: str, size: int | None
    ) -> Template:
        if not state.is_template:
            kind: TemplateState = "incomplete"
        elif record is not None and self._templates.is_current(record, base):
            kind = "current"
        elif record is not None and record.last_used_by is not None and record.age_seconds < IN_USE_SECONDS:
            kind = "in use"
        else:
            kind = "superseded"
        return Template(
            server=server,
            name=state.name,
            revision=templates.revision_of(state),
            state=kind,
            built_at=None if record is None else record.built_at,
            last_used_at=None if record is None or record.last_used_by is None else record.last_used_at,
            last_used_by=None if record is None else record.last_used_by,
            size_bytes=size,
        )

    async def _prune(self, name: str, unused: float, dry_run: bool, actor: Actor) -> list[Template]:
        server = self._servers[name]
        found = await self._survey(server)
        if not dry_run:
            # first, so that their time runs from now
            unknown = [template.name for template, record in found if record is None and template.state == "superseded"]
            await self._records.add_unknown(name, unknown)
            await self._records.forget_missing(name, [template.name for template, _ in found])
        due = [
            template
            for template, record in found
            if record is not None and template.state == "superseded" and record.age_seconds >= unused
        ]
        if dry_run or not due:
            return due
        connection = await self._blockers(server).connect()
        try:
            return [one for one in due if await self._remove(connection, server, one, unused, actor)]
        finally:
            await run_to_completion(connections.close(connection))

    async def drop_all(self, name: str, *, actor: Actor = SYSTEM) -> None:
        """Drop every template on a server, also those in use: for a server that is removed.

        Raises:
            UnknownServerError: no such server is configured.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
        """
        refuse_while_bound("dropping templates")
        server = self._servers[name]
        found = await self._survey(server)
        connection = await self._blockers(server).connect()
        try:
            for template, record in found:
                if record is not None:
                    await self._records.remove(name, template.name, unused_for=0.0, actor=actor)
                async with asyncio.timeout(self._config.provisioning.timeout):
                    await removal.drop_database(connection, self._blockers(server), template.name)
            await self._records.forget(name)
        finally:
            await run_to_completion(connections.close(connection))

    async def _remove(
        self, connection: Connection, server: Server, template: Template, unused: float, actor: Actor
    ) -> bool:
        """Drop a template, unless a process has begun to use it."""
        # the row first: what has none is not used by anybody
        if not await self._records.remove(server.name, template.name, unused_for=unused, actor=actor):
            return False
        logger.info("dropping the superseded template %s on server %s", template.name, server.name)
        async with asyncio.timeout(self._config.provisioning.timeout):
            await removal.drop_database(connection, self._blockers(server), template.name)
        return True

    # the last method: in the class, the name hides the type from annotations below it
    async def list(self, *, servers: Iterable[str] | None = None) -> list[Template]:
        """Return the templates of ``servers``, or of all, by server; the newest first.

        Raises:
            UnknownServerError: no such server is configured.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
        """
        refuse_while_bound("listing templates")
        found = await asyncio.gather(*(self._survey(self._servers[name]) for name in self._chosen(servers)))
        return [template for of_server in found for template, _ in of_server]
