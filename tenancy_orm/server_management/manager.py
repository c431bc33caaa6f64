"""``ServerManager``: add, change, drain and remove the servers that hold tenants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..config import ServerAddresses, TenancyConfig
from ..config.placement import PlacementRequest, check_region
from ..connections import ConnectionLeases
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..errors import ConfigurationError, ProvisioningError, UnknownServerError
from ..provisioning.provisioner import Provisioner
from ..registry.registry import Registry
from ..servers import Servers
from ..servers.placement import PlacementExplanation, Placer
from ..servers.rows import ServerRow, list_servers
from ..servers.sealed import SealedAddresses
from ..tenant import Tenant
from .check import refuse_known_cluster, verify
from .fields import UNSET, Unset, check_fields, check_name, read_addresses
from .known_servers import KnownServer, describe
from .new_addresses import NewAddresses
from .records import ServerRecords, already_there


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
        self._config = config
        self._control = control
        self._records = ServerRecords(control, audit)
        self._servers = servers
        self._addresses = addresses
        self._new_addresses = NewAddresses(config, servers, addresses, embedded=embedded)
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
            raise already_there(name)
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
        values |= self._new_addresses.columns(server, given, facts)
        after = await self._records.add(name, values, same_cluster=same_cluster, actor=actor)
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
            if addresses is not None:
                raise ConfigurationError(f"give addresses, or take those of the settings, not both: server {name!r}")
            addresses = self._new_addresses.of_settings(name)
        others = {
            "tenants": tenants_address,
            "replicas": replicas if isinstance(replicas, Unset) else tuple(replicas),
            "peer": peer_address,
        }
        further = {kind: address for kind, address in others.items() if address is not UNSET}
        keeps = isinstance(addresses, str) or bool(further)
        if keeps:
            addresses = self._new_addresses.complete(rows[name], addresses, further, accept_identity=accept_identity)
        if addresses is not None or accept_identity:
            values |= await self._new_addresses.verify(rows, name, addresses, accept_identity=accept_identity)
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
        await self._records.refuse_tenants(name)
        if templates == "drop":
            await self._provisioner.templates.drop_all(name, actor=actor)
            if errors := (await self._provisioner.warm_pool.drain(servers=[name])).errors:
                raise ProvisioningError(f"the warm pool could not be emptied: {errors[0]}", step="drain")
        await self._records.remove(name, forget=templates == "forget", actor=actor)
        await self._servers.refresh()

    async def _change(
        self, name: str, action: str, values: dict[str, Any], actor: Actor, *, based_on: ServerRow | None = None
    ) -> ServerRow:
        after = await self._records.change(name, action, values, actor=actor, based_on=based_on)
        await self._servers.refresh()
        return after

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


__all__ = ["ServerManager"]
