"""A PostgreSQL database of its own for every tenant, as easy and as fast as having one."""

from __future__ import annotations

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from .audit.actor import Actor
    from .config import Limit, TenancyConfig, Tier, TierPolicy
    from .context import current_tenant, current_tenant_or_none
    from .correlation import current_request_id
    from .deadlines import deadline
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
    "deadline",
    "tenant_prefix",
]

# Imported when they are asked for: every run of pytest where this package is installed imports its plugin, and so this
# file, and most of these runs have nothing to do with tenants.
_MODULES = {
    "Actor": "audit.actor",
    "Limit": "config",
    "Status": "tenant",
    "Tenancy": "tenancy",
    "TenancyConfig": "config",
    "TenancyError": "errors",
    "Tenant": "tenant",
    "Tier": "config",
    "TierPolicy": "config",
    "current_request_id": "correlation",
    "current_tenant": "context",
    "current_tenant_or_none": "context",
    "deadline": "deadlines",
    "tenant_prefix": "prefixes",
}

if not _typing.TYPE_CHECKING:  # a checker that saw it would take every misspelt name for one

    def __getattr__(name: str) -> _typing.Any:
        """Import a public name, or a module that has some: ``tenancy_orm.errors``, as type checkers know it."""
        if name in {module.partition(".")[0] for module in _MODULES.values()}:
            return _importlib.import_module(f"{__name__}.{name}")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """The public names, imported or not."""
        return sorted({*globals(), *__all__})
