"""A ``Tenancy`` opened again in another event loop, for one test: what was found out before is not asked again.

An opening checks the control database, the keys and the servers, and starts to listen for what other processes change.
That takes three connections and some twenty questions. For the next test the answers are the same; and no other process
changes the tenants of this one. Every connection to a tenant is checked as ever.
"""

from __future__ import annotations

import copy

from ..assembly import Assembly
from ..audit.checkpoints import Signer
from ..audit.log import AuditLog
from ..config import TenancyConfig
from ..control.database import ControlDatabase
from ..control.names import Names
from ..events import EventBus
from ..loops import HomeLoop
from ..postgres.dsn import Dsn
from ..quotas.rates import Rates
from ..secrets.keyring import Keyring
from ..servers import Servers
from ..tenants.tiers import TierRegistry


class ReopenedAssembly(Assembly):
    """The parts of a ``Tenancy`` in another event loop.

    Args:
        first: The parts as they were opened first, in this process.
        config: The configuration that these were opened with.
        events: As for ``Assembly``.
        rates: As for ``Assembly``.
    """

    def __init__(self, first: Assembly, config: TenancyConfig, events: EventBus, rates: Rates) -> None:
        super().__init__(config, events, rates, None, first._registered_seeds)
        self._first = first

    @classmethod
    async def of(cls, first: Assembly, events: EventBus, rates: Rates) -> ReopenedAssembly:
        """Open the parts again in the running event loop."""
        parts = cls(first, first.config, events, rates)
        try:
            await parts._open(False)
        except BaseException:
            await parts.close()
            raise
        return parts

    async def _open(self, initialise: bool) -> None:
        first, config = self._first, self.config
        dsn = Dsn.parse(config.control_url)
        self.control = ControlDatabase(
            dsn,
            pool_size=config.control.pool_size,
            connect_timeout=dsn.connect_timeout or config.pool.connect_timeout,
            name_prefix=config.name_prefix,
            pooled=False,
        )
        self.control._installation, self.control._viewer = first.control.installation, first.control._viewer
        self._opened.append(self.control.close)
        self.servers = _copied(first.servers, config)
        self._opened.append(self.servers.close)
        self.compatibility = first.compatibility
        self.keyring = Keyring(config.sealing_keys)
        self.names = Names(config.name_prefix, self.control.installation)
        self.signer = Signer(config.sealing_keys)
        self.audit = AuditLog(self.control, self.signer)
        self._follow_servers()
        self._build_parts()
        self.leases.open_like(first.leases)
        self.tiers = TierRegistry(self.control, self.audit)
        self._share_what_is_known(first)
        self._opened.append(self.directory.close)
        self.directory._journal.open()
        self.directory.admissions.open()

    def _share_what_is_known(self, first: Assembly) -> None:
        for name, known in first.router._connectors.items():
            connector = self.router._connector(name)
            if known._shared.ready:
                connector._shared, connector.dialect, connector.on_connect = (
                    known._shared,
                    known.dialect,
                    known.on_connect,
                )
            connector.compiled_cache = known.compiled_cache
        mine, known_templates = self.provisioner._templates, first.provisioner._templates
        mine._ready, mine._recorded, mine._contents = (
            known_templates._ready,
            known_templates._recorded,
            known_templates._contents,
        )
        self.provisioner._prepared._settings = first.provisioner._prepared._settings


def _copied(servers: Servers, config: TenancyConfig) -> Servers:
    """The same servers, with what is known of them, for the running event loop."""
    made = Servers(config)
    made._servers, made._addresses = {}, dict(servers._addresses)
    for name, server in servers.items():
        mine = copy.copy(server)
        mine.home, mine._reading = HomeLoop(), None
        made._servers[name] = mine
    return made


__all__ = ["ReopenedAssembly"]
