"""A PostgreSQL database of its own for every tenant, as easy and as fast as having one."""

from .config import Limit, TenancyConfig, Tier, UpgradePolicy
from .context import Status, Tenant, current_tenant, current_tenant_or_none
from .control.audit import Actor
from .errors import TenancyError
from .tenancy import Tenancy

__all__ = [
    "Actor",
    "Limit",
    "Status",
    "Tenancy",
    "TenancyConfig",
    "TenancyError",
    "Tenant",
    "Tier",
    "UpgradePolicy",
    "current_tenant",
    "current_tenant_or_none",
]
