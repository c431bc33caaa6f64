"""The objects of an open ``Tenancy`` that migrations use."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import TenancyConfig
from ..control.names import Names
from ..events import EventBus
from ..provisioning import Provisioner
from ..registry.registry import Registry
from ..servers import Servers


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetServices:
    """The services of an open ``Tenancy`` that migrations use."""

    config: TenancyConfig
    registry: Registry
    servers: Servers
    names: Names
    provisioner: Provisioner
    events: EventBus
