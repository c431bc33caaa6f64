"""A PostgreSQL database of its own for every tenant, as easy and as fast as having one."""

from .audit.actor import Actor
from .config import Limit, TenancyConfig, Tier, TierPolicy
from .context import current_tenant, current_tenant_or_none
from .correlation import current_request_id
from .errors import TenancyError
from .prefixes import tenant_prefix
from .tenancy import Tenancy
from .tenant import Status, Tenant

__all__ = [
    "Actor",
    "Limit",
    "Status",
    "Tenancy",
    "TenancyConfig",
    "TenancyError",
    "Tenant",
    "Tier",
    "TierPolicy",
    "current_request_id",
    "current_tenant",
    "current_tenant_or_none",
    "tenant_prefix",
]
