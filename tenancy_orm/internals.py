"""``Internals``: the machinery of an open ``Tenancy``, under one name."""

from __future__ import annotations

from dataclasses import dataclass

from .authentication.directory import Directory
from .connections import ConnectionLeases
from .control.database import ControlDatabase
from .errors import ConfigurationError
from .metering.metrics import StorageSampler
from .metering.policies import TierPolicies
from .metering.usage import UsageExporter
from .provisioning import Provisioner
from .quotas.rates import Rates
from .registry.registry import Registry
from .routing import Router
from .secrets.signing import TenantSigner
from .servers import Servers


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Internals:
    """The machinery of an open ``Tenancy``: ``tenancy.internals``.

    An application's requests and jobs need none of it. It is for operators' tools, and for tests that look below the
    surface.

    Attributes:
        control (ControlDatabase): Runs SQL of your own on the control database.
        registry (Registry): Reads and changes the rows of tenants, without touching their databases.
        directory (Directory): Looks up keys and tenants, and caches them; ``invalidate`` makes it look again.
        servers (Servers): The PostgreSQL servers that hold tenants, by name, with connections as their administrator.
        router (Router): Engines and connections of tenants; ``statistics`` counts them.
        leases (ConnectionLeases): This process's parts of the servers' connections; ``read`` shows those of all.
        provisioner (Provisioner): Databases, roles and templates; ``reconcile`` and the watchdog.
        sampler (StorageSampler): Samples tenants' databases now; ``run_housekeeping`` does it from time to time.
        rates (Rates): How many requests a second each tenant may make of this process.
        tier_policies (TierPolicies): Evaluates ``TenancyConfig.metering.tier_policies``, as ``run_housekeeping`` does.
        task_signer (TenantSigner): Signs the headers of task queues' messages.
    """

    control: ControlDatabase
    registry: Registry
    directory: Directory
    servers: Servers
    router: Router
    leases: ConnectionLeases
    provisioner: Provisioner
    sampler: StorageSampler
    rates: Rates
    tier_policies: TierPolicies
    task_signer: TenantSigner
    _usage_exporter: UsageExporter | None

    @property
    def usage_exporter(self) -> UsageExporter:
        """Sends the usage of ended periods to ``TenancyConfig.metering.usage_sender``, as ``run_housekeeping`` does.

        Raises:
            ConfigurationError: there is no ``metering.usage_sender``.
        """
        if self._usage_exporter is None:
            raise ConfigurationError("set metering.usage_sender to export usage")
        return self._usage_exporter


__all__ = ["Internals"]
