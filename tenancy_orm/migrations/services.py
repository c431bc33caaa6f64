"""The objects of an open ``Tenancy`` that migrations use."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import TenancyConfig
from ..control.database import ControlDatabase
from ..control.names import Names
from ..events import EventBus
from ..provisioning import Provisioner
from ..provisioning.templates.building import SchemaSource
from ..registry.registry import Registry
from ..secrets.keyring import Keyring
from ..servers import Servers


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetServices:
    """The services of an open ``Tenancy`` that migrations use."""

    config: TenancyConfig
    control: ControlDatabase
    keyring: Keyring
    registry: Registry
    servers: Servers
    names: Names
    provisioner: Provisioner
    schema: SchemaSource
    events: EventBus
