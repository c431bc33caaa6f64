"""``ServerManager``: add, change, drain and remove the servers that hold tenants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..config import ServerAddresses, TenancyConfig
from ..config.placement import PlacementRequest, check_region
from ..connections import ConnectionLeases
from ..connections.rows import forget_server
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..control.models import servers as table
from ..control.models import templates as template_table
from ..control.models import tenant_databases, tenants, warm_databases
from ..errors import (
    ConfigurationError,
    PlacementError,
    ProvisioningError,
    SecretError,
    ServerIdentityError,
    UnknownServerError,
)
from ..postgres.errors import sqlstate_of
from ..registry.databases import FORGET_DATABASE
from ..registry.registry import Registry
from ..servers import Server, Servers
from ..servers.identity import differ
from ..servers.placement import PlacementExplanation, Placer
from ..servers.rows import COLUMNS, ServerRow, list_servers
from ..servers.sealed import SealedAddresses
from ..servers.server import ServerFacts
from ..tenant import Status, Tenant
from .known_servers import KnownServer, describe
from .provisioner import Provisioner
from .server_check import refuse_known_cluster, verify
from .server_fields import (
    UNSET,
    Unset,
    audited,
    check_fields,
    check_name,
    read_addresses,
)

_REFUSED_BY_TRIGGER = "TN003"


class ServerManager:
    """Adds, changes, drains and removes the servers that hold tenants; ``tenancy.servers``.

    Every process follows by notification. Every change is audited in the same transaction, under ``actor``, and no
    entry has a password.
    """

    def __init__(
        self,
        *,
        config: TenancyConfig,
        control: ControlDatabase,
        audit: AuditLog,
        servers: Servers,
        addresses: SealedAddresses,
        registry: Registry,
        provisioner: Provisioner,
        placer: Placer,
        leases: ConnectionLeases,
        embedded: bool = False,
    ) -> None:
        self._embedded = embedded
        self._config = config
        self._control = control
        self._audit = audit
        self._servers = servers
        self._addresses = addresses
        self._registry = registry
        self._provisioner = provisioner
        self._placer = placer
        self._leases = leases

    # --- adding -----------------------------------------------------------------------------------------------------

    async def add(
        self,
        name: str,
        addresses: ServerAddresses | str,
        *,
        region: str | None = None,
        labels: Mapping[str, str] | None = None,
        capacity: int | None = None,
        weight: float = 1.0,
        drain: bool = False,
        max_connections: int | None = None,
        max_opening: int | None = None,
        same_cluster: bool = False,
        actor: Actor = SYSTEM,
    ) -> ServerRow:
        """Add a server, once it was seen to answer and was prepared as ``tenancy init`` does.

        Args:
            name: Its name: 1 to 31 of a-z, 0-9, _ and -, from a letter. It cannot be changed.
            addresses: Its administrative URL, or all of its addresses. They are sealed in its row.
            region: Where it is, as tenants name it.
            labels: What else a placement policy may want to know, text by name.
            capacity: How many tenants it may hold, deleted ones too; None: any number.
            weight: Its share of new tenants, in proportion to the weights of the others.
            drain: Add it in drain: it takes no tenants until it is activated.
            max_connections: How many connections all processes together may have; None: as many as the server offers.
            max_opening: How many connections may be opened at once.
            same_cluster: Accept a cluster that is a server already, by another name.
            actor: Who does this, for the audit log.

        Raises:
            ConfigurationError: there is a server of this name or of this cluster, an argument is malformed, PostgreSQL
                is too old or its administrator lacks rights, or somebody would lose access to a database there. A
                ``PoolerError`` where its administrative address leads to a connection pooler.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
            ProvisioningError: the server could not be prepared.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("adding a server")
        check_name(name)
        given = read_addresses(addresses)
        values = check_fields(
            region=region,
            labels=labels or {},
            capacity=capacity,
            weight=weight,
            max_connections=max_connections,
            max_opening=max_opening,
        )
        values["state"] = "drain" if drain else "active"
        rows = {row.name: row for row in await list_servers(self._control)}
        if name in rows:
            raise _exists(name)
        server = self._servers.make(name, given)
        try:
            facts = await verify(server)
            if not same_cluster:
                refuse_known_cluster(name, facts.identity, rows.values())
            await self._provisioner.prepare(server)
            if facts.identity is None:
                facts = await verify(server)  # the preparation has left a marker
        finally:
            await server.close()
        values |= self._address_values(server, given, facts)
        async with self._control.transaction() as connection:
            if not same_cluster:
                await self._lock_table(connection)
                await self._refuse_known_cluster(connection, name, facts.identity)
            statement = insert(table).values(name=name, **values).on_conflict_do_nothing()
            if not (await connection.execute(statement)).rowcount:
                raise _exists(name)
            after = await self._lock(connection, name)
            await self._write_audit(connection, "server.add", name, actor, None, after)
        await self._servers.refresh()
        return after

    # --- finding ----------------------------------------------------------------------------------------------------

    async def get(self, name: str) -> KnownServer:
        """Return a server.

        Raises:
            UnknownServerError: there is none of this name.
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        for found in await self.list():
            if found.name == name:
                return found
        raise UnknownServerError(name)

    async def explain(
        self,
        tenant: str | Tenant | None = None,
        *,
        tier: str | None = None,
        region: str | None = None,
        server: str | None = None,
    ) -> PlacementExplanation:
        """Say on which server a tenant would be placed now, and why not on the others.

        Args:
            tenant: An existing tenant, with the tier and region that it has; a new one where None.
            tier: The tier, in place of the tenant's own; ``default_tier`` for a new one where None.
            region: The region, in place of the tenant's own.
            server: The server that would be asked for.

        Raises:
            TenantNotFoundError: there is no such tenant.
            ConfigurationError: an argument is malformed, or the policy returned what is no verdict.
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("explaining a placement")
        found = None if tenant is None else await self._registry.find(tenant)
        wanted = region if region is not None else None if found is None else found.region
        request = PlacementRequest(
            tier=tier or (self._config.default_tier if found is None else found.tier),
            region=None if wanted is None else check_region(wanted),
            slug=None if found is None else found.slug,
            metadata={} if found is None else found.metadata,
        )
        current = None if found is None or found.placement is None else found.placement.server
        return await self._placer.explain(request, server=server, current=current)

    # --- changes ----------------------------------------------------------------------------------------------------

    async def update(
        self,
        name: str,
        *,
        addresses: ServerAddresses | str | None = None,
        tenants_address: str | Unset | None = UNSET,
        replicas: Sequence[str] | Unset = UNSET,
        peer_address: str | Unset | None = UNSET,
        from_settings: bool = False,
        accept_identity: bool = False,
        region: str | Unset | None = UNSET,
        labels: Mapping[str, str] | Unset = UNSET,
        capacity: int | Unset | None = UNSET,
        weight: float | Unset = UNSET,
        max_connections: int | Unset | None = UNSET,
        max_opening: int | Unset | None = UNSET,
        actor: Actor = SYSTEM,
    ) -> ServerRow:
        """Change a server; what is not given stays.

        Where its addresses change, open connections to the former ones are closed as they are returned.

        Args:
            name: Its name.
            addresses: Its new addresses, or its administrative URL alone, which is verified first. From now on they
                are in its row: no process looks for them in its settings any more.
            tenants_address: Where tenants' sessions connect to; None: the host of the administrative URL.
            replicas: The addresses of all of its replicas.
            peer_address: Where other servers reach it; None: the address of the administrative URL.
            from_settings: Take the addresses from this process's settings.
            accept_identity: Accept another cluster than the one that it was until now: the databases of its tenants
                were moved there.
            region: Where it is. Tenants of another region must not be there.
            labels: All of its labels.
            capacity: How many tenants it may hold; one that is below what it holds keeps further ones away.
            weight: Its share of new tenants.
            max_connections: How many connections all processes together may have. Fewer than there are processes is a
                warning in the log.
            max_opening: How many connections may be opened at once.
            actor: Who does this, for the audit log.

        Raises:
            UnknownServerError: there is none of this name.
            ConfigurationError: an argument is malformed; the new address has another maintenance database; or it is
                another server already. A ``PlacementError`` where tenants of another region are there.
            ServerIdentityError: the new address leads to another cluster.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("changing a server")
        values = check_fields(
            region=region,
            labels=labels,
            capacity=capacity,
            weight=weight,
            max_connections=max_connections,
            max_opening=max_opening,
        )
        rows = {row.name: row for row in await list_servers(self._control)}
        if name not in rows:
            raise UnknownServerError(name)
        if from_settings:
            if addresses is not None or name not in self._config.server_addresses:
                raise ConfigurationError(
                    f"give addresses, or take those of the settings, not both: server {name!r}"
                    if addresses is not None
                    else f"server {name!r} is not in the settings of this process"
                )
            addresses = self._config.server_addresses[name]
        given = (tenants_address, replicas, peer_address)
        keeps = isinstance(addresses, str) or any(one is not UNSET for one in given)
        if keeps:
            moves = accept_identity and isinstance(addresses, str)
            addresses = self._with_present(rows[name], addresses, tenants_address, replicas, peer_address)
            kept = [
                option
                for option, value, new in (
                    ("--tenants", addresses.tenants, tenants_address),
                    ("--replica", addresses.replicas, replicas),
                    ("--peer", addresses.peer, peer_address),
                )
                if value and isinstance(new, Unset)
            ]
            if moves and kept:
                # a pooler in front of the former cluster would go on writing there
                raise ConfigurationError(
                    f"server {name!r} has other addresses, which may lead to the former cluster: give "
                    f"{' and '.join(kept)} as well, '' for none"
                )
        if addresses is not None or accept_identity:
            values |= await self._new_addresses(rows, name, addresses, accept_identity=accept_identity)
        after = await self._change(name, "server.update", values, actor, based_on=rows[name] if keeps else None)
        if values.get("max_connections") is not None:
            await self._leases.warn_of_cap(name)
        return after

    async def drain(self, name: str, *, actor: Actor = SYSTEM) -> ServerRow:
        """Place no new tenants on a server. Those that it has stay and are served.

        Raises:
            UnknownServerError: there is none of this name.
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("draining a server")
        return await self._change(name, "server.drain", {"state": "drain"}, actor)

    async def activate(self, name: str, *, actor: Actor = SYSTEM) -> ServerRow:
        """Let a server in drain take tenants again.

        Raises:
            UnknownServerError, ControlUnavailableError, CrossTenantError: as ``drain``.
        """
        refuse_while_bound("activating a server")
        return await self._change(name, "server.activate", {"state": "active"}, actor)

    async def remove(
        self, name: str, *, templates: Literal["refuse", "drop", "forget"] = "refuse", actor: Actor = SYSTEM
    ) -> None:
        """Remove the row of a server that holds no tenants any more. Put it in drain before.

        Args:
            name: Its name.
            templates: "drop" drops its templates and warm databases first; "forget" leaves them there, for a server
                that does not exist any more.
            actor: Who does this, for the audit log.

        Raises:
            UnknownServerError: there is none of this name.
            ConfigurationError: it holds tenants, deleted ones count too until they are purged, their former databases,
                templates or warm databases; or the settings of this process have its address, which would add it again.
            ProvisioningError: a warm database could not be dropped.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("removing a server")
        if self._config.servers is not None and name in self._config.servers:
            raise ConfigurationError(
                f"server {name!r} is in servers, the setting, so that the next opening would add it again: take it out "
                "of the settings of every process first"
            )
        async with self._control.transaction() as connection:
            await self._lock(connection, name)
            await self._refuse_tenants(connection, name)
        if templates == "drop":
            await self._provisioner.templates.drop_all(name, actor=actor)
            if errors := (await self._provisioner.warm_pool.drain(servers=[name])).errors:
                raise ProvisioningError(f"the warm pool could not be emptied: {errors[0]}", step="drain")
        async with self._control.transaction() as connection:
            # no tenant is placed on it that this does not see
            before = await self._lock(connection, name, removing=True)
            await self._refuse_tenants(connection, name)
            for kind, of_server in (("template", template_table), ("warm database", warm_databases)):
                recorded = of_server.c.server == name
                if templates == "forget":
                    await connection.execute(delete(of_server).where(recorded))
                elif held := await connection.scalar(select(func.count()).select_from(of_server).where(recorded)):
                    raise ConfigurationError(
                        f"server {name!r} has {held} {kind}{'s' * (held != 1)}; drop them as well: "
                        f"tenancy servers remove {name} --drop-templates; if the server does not exist any more: "
                        "--forget-templates"
                    )
            beside = tenant_databases.c.server == name
            if templates == "forget":
                columns = tenant_databases.c
                gone = delete(tenant_databases).where(beside).returning(columns.tenant_id, columns.name)
                for tenant_id, database in (await connection.execute(gone)).all():
                    # the certificate of the tenant's erasure says so
                    await self._audit.append(
                        connection,
                        action=FORGET_DATABASE,
                        tenant_id=tenant_id,
                        slug=await connection.scalar(select(tenants.c.slug).where(tenants.c.id == tenant_id)),
                        actor=actor,
                        detail={"server": name, "database": database},
                    )
            elif held := await connection.scalar(select(func.count()).select_from(tenant_databases).where(beside)):
                raise ConfigurationError(
                    f"server {name!r} has {held} database{'s' * (held != 1)} that a move or a restore has left there; "
                    "confirm the moves (tenancy move TENANT --confirm), or wait until housekeeping drops them; if the "
                    "server does not exist any more: --forget-templates"
                )
            await connection.execute(delete(table).where(table.c.name == name))
            await forget_server(connection, name)
            await self._write_audit(connection, "server.remove", name, actor, before, None)
        await self._servers.refresh()

    # --- parts ------------------------------------------------------------------------------------------------------

    async def _new_addresses(
        self,
        rows: Mapping[str, ServerRow],
        name: str,
        addresses: ServerAddresses | str | None,
        *,
        accept_identity: bool,
    ) -> dict[str, Any]:
        """Verify the addresses of a server, the present ones where None, and return what changes in its row."""
        row = rows[name]
        if self._embedded and name == "default":
            raise ConfigurationError(
                "server 'default' is the embedded one: its address changes with its starts, so it is not kept in a row"
            )
        given = self._present_addresses(row) if addresses is None else read_addresses(addresses)
        # without its row, by which it would refuse another cluster
        server = self._servers.make(name, given)
        try:
            facts = await verify(server)
        finally:
            await server.close()
        if row.maintenance_database not in (None, facts.database):
            raise ConfigurationError(
                f"the new address names the database {facts.database!r}, and locks on server {name!r} are taken in "
                f"{row.maintenance_database!r}: name that one; to change it, stop every process and run: tenancy "
                f"servers set-maintenance-database {name} {facts.database}"
            )
        if row.identity not in (None, facts.identity) and not accept_identity:
            answers = (
                f"another cluster answers, {facts.identity or 'one without a marker'}, than the one that holds its "
                f"tenants, {row.identity}; if they were moved there"
                if differ(row.identity, facts.identity)
                else f"this administrator can read {facts.identity or 'nothing'} and not {row.identity}, by which the "
                "cluster that holds its tenants is known; if it is the same one"
            )
            raise ServerIdentityError(
                server=name,
                address=server.dsn.address(),
                reason=f"{answers}, repeat this with --accept-identity (accept_identity=True)",
            )
        if differ(row.identity, facts.identity):
            refuse_known_cluster(name, facts.identity, rows.values())
        if addresses is None:
            return {"identity": facts.identity}
        return self._address_values(server, given, facts)

    def _present_addresses(self, row: ServerRow) -> ServerAddresses:
        if row.sealed_addresses is not None:
            return self._addresses.open(row)
        if row.name not in self._config.server_addresses:
            raise UnknownServerError(row.name)
        return self._config.server_addresses[row.name]

    def _with_present(
        self,
        row: ServerRow,
        addresses: ServerAddresses | str | None,
        tenants_address: str | Unset | None,
        replicas: Sequence[str] | Unset,
        peer_address: str | Unset | None,
    ) -> ServerAddresses:
        """Return the addresses with those that the server has, where they are not given."""
        try:
            found = addresses if isinstance(addresses, ServerAddresses) else self._present_addresses(row)
        except (SecretError, UnknownServerError):
            if addresses is None:
                raise
            found = read_addresses(addresses)  # nobody can read the others any more
        changes: dict[str, Any] = {} if addresses is None else {"admin": read_addresses(addresses).admin}
        if not isinstance(tenants_address, Unset):
            changes["tenants"] = tenants_address
        if not isinstance(replicas, Unset):
            changes["replicas"] = tuple(replicas)
        if not isinstance(peer_address, Unset):
            changes["peer"] = peer_address
        kinds = ("admin", "tenants", "replicas", "peer")
        return read_addresses({**{kind: getattr(found, kind) for kind in kinds}, **changes})

    def _address_values(self, server: Server, given: ServerAddresses, facts: ServerFacts) -> dict[str, Any]:
        return {
            "host": server.host,
            "port": server.port,
            "maintenance_database": facts.database,
            "identity": facts.identity,
            "sealed_addresses": self._addresses.seal(server.name, given),
        }

    async def _change(
        self, name: str, action: str, values: dict[str, Any], actor: Actor, *, based_on: ServerRow | None = None
    ) -> ServerRow:
        async with self._control.transaction() as connection:
            if "identity" in values:
                await self._lock_table(connection)
            before = await self._lock(connection, name)
            if based_on is not None and before.sealed_addresses != based_on.sealed_addresses:
                raise ConfigurationError(f"the addresses of server {name!r} were changed at the same time: try again")
            if values:
                if differ(before.identity, values.get("identity", before.identity)):
                    await self._refuse_known_cluster(connection, name, values["identity"])
                try:
                    await connection.execute(update(table).where(table.c.name == name).values(**values))
                except DBAPIError as exc:
                    if sqlstate_of(exc) != _REFUSED_BY_TRIGGER:
                        raise
                    raise PlacementError(
                        f"server {name!r} holds tenants of region {before.region!r}: move or purge them first"
                    ) from exc
            after = await self._lock(connection, name)
            if after != before:
                await self._write_audit(connection, action, name, actor, before, after)
        await self._servers.refresh()
        return after

    async def _lock_table(self, connection: AsyncConnection) -> None:
        """Let nobody else add or change a server until this is committed; placements, which lock a row, do not wait."""
        await connection.execute(text("LOCK TABLE tenancy.servers IN SHARE ROW EXCLUSIVE MODE"))

    async def _lock(self, connection: AsyncConnection, name: str, *, removing: bool = False) -> ServerRow:
        query = select(*COLUMNS).where(table.c.name == name).with_for_update(key_share=not removing)
        row = (await connection.execute(query)).mappings().one_or_none()
        if row is None:
            raise UnknownServerError(name)
        return ServerRow(**row)

    async def _refuse_known_cluster(self, connection: AsyncConnection, name: str, identity: str | None) -> None:
        """Refuse a cluster that became a server, by another name, while this one was verified."""
        rows = (await connection.execute(select(*COLUMNS))).mappings()
        refuse_known_cluster(name, identity, [ServerRow(**row) for row in rows])

    async def _refuse_tenants(self, connection: AsyncConnection, name: str) -> None:
        query = select(func.count(), func.min(tenants.c.slug)).where(
            tenants.c.server == name, tenants.c.status != Status.PURGED
        )
        count, slug = (await connection.execute(query)).one()
        if count:
            raise ConfigurationError(
                f"server {name!r} holds {count} tenant{'s' * (count != 1)}, {slug!r} for example; deleted ones count "
                "until they are purged"
            )

    async def _write_audit(
        self,
        connection: AsyncConnection,
        action: str,
        name: str,
        actor: Actor,
        before: ServerRow | None,
        after: ServerRow | None,
    ) -> None:
        old, new = audited(before), audited(after)
        moved = before is not None and after is not None and before.sealed_addresses != after.sealed_addresses
        if before is not None and after is not None:
            changed = [field for field in new if old[field] != new[field]]
            old, new = {field: old[field] for field in changed}, {field: new[field] for field in changed}
        await self._audit.append(
            connection,
            action=action,
            actor=actor,
            before=old or None,
            after=new or None,
            detail={"server": name, **({"addresses": "changed"} if moved else {})},
        )

    # the last method: in the class, the name hides the type from annotations below it
    async def list(self) -> list[KnownServer]:
        """Return all servers, by name.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("listing servers")
        rows = await list_servers(self._control)
        by_identity: dict[str, list[str]] = {}
        for row in rows:
            if row.identity is not None:
                by_identity.setdefault(row.identity, []).append(row.name)
        return [
            describe(
                row,
                by_identity.get(row.identity or "", ()),
                config=self._config,
                servers=self._servers,
                addresses=self._addresses,
            )
            for row in rows
        ]


def _exists(name: str) -> ConfigurationError:
    return ConfigurationError(f"there is a server {name!r} already; change it: tenancy servers update {name}")


__all__ = ["ServerManager"]
