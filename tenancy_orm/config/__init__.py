"""Configuration: ``TenancyConfig``, its sections, tiers, and where settings are read from."""

from .addresses import ServerAddresses
from .sections import (
    BreakerConfig,
    ControlConfig,
    DirectoryConfig,
    DomainConfig,
    KeyConfig,
    LockoutConfig,
    MembersConfig,
    MeteringConfig,
    MigrationConfig,
    PoolConfig,
    ProvisioningConfig,
    QuotaConfig,
    ReferenceTable,
    RetentionConfig,
    SecretsConfig,
    SessionConfig,
    WatchdogConfig,
)
from .settings import TenancyConfig
from .tiers import Limit, Tier, TierPolicy

__all__ = [
    "BreakerConfig",
    "ControlConfig",
    "DirectoryConfig",
    "DomainConfig",
    "KeyConfig",
    "Limit",
    "LockoutConfig",
    "MembersConfig",
    "MeteringConfig",
    "MigrationConfig",
    "PoolConfig",
    "ProvisioningConfig",
    "QuotaConfig",
    "ReferenceTable",
    "RetentionConfig",
    "SecretsConfig",
    "ServerAddresses",
    "SessionConfig",
    "TenancyConfig",
    "Tier",
    "TierPolicy",
    "WatchdogConfig",
]
