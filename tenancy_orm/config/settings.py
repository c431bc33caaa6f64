"""``TenancyConfig``: everything a ``Tenancy`` needs to know, in one frozen object."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ..errors import SettingError
from ..postgres.dsn import Dsn
from . import sources
from .addresses import ServerAddresses, ServerUrls
from .placement import Placement
from .recovery import RecoveryConfig
from .revisions import CompatibleRevisions
from .sections import (
    AdoptionConfig,
    BackupConfig,
    BreakerConfig,
    ControlConfig,
    DirectoryConfig,
    DomainConfig,
    ErasureConfig,
    ExportConfig,
    KeyConfig,
    LockoutConfig,
    MembersConfig,
    MeteringConfig,
    MigrationConfig,
    MoveConfig,
    PoolConfig,
    ProvisioningConfig,
    QuotaConfig,
    References,
    RehearsalConfig,
    ReplicaConfig,
    RetentionConfig,
    SecretsConfig,
    SessionConfig,
    WatchdogConfig,
    WorkerConfig,
)
from .tiers import Tiers, default_tiers
from .validation import _Checked, replaced
from .values import DirectoryPath, LoadedMetaData, NamedKeys, Names, check_url, decode_keys

_SEALING_KEY_BYTES = 32


class TenancyConfig(_Checked, BaseSettings):
    """Everything a ``Tenancy`` needs to know: what an application says about itself, and sections for tuning.

    The constructor reads its arguments alone. ``from_env`` reads a settings file and ``TENANCY_*`` variables: the
    setting ``pool.max_connections`` is the variable ``TENANCY_POOL_MAX_CONNECTIONS``.

    Raises:
        SettingError: a setting is malformed or contradicts another, or there is none of that name.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        env_prefix="TENANCY_",
        # TENANCY_POOL_MAX_CONNECTIONS is max_connections in the section pool: no section has an underscore in its name
        env_nested_delimiter="_",
        env_nested_max_split=1,
        # text is read as ``values`` says, the same in a variable, a file and an argument
        enable_decoding=False,
    )

    control_url: str = Field(repr=False, exclude=True)
    """The control database, ``postgresql://user:password@host/database``; or ``embedded`` / ``embedded:<directory>``
    for a private server, for development (extra ``embedded``)."""
    servers: ServerUrls | None = Field(default=None, repr=False, exclude=True)
    """Each PostgreSQL server that holds tenant databases, by name: its administrative URL, the role of which must be
    able to create databases and roles; or a ``ServerAddresses``, which has another address for tenants' traffic, and
    replicas. Where None, ``{"default": <the server of control_url>}``, unless there are rows of other servers
    (``tenancy servers add``). As text: ``name=url``, ``name.tenants=url``, ``name.replicas=url`` and ``name.peer=url``,
    separated by spaces or commas."""
    default_server: str | None = None
    """The server of a tenant created without one. Where None, the only server there is, or the one named "default";
    otherwise a tenant is not created without naming its server. It cannot be set together with ``placement``."""
    placement: Placement = Field(default=None, repr=False, exclude=True)
    """The policy that chooses the server of a tenant created without one, ``FewestTenants()`` for example, or a
    function. As text: ``fewest_tenants``, ``least_bytes``, ``module:attribute``, or JSON of what a settings file
    holds."""
    metadata: LoadedMetaData | None = Field(default=None, repr=False, exclude=True)
    """The application's tables, as text ``module:attribute``. Needed for autogenerate, and for templates where
    ``migrations`` is None."""
    migrations: DirectoryPath | None = None
    """Directory of the application's Alembic environment (made by ``tenancy init``). ``from_env`` reads a relative one
    as relative to the project's directory."""
    compatible_revisions: CompatibleRevisions = None
    """The revisions of ``migrations`` that the application's code can work with: a tenant at another one is not served.
    A list of revisions and ranges: ``["0012", "0013"]``, ``"head"``, ``"0012:0014"`` (both included), ``"0012:head"``
    up to this code's own head, ``"0012:"`` later ones included. From Python, also a function that takes a revision.
    Where None, every tenant is served. As text: separated by commas."""
    extensions: Names = ()
    """PostgreSQL extensions that every tenant database has: the template has them, and an upgrade installs them in
    existing databases. As text: separated by commas."""
    encryption_keys: NamedKeys | None = Field(default=None, repr=False, exclude=True)
    """Keys that seal tenants' passwords, ``{"1": <32 bytes or their base64>}``; the last one seals, all of them open.
    As text: ``id:base64``, separated by commas."""
    name_prefix: str = "tenancy"
    """What the names of databases and roles begin with; 1 to 12 of a-z and 0-9. It cannot be changed later."""
    tiers: Tiers = Field(default_factory=default_tiers, repr=False, exclude=True)
    """Tiers by name, in ascending order. As text: JSON of what a settings file holds."""
    default_tier: str = "free"
    """The tier of a tenant created without one; one of ``tiers``."""
    reference: References = Field(default_factory=lambda: MappingProxyType({}), exclude=True)
    """Tables with rows that are the same for all tenants, each a ``ReferenceTable`` by name. As text: JSON of what a
    settings file holds."""

    control: ControlConfig = Field(default_factory=ControlConfig)
    """Connections to the control database."""
    pool: PoolConfig = Field(default_factory=PoolConfig)
    """Connections of one process to the tenants' databases."""
    breaker: BreakerConfig = Field(default_factory=BreakerConfig)
    """The breaker of each server."""
    sessions: SessionConfig = Field(default_factory=SessionConfig)
    """What tenants' sessions start with."""
    replicas: ReplicaConfig = Field(default_factory=ReplicaConfig)
    """Reads on replicas."""
    directory: DirectoryConfig = Field(default_factory=DirectoryConfig)
    """The cached look-up of credentials and tenants."""
    keys: KeyConfig = Field(default_factory=KeyConfig)
    """API keys."""
    members: MembersConfig = Field(default_factory=MembersConfig)
    """Members of tenants."""
    lockout: LockoutConfig = Field(default_factory=LockoutConfig)
    """The lock-out of those who guess credentials."""
    secrets: SecretsConfig = Field(default_factory=SecretsConfig)
    """Where encryption keys and peppers come from, if not from the configuration itself."""
    provisioning: ProvisioningConfig = Field(default_factory=ProvisioningConfig)
    """How tenants' databases and roles are made."""
    migration: MigrationConfig = Field(default_factory=MigrationConfig)
    """Migrations of the tenants' databases."""
    rehearsal: RehearsalConfig = Field(default_factory=RehearsalConfig)
    move: MoveConfig = Field(default_factory=MoveConfig)
    """Clones of tenants that a migration is tried on."""
    adoption: AdoptionConfig = Field(default_factory=AdoptionConfig)
    """Existing databases, schemas and rows that become tenants."""
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)
    """What the watchdog ends of the tenants' sessions."""
    quotas: QuotaConfig = Field(default_factory=QuotaConfig)
    """Quotas and request rates."""
    metering: MeteringConfig = Field(default_factory=MeteringConfig)
    """What is done with what tenants use."""
    domains: DomainConfig = Field(default_factory=DomainConfig)
    """Tenants' own domains."""
    erasure: ErasureConfig = Field(default_factory=ErasureConfig)
    """What certificates of erasure say about copies that this package does not keep."""
    export: ExportConfig = Field(default_factory=ExportConfig)
    """Exports of tenants' data."""
    retention: RetentionConfig = Field(default_factory=RetentionConfig)
    """For how long things are kept that nobody uses any more."""
    backup: BackupConfig = Field(default_factory=BackupConfig)
    """Encrypted backups of the tenants' databases and of the control database."""
    recovery: RecoveryConfig = Field(default_factory=RecoveryConfig)
    """Servers that are recovered at a point in time."""
    worker: WorkerConfig = Field(default_factory=WorkerConfig)
    """Workers: the processes that do what is due, on any number of machines."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the arguments alone: ``from_env`` reads the rest."""
        return (init_settings,)

    @field_validator("control_url", mode="after")
    @classmethod
    def _check_control_url(cls, url: str) -> str:
        if not url:
            raise ValueError("is empty; write postgresql://user:password@host/database, or embedded")
        if not _is_embedded(url):
            check_url(url)
        return url

    @field_validator("name_prefix", mode="after")
    @classmethod
    def _check_name_prefix(cls, prefix: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9]{0,11}", prefix):
            raise ValueError("must be 1 to 12 of a-z and 0-9, from a letter")
        return prefix

    @field_validator("extensions", mode="after")
    @classmethod
    def _check_extensions(cls, extensions: tuple[str, ...]) -> tuple[str, ...]:
        for extension in extensions:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", extension):
                raise ValueError(f"{extension!r} is not the name of an extension")
        return extensions

    @field_validator("encryption_keys", mode="after")
    @classmethod
    def _check_encryption_keys(cls, keys: Mapping[str, str | bytes] | None) -> Mapping[str, str | bytes] | None:
        for key_id, key in decode_keys(keys, "encryption key").items():
            if len(key) != _SEALING_KEY_BYTES:
                raise ValueError(f"encryption key {key_id!r} must be 32 bytes, not {len(key)}")
        return keys

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        problems = {}
        if self.placement is not None and self.default_server is not None:
            problems["default_server"] = "contradicts placement, which chooses the server: set one of them"
        if self.default_tier not in self.tiers:
            problems["default_tier"] = f"{self.default_tier!r} is not among tiers"
        for policy in self.metering.tier_policies:
            if unknown := {*policy.next_tier, *policy.next_tier.values()} - set(self.tiers):
                problems["metering.tier_policies"] = f"unknown tiers: {', '.join(sorted(unknown))}"
        if self.compatible_revisions is not None and self.migrations is None:
            problems["compatible_revisions"] = "needs migrations, which have the revisions"
        peppers, current = self.keys.decoded_peppers, self.keys.pepper_current
        known = self.keys.peppers is not None or "key_peppers" not in (self.secrets.options or ())
        if known and current not in (None, "0", *peppers):
            problems["keys.pepper_current"] = f"{current!r} is not among keys.peppers"
        problems |= self._check_erasure()
        if problems:
            raise SettingError(problems)
        return self

    def _check_erasure(self) -> dict[str, str]:
        """Refuse times that certificates would promise, and that this package's own base backups do not keep."""
        least = self.recovery.keep_seconds + self.recovery.base_seconds
        promised = {"server_backup_seconds": self.erasure.server_backup_seconds}
        if self.servers is None:  # the control database's own
            promised["control_server_backup_seconds"] = self.erasure.control_server_backup_seconds
        return {
            f"erasure.{name}": f"must be at least {least:g}, recovery.keep_seconds and recovery.base_seconds together: "
            "a base backup is kept until a later one is as old as keep_seconds"
            for name, seconds in promised.items()
            if self.recovery.base_directory is not None and seconds is not None and seconds < least
        }

    @property
    def is_embedded(self) -> bool:
        """Whether ``control_url`` asks for an embedded server."""
        return _is_embedded(self.control_url)

    @property
    def sealing_keys(self) -> Mapping[str, bytes]:
        """``encryption_keys`` as 32 bytes each, in order; the last one seals."""
        return decode_keys(self.encryption_keys, "encryption key")

    @property
    def listen_dsn(self) -> Dsn | None:
        """``control.listen_url``, read; None where there is none."""
        return None if self.control.listen_url is None else Dsn.parse(self.control.listen_url)

    @property
    def server_names(self) -> tuple[str, ...]:
        """The names of the servers."""
        return tuple(self.servers or ("default",))

    @property
    def server_addresses(self) -> Mapping[str, ServerAddresses]:
        """The addresses of each server, by name."""
        return {
            name: given if isinstance(given, ServerAddresses) else ServerAddresses(admin=given)
            for name, given in (self.servers or {"default": self.control_url}).items()
        }

    @property
    def server_dsns(self) -> Mapping[str, Dsn]:
        """The administrator's DSN of each server, by name."""
        return {name: addresses.admin_dsn for name, addresses in self.server_addresses.items()}

    def replace(self, **changes: Any) -> TenancyConfig:
        """Return a copy with ``changes``; a mapping changes single settings of a section.

        ``config.replace(default_tier="pro", pool={"max_connections": 50})``.

        Raises:
            SettingError: as the constructor.
        """
        return type(self)(**replaced(self, changes))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> TenancyConfig:
        """Read the settings of a deployment.

        What comes first here wins, setting by setting:

        1. ``overrides``; a mapping overrides single settings of a section,
        2. ``TENANCY_*`` variables,
        3. ``.env`` in the project's directory, or the file that ``TENANCY_ENV_FILE`` names; nothing in it is expanded,
        4. secret files, as Docker and Kubernetes mount them, in the directory that ``TENANCY_SECRETS_DIR`` names: each
           is named like its variable, in either case,
        5. ``tenancy.toml`` and ``[tool.tenancy]`` of ``pyproject.toml`` in the project's directory; or the file that
           ``TENANCY_CONFIG`` names alone.

        The project's directory is the nearest one with settings in a file, from the working directory upward to the
        root of the repository or the home directory; or that of the file that ``TENANCY_CONFIG`` names. Relative paths
        in settings are relative to it.

        Args:
            environ: The variables; ``os.environ`` where None.
            overrides: As the constructor's arguments.

        Raises:
            SettingError: a setting is malformed, unknown or missing. The message names the variable, or the file.
            ConfigurationError: a file cannot be read.
        """
        return sources.read(cls, environ, overrides).build(cls)


def _is_embedded(url: str) -> bool:
    return url == "embedded" or url.startswith("embedded:")
