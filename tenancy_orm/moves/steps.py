"""``Move``: one tenant's move, step by step, so that one writable copy of its data is left wherever it stops.

Each step is named in the operation's row before it begins. The tenant's own row decides what a process does that takes
the move over: as long as it names the old database, everything new is removed; once it names the new one, the move is
finished. Nothing that is made has a name that the operation's number does not give, or its details.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeAlias

from ..audit.actor import SYSTEM, Actor
from ..cancellation import run_to_completion
from ..config.sections import MoveConfig
from ..drift import catalogue
from ..drift.catalogue import Catalogue
from ..errors import DatabaseExistsError, OperationError, OperationStateError, TenancyError, TenantNotFoundError
from ..events import TenantMoved
from ..jobs.claims import Claimant
from ..migrations.database import lock as lock_migrations
from ..operations import Operation, Operations, Paused, Switch
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.failures import SERVER_FAILURES
from ..postgres.programs import find_programs
from ..provisioning import Provisioner, databases, roles
from ..provisioning.copy_logins import CopyLogin
from ..provisioning.database_properties import read_properties
from ..provisioning.differences import enumeration
from ..provisioning.empty_databases import read_extensions
from ..provisioning.pipeline import describe
from ..provisioning.provisioner import services_of, settings_of
from ..provisioning.replaced_databases import refuse_stale
from ..provisioning.scram import scram_verifier
from ..routing.marker import marker_text, replaced_text
from ..tenant import Placement, Status, Tenant
from ..tenants.manager import TenantManager
from .copying import MATERIALIZED, TEXTS, Copying, copy_large_objects, copy_sequences, copy_tables
from .policy import SamePolicy, refuse_own_objects, schema_differences
from .streams import Failing, Stream
from .survey import Survey, refuse_configured, survey
from .truncations import referred_by_unlogged

logger = logging.getLogger("tenancy_orm.moves")

LAST_VERSION = 18
"""The newest version of PostgreSQL that is supported."""

Tell: TypeAlias = Callable[[str], None]

_TOLD = {
    "publishing": "looking at the tables",
    "copying": "copying the database",
    "replicating": "catching up with what was written since",
    "switching": "pausing the tenant, and switching",
    "switched": "having the former database follow",
    "rolling_back": "catching up, and switching back",
    "confirming": "dropping the former database",
}
_PREPARED = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() ORDER BY 1"
_SERVED = frozenset({Status.TRIAL, Status.ACTIVE})
_SLOT_SECONDS = 60.0
_SHOWN = 5
TRUNCATED = "unlogged tables refer to {tables}, so a TRUNCATE of these ends the move, or its way back; DELETE does not"
"""What a move tells of such tables."""
FULL = "it kept {kept:,} bytes of the log, so housekeeping ended it"
"""Why there is no way back."""
UNWANTED = "it was moved without a way back"
"""Why there is none, where nobody wanted one."""


def _silent(step: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveServices:
    """What moves use."""

    config: MoveConfig
    provisioner: Provisioner
    operations: Operations
    tenants: TenantManager
    switch: Switch
    claimant: Claimant


class Move:
    """One move that this process has claimed.

    Args:
        services: What it uses.
        operation: Its record.
        tenant: The tenant.
        actor: Who does this, for the audit log.
        tell: Called with what is done next, in words.
    """

    def __init__(
        self,
        services: MoveServices,
        operation: Operation,
        tenant: Tenant,
        *,
        actor: Actor = SYSTEM,
        tell: Tell = _silent,
    ) -> None:
        self._tell = tell
        self._services = services
        self._config = services.config
        self._provisioning = services_of(services.provisioner)
        self._operation = operation
        self._tenant = tenant
        self._actor = actor
        detail = operation.detail
        if tenant.placement is None:
            raise TenantNotFoundError(tenant.slug)
        sealed = tenant.placement.sealed_password
        self.old = Placement(detail["from"]["server"], detail["from"]["database"], detail["from"]["role"], sealed)
        self.new = Placement(detail["to"]["server"], detail["to"]["database"], detail["to"]["role"], sealed)
        self._forward = Stream(self._provisioning, operation.id, "f", self.old, self.new)
        self._reverse = Stream(self._provisioning, operation.id, "r", self.new, self.old)
        self._pause_seconds: float | None = None
        self._ended_sessions = 0

    @property
    def _online(self) -> bool:
        return not self._operation.detail["offline"]

    async def _advance(self, step: str, **detail: Any) -> None:
        if step != "switched" or self._online:  # after a move by a dump, nothing follows
            self._tell(_TOLD.get(step, step))
        await self._note(step, **detail)

    async def _note(self, step: str, **detail: Any) -> None:
        self._operation = await self._services.operations.advance(
            self._operation, self._services.claimant, step, detail=detail
        )

    # --- forward ----------------------------------------------------------------------------------------------------

    async def run(self) -> Tenant:
        """Move the tenant; afterwards the operation waits to be confirmed, or rolled back.

        Raises:
            TenancyError: it failed, and what was made has been undone, or is left to whoever resumes it.
        """
        async with self._services.operations.keep(self._operation, self._services.claimant):
            try:
                if self._online:
                    await self._run_online()
                else:
                    await self._run_offline()
            except BaseException as exc:
                if await run_to_completion(self._is_switched()):
                    # what follows the switch is finished by whoever resumes it
                    raise
                await run_to_completion(self._give_up(exc))
                raise
            return await self.finish_switch()

    async def _give_up(self, error: BaseException) -> None:
        """Undo what was begun; what cannot be undone now is left to ``resume``."""
        try:
            await self.undo(error=describe(error))
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.error(
                "move %d of tenant %s is not undone yet, housekeeping repeats it: %s",
                self._operation.id,
                self._tenant.slug,
                describe(exc),
            )

    async def _run_online(self) -> None:
        async with AsyncExitStack() as stack:
            source = await self._forward.connect(self.old)
            stack.push_async_callback(connections.close, source)
            # until the end: no migration changes the schema, which would not be replicated
            await lock_migrations(source, timeout=self._provisioning.config.provisioning.timeout)
            found = await self._look(source)
            expected = await self._read(self.old, source)
            referred = await referred_by_unlogged(source)
            if referred:
                self._tell(TRUNCATED.format(tables=enumeration(referred)))
            await self._advance("publishing", identities=found.without_identity, not_to_truncate=referred)
            await self._identify(self.old, found.without_identity)
            owner = await self._forward.connect(self.old, role=self._provisioning.names.owner)
            try:
                await self._forward.publish(owner, found.replicated)
            finally:
                await run_to_completion(connections.close(owner))
            expected = await self._read(self.old, source) if found.without_identity else expected
            reader = await self._forward.create_login(seconds=2 * self._config.timeout)
            await self._advance("copying")
            async with self._forward.begin(reader, timeout=_SLOT_SECONDS) as snapshot:
                await self._copy(source, reader, expected, found, snapshot=snapshot.name)
            await self._advance("replicating")
            await self._forward.restrict_login()
            await self._forward.subscribe(reader)
            # the second time it is what was written during the first
            for _ in range(2):
                await self._forward.wait(source, timeout=self._config.timeout)
            back = await self._prepare_return(found)
            await self._forward.wait(source, timeout=self._config.timeout)
            await self._advance("switching", reverse=back, **found.notes)
            await self._switch(source, found, expected)

    async def _look(self, source: Connection) -> Survey:
        await refuse_own_objects(source, self.old.role, tenant=self._tenant.slug)
        return await survey(
            source,
            tenant=self._tenant.slug,
            owner=self._provisioning.names.owner,
            stem=self._provisioning.names.stream_stem,
            online=self._online,
            most=self._config.pause_bytes,
            version=int(self._operation.detail.get("version") or LAST_VERSION),
        )

    async def _read(self, place: Placement, connection: Connection | None = None) -> Catalogue:
        """Read the schema of one of the databases."""
        own = connection if connection is not None else await self._forward.connect(place)
        try:
            return await catalogue.read(own, owner=self._provisioning.names.owner, role=place.role)
        finally:
            if connection is None:
                await run_to_completion(connections.close(own))

    async def _identify(self, place: Placement, tables: Mapping[str, str], *, full: bool = True) -> None:
        """Let PostgreSQL tell rows of tables without a primary key apart by all their columns; or undo that."""
        if not tables or place.server not in self._provisioning.servers:
            return
        # "i" had none either: its index was dropped
        kinds = {"d": "DEFAULT", "n": "NOTHING", "i": "NOTHING"}
        connection = await self._forward.connect(place, role=self._provisioning.names.owner)
        blockers = self._provisioning.blockers(self._provisioning.servers[place.server])
        try:
            for table, identity in tables.items():
                statement = f"ALTER TABLE {table} REPLICA IDENTITY {'FULL' if full else kinds[identity]}"

                async def alter(statement: str = statement) -> None:
                    async with connections.transaction(connection):
                        await connection.execute("SET LOCAL lock_timeout = '2s'")
                        await connection.execute(statement)

                await blockers.run(connection, alter)
        finally:
            await run_to_completion(connections.close(connection))

    async def _copy(
        self,
        source: Connection,
        reader: CopyLogin,
        expected: Catalogue,
        found: Survey,
        *,
        snapshot: str | None,
        lock_held: bool = False,
    ) -> None:
        """Make the new database with what the old one has, and the tenant's role, which cannot connect to it yet."""
        config, provisioner = self._provisioning.config, self._services.provisioner
        extensions = await read_extensions(source)
        async with provisioner.new_databases.open(
            self._tenant,
            self.new.server,
            self.new.database,
            extensions_of=extensions,
            like=await read_properties(source),
            timeout=config.provisioning.timeout,
            valid_for=self._config.timeout,
            lock_held=lock_held,
        ) as new:
            inside = await new.connect()
            await run_to_completion(connections.close(inside))
            versions = connections.version(source), connections.version(inside)
            programs = await asyncio.to_thread(find_programs, max(versions), config.provisioning.client_programs)
            copying = Copying(
                programs=programs,
                reader=reader,
                restorer=new.login,
                snapshot=snapshot,
                schemas=frozenset(one.schema for one in extensions),
                exact={*versions} == {programs.version},
                everything=not self._online,
                without_rows=found.configured,
            )
            async with asyncio.timeout(self._config.timeout):
                left_out = await copying.run(connect_timeout=config.pool.connect_timeout)
            if left_out:
                raise OperationError(
                    f"tenant {self._tenant.slug!r} cannot be moved: its database has what only an administrator can "
                    f"copy: {', '.join(left_out[:_SHOWN])}"
                )
            await self._create_role()
            policy = SamePolicy(expected, owner=self._provisioning.names.owner, tenant=self._tenant.slug)
            await new.hand_over(self._tenant, self.new.role, policy=policy)
            await new.shut_guests_out(self.new.role)

    async def _create_role(self) -> None:
        """Create the tenant's role on the new server, unless an earlier move has left it there."""
        settings = await settings_of(self._services.provisioner, self.new.server)
        limit = self._provisioning.config.tiers[self._tenant.tier].connection_limit
        blockers = self._provisioning.blockers(self._provisioning.servers[self.new.server])
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            with suppress(DatabaseExistsError):
                await roles.create(
                    connection,
                    self.new.role,
                    verifier=self._verifier(self._tenant),
                    connection_limit=limit,
                    settings=settings.statements(self.new.role),
                )
            await roles.set_password(connection, self.new.role, verifier=self._verifier(self._tenant))
        finally:
            await run_to_completion(connections.close(connection))

    def _verifier(self, tenant: Tenant) -> str:
        assert tenant.placement is not None  # noqa: S101 - for the type checker: it is not purged
        return scram_verifier(self._provisioning.keyring.open_password(tenant.id, tenant.placement.sealed_password))

    async def _prepare_return(self, found: Survey) -> str:
        """Make what the way back needs, which costs nothing within the pause; "ready", or why there is none."""
        if not self._operation.detail.get("way_back", True):
            return UNWANTED
        try:
            inside = await self._reverse.connect(self.new)
            try:
                level = await inside.fetchval("SELECT current_setting('wal_level')")
            finally:
                await run_to_completion(connections.close(inside))
            if level != "logical":
                return f"server {self.new.server!r} has wal_level = {level}"
            owner = await self._reverse.connect(self.new, role=self._provisioning.names.owner)
            try:
                await self._reverse.publish(owner, found.replicated)
            finally:
                await run_to_completion(connections.close(owner))
            await self._reverse.create_slot(timeout=_SLOT_SECONDS)
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.warning("move %d of tenant %s has no way back: %s", self._operation.id, self._tenant.slug, exc)
            await self._reverse.drop_source()
            return str(exc) or describe(exc)
        return "ready"

    # --- the pause --------------------------------------------------------------------------------------------------

    async def _switch(self, source: Connection, found: Survey, expected: Catalogue) -> None:
        # the connections are opened before the pause
        opened = _Four(self._forward, self.old, self.new, self._provisioning.names.owner)
        async with opened as four, self._pause() as paused:
            self._refuse_changed(paused.tenant)
            await self._refuse_prepared(four.from_admin)
            await asyncio.gather(
                self._forward.wait(source, timeout=self._config.pause_seconds),
                self._refuse_other_schema(four.from_admin, expected),
                copy_sequences(four.from_owner, four.to_owner),
            )
            await self._carry(four, found)
            await self._renew_password(paused.tenant, self.new)
            if self._operation.detail.get("reverse") == "ready":
                await self._reverse.skip(four.to_admin)
            await self._to(paused, self.new, action="tenant.move")

    def _pause(self) -> AbstractAsyncContextManager[Paused]:
        return self._services.switch.pause(
            self._tenant, seconds=self._config.pause_seconds, drain=self._config.drain_seconds
        )

    async def _carry(self, four: _Four, found: Survey) -> None:
        """Copy what replication does not carry, and refuse what is not copied."""
        await refuse_configured(four.from_admin, self._tenant.slug)
        await copy_tables(four.from_owner, four.to_owner, found.unlogged)
        await copy_large_objects(four.from_admin, four.to_admin, self.new.role)

    async def _to(self, paused: Paused, place: Placement, *, action: str) -> Tenant:
        assert paused.tenant.placement is not None  # noqa: S101 - for the type checker: it is paused in it
        after = await paused.to(
            replace(place, sealed_password=paused.tenant.placement.sealed_password),
            action=action,
            revision=paused.tenant.schema_revision,
            # until the move is confirmed
            kept_until=None,
            operation=self._operation.id,
            claim=self._services.claimant.id,
            detail={"ended_sessions": paused.ended_sessions},
            actor=self._actor,
        )
        self._pause_seconds = time.monotonic() - paused.began
        self._ended_sessions = paused.ended_sessions
        return after

    async def _refuse_prepared(self, source: Connection) -> None:
        """Refuse to leave transactions behind that have no session, and can be committed later."""
        if found := [row["gid"] for row in await source.fetch(_PREPARED)]:
            raise OperationError(
                f"tenant {self._tenant.slug!r} cannot be moved: its database has the prepared transactions "
                f"{enumeration(found)}; end them by COMMIT PREPARED or ROLLBACK PREPARED"
            )

    def _refuse_changed(self, now: Tenant) -> None:
        if now.schema_revision != self._tenant.schema_revision or now.migrating_to is not None:
            raise OperationError(
                f"the schema of tenant {now.slug!r} was migrated from {self._tenant.schema_revision} to "
                f"{now.migrating_to or now.schema_revision} during its move; move it again"
            )

    async def _refuse_other_schema(
        self, connection: Connection, expected: Catalogue, *, remedy: str = "during its move: {}; move it again"
    ) -> None:
        owner = self._provisioning.names.owner
        found = await catalogue.read(connection, owner=owner, role=self.old.role)
        if differences := list(schema_differences(expected, found)):
            told = "; ".join(one.text for one in differences[:_SHOWN])
            raise OperationError(f"the schema of tenant {self._tenant.slug!r} was changed {remedy.format(told)}")

    async def _renew_password(self, now: Tenant, place: Placement) -> None:
        """Give the role the password that the registry has now: it may have been rotated since."""
        blockers = self._provisioning.blockers(self._provisioning.servers[place.server])
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            await roles.set_password(connection, place.role, verifier=self._verifier(now))
        finally:
            await run_to_completion(connections.close(connection))

    # --- by a dump --------------------------------------------------------------------------------------------------

    async def _run_offline(self) -> None:
        source = await self._forward.connect(self.old)
        try:
            # until the end: a migration of the old database would be lost, and recorded as done
            await lock_migrations(source, timeout=self._provisioning.config.provisioning.timeout)
            found = await self._look(source)
            # large objects belong to the tenant's role
            reader = await self._forward.create_login(
                seconds=2 * self._config.timeout, replicates=False, member_of=[self.old.role]
            )
            if found.hides_rows:
                await self._forward.see_all_rows()
            before = self._tenant.status
            await self._advance("copying", status=before.value, maintenance=before in _SERVED)
            if before in _SERVED:
                # first: requests are answered at once, and do not wait
                await self._services.tenants.start_maintenance(
                    self._tenant, reason="it is being moved", actor=self._actor
                )
            async with self._services.switch.pause(
                self._tenant, seconds=self._config.timeout, drain=self._config.drain_seconds
            ) as paused:
                await self._refuse_prepared(source)
                await refuse_configured(source, self._tenant.slug)
                self._refuse_changed(paused.tenant)
                expected = await self._read(self.old, source)
                await self._copy(source, reader, expected, found, snapshot=None)
                async with _Four(self._forward, self.old, self.new, self._provisioning.names.owner) as four:
                    await copy_sequences(four.from_owner, four.to_owner)
                await self._advance("switching", reverse="it was moved by a dump", **found.notes)
                # it still has the lock that keeps migrations away, for as long as the copy took
                await self._refuse_prepared(source)
                await self._renew_password(paused.tenant, self.new)
                await self._to(paused, self.new, action="tenant.move")
        finally:
            await run_to_completion(connections.close(source))

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _is_switched(self) -> bool:
        # what is undone or finished hangs on this: a switch whose commit is in doubt has ended by then
        place = (await self._provisioning.registry.get_settled(self._tenant.id)).placement
        return place is not None and (place.server, place.database) == (self.new.server, self.new.database)

    async def _refuse_stale(self) -> None:
        """Refuse to close or drop a database if the tenant's row is older than its last switch."""
        place = (await self._provisioning.registry.get(self._tenant.id)).placement
        if place is not None:
            server = self._provisioning.servers[place.server]
            await refuse_stale(self._provisioning.admin_connections, server, place.database)

    async def _settle(self, unused: Placement, *, replaced: bool) -> Tenant:
        """Open the database in use, close the other one, and let everybody go on.

        Args:
            unused: The other one.
            replaced: Whether the tenant has used it: then its marker says that the one in use has replaced it.
        """
        registry = self._provisioning.registry
        tenant = await registry.get(self._tenant.id)
        await self._services.provisioner.align(tenant, timeout=self._provisioning.config.provisioning.timeout)
        await registry.end_pause(tenant.id)
        if self._operation.detail.get("maintenance") and tenant.status is Status.MAINTENANCE:
            tenant = await self._services.tenants.end_maintenance(tenant, actor=self._actor)
        # closed since the pause, or never opened; last, since its server may not answer
        if unused.server in self._provisioning.servers:
            place, installation = tenant.placement, self._provisioning.installation
            mark = None if place is None or not replaced else replaced_text(installation, tenant.id, place)
            await self._services.switch.close_kept(unused, mark=mark)
        return tenant

    async def finish_switch(self) -> Tenant:
        """Do what follows the switch; to finish an interrupted one, repeat it. Then the operation waits.

        Raises:
            TenancyError: a server does not answer; the tenant is served in its new database all the same.
        """
        await self._advance("switched")
        tenant = await self._settle(self.old, replaced=True)
        await self._forward.drop()
        await self._identify(self.old, self._operation.detail.get("identities", {}), full=False)
        back = await self._follow_back()
        await self._refresh_views()
        confirm_by = datetime.now(UTC) + timedelta(seconds=self._config.keep_seconds)
        detail: dict[str, Any] = {"reverse": back, "confirm_by": confirm_by.isoformat()}
        if self._pause_seconds is not None:
            detail |= {"pause_seconds": round(self._pause_seconds, 3), "ended_sessions": self._ended_sessions}
        await self._services.operations.finish(self._operation, self._services.claimant, "waiting", detail=detail)
        self._provisioning.events.emit(
            TenantMoved(
                tenant_id=tenant.id,
                slug=tenant.slug,
                moved_from=self.old.server,
                moved_to=self.new.server,
                pause_seconds=self._pause_seconds,
            )
        )
        return tenant

    async def _follow_back(self) -> str:
        """Have the old database follow the new one; "following", or why it does not."""
        reason = str(self._operation.detail.get("reverse") or "it was not prepared")
        if reason in ("ready", "following"):
            try:
                await self._reverse.follow(seconds=self._config.keep_seconds + self._config.timeout)
            except (TenancyError, *SERVER_FAILURES) as exc:
                logger.warning("move %d of tenant %s has no way back: %s", self._operation.id, self._tenant.slug, exc)
                reason = str(exc) or describe(exc)
                # first: what is dropped cannot follow, whatever ends this process
                await self._note("switched", reverse=reason)
            else:
                return "following"
        if self._online:
            await self._reverse.drop()
        return reason

    async def _refresh_views(self) -> None:
        """Fill the materialized views again: the old database may have filled them since they were copied."""
        connection = await self._forward.connect(self.new, role=self._provisioning.names.owner)
        try:
            for row in await connection.fetch(MATERIALIZED):
                with suppress(*SERVER_FAILURES):
                    await connection.execute(f"REFRESH MATERIALIZED VIEW {row['beside_readers']} {row['name']}")
        finally:
            await run_to_completion(connections.close(connection))

    async def undo(self, *, error: str) -> None:
        """Remove what was made before the switch; to finish an interrupted one, repeat it. The operation has failed.

        Raises:
            TenancyError: something could not be removed.
        """
        if await self._is_switched():
            raise OperationStateError(f"tenant {self._tenant.slug!r} is in its new database already")
        try:
            await self._settle(self.new, replaced=False)
        finally:
            await self._forward.drop()
        await self._reverse.drop()
        await self._identify(self.old, self._operation.detail.get("identities", {}), full=False)
        await self._drop_database(self.new)
        await self._services.operations.finish(self._operation, self._services.claimant, "failed", error=error)

    async def _drop_database(self, place: Placement) -> None:
        for beside in await self._provisioning.registry.databases_of(self._tenant.id):
            if (beside.server, beside.name) == (place.server, place.database):
                await self._services.provisioner.new_databases.drop(beside)

    # --- back, and confirmed ----------------------------------------------------------------------------------------

    async def roll_back(self) -> Tenant:
        """Go back to the old database, which has followed the new one: nothing that was written since is lost.

        Raises:
            OperationStateError: the old database does not follow.
            OperationError: the schema has changed since, or the old database did not catch up; the tenant stays.
        """
        check_way_back(self._operation)
        async with self._services.operations.keep(self._operation, self._services.claimant):
            await self._refuse_stale()
            await self._advance("rolling_back")
            try:
                await self._switch_back()
            except BaseException:
                if not await run_to_completion(self._is_switched()):
                    raise
                await run_to_completion(self._stay())
                raise
            return await self.finish_roll_back()

    async def _stay(self) -> None:
        await self._settle(self.old, replaced=True)
        await self._services.operations.finish(self._operation, self._services.claimant, "waiting")

    async def _switch_back(self) -> None:
        back = self._reverse
        async with _Four(back, self.new, self.old, self._provisioning.names.owner) as four:
            await lock_migrations(four.from_admin, timeout=self._provisioning.config.provisioning.timeout)
            found = await self._look(four.from_admin)
            expected = await self._read(self.old, four.to_admin)
            remedy = "since its move: {}; confirm that, and move the tenant back"
            await self._refuse_other_schema(four.from_admin, expected, remedy=remedy)
            await back.wait(four.from_admin, timeout=self._config.timeout)
            async with self._pause() as paused:
                await self._refuse_prepared(four.from_admin)
                await asyncio.gather(
                    back.wait(four.from_admin, timeout=self._config.pause_seconds),
                    copy_sequences(four.from_owner, four.to_owner),
                )
                await self._carry(four, found)
                await self._renew_password(paused.tenant, self.old)
                mark = marker_text(self._provisioning.installation, paused.tenant.id)
                await databases.set_marker(four.to_admin, self.old.database, mark)
                await self._to(paused, self.old, action="tenant.move_back")

    async def finish_roll_back(self) -> Tenant:
        """Do what follows the switch back; to finish an interrupted one, repeat it. The operation is undone then."""
        tenant = await self._settle(self.new, replaced=True)
        await self._reverse.drop()
        await self._drop_database(self.new)
        await self._services.operations.finish(self._operation, self._services.claimant, "undone")
        return tenant

    async def confirm(self) -> None:
        """End the way back: the former database is dropped. To finish an interrupted one, repeat it.

        Raises:
            TenancyError: a server does not answer.
        """
        async with self._services.operations.keep(self._operation, self._services.claimant):
            await self._refuse_stale()
            await self._confirm()

    async def _confirm(self) -> None:
        await self._advance("confirming")
        await self._reverse.drop()
        await self._identify(self.new, self._operation.detail.get("identities", {}), full=False)
        await self._drop_database(self.old)
        await self._services.operations.finish(self._operation, self._services.claimant, "done")

    async def give_up_return(self, reason: str) -> None:
        """End the way back, but keep the former database: its slot would fill the disk."""
        await self._reverse.drop()
        await self._services.operations.finish(
            self._operation, self._services.claimant, "waiting", detail={"reverse": reason}
        )

    async def kept_bytes(self) -> int | None:
        """How much of its log the new server keeps for the way back; None where that is lost."""
        return await self._reverse.kept_bytes()

    async def failing(self) -> Failing | None:
        """What the former database fails to apply; None where it fails at nothing, or does not answer."""
        try:
            return await self._reverse.failing()
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.debug("the former database of tenant %s is not reached: %s", self._tenant.slug, describe(exc))
            return None

    async def note_failing(self, found: Failing) -> None:
        """Write down that the former database fails, to compare with when it is looked at again."""
        await self._services.operations.finish(
            self._operation, self._services.claimant, "waiting", detail={"failing": found.fields()}
        )

    async def give_up_slot(self, most: int) -> bool:
        """End the way back where the new server keeps more of its log for it, in bytes; returns whether it did.

        For a move that cannot go on, since its former server does not answer: its slot would fill the disk.
        """
        kept = await self._reverse.kept_bytes()
        if kept is None or kept <= most:
            return False
        await self._reverse.drop_source()
        await self._note(self._operation.step, reverse=FULL.format(kept=kept))
        return True

    async def resume(self) -> None:
        """Finish or undo a move that another process has left, by the step and by where the tenant is.

        Raises:
            TenancyError: a server does not answer; try again.
        """
        async with self._services.operations.keep(self._operation, self._services.claimant):
            await self._refuse_stale()
            step, switched = self._operation.step, await self._is_switched()
            if step == "confirming":
                await self._confirm()
            elif step == "rolling_back":
                await (self._stay() if switched else self.finish_roll_back())
            elif switched:
                await self.finish_switch()
            else:
                await self.undo(error=f"the process that did it has ended at step {step!r}")


def check_way_back(operation: Operation) -> None:
    """Refuse to roll a move back if its former database does not follow.

    Raises:
        OperationStateError: it does not.
    """
    if (known := operation.detail.get("reverse")) != "following":
        raise OperationStateError(
            f"move {operation.id} of tenant {operation.slug!r} cannot be rolled back, since its former database does "
            f"not follow ({known}); confirm it, and move the tenant back: tenancy move {operation.slug} --to "
            f"{operation.detail['from']['server']}"
        )


class _Four:
    """Connections to both databases, opened before a pause to be used in it: as the owner, and as the administrator."""

    from_owner: Connection
    from_admin: Connection
    to_owner: Connection
    to_admin: Connection

    def __init__(self, stream: Stream, source: Placement, target: Placement, owner: str) -> None:
        self._stream = stream
        self._source = source
        self._target = target
        self._owner = owner
        self._opened: list[Connection] = []

    async def __aenter__(self) -> Self:
        try:
            self.from_owner = await self._open(self._source, self._owner)
            self.from_admin = await self._open(self._source, None)
            self.to_owner = await self._open(self._target, self._owner)
            self.to_admin = await self._open(self._target, None)
        except BaseException:
            await run_to_completion(self._close())
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await run_to_completion(self._close())

    async def _open(self, place: Placement, role: str | None) -> Connection:
        self._opened.append(await self._stream.connect(place, role=role, settings=TEXTS))
        return self._opened[-1]

    async def _close(self) -> None:
        await asyncio.gather(*(connections.close(one) for one in self._opened))


__all__ = ["FULL", "Move", "MoveServices", "Tell", "check_way_back"]
