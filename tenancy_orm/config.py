"""Configuration: one frozen object, from arguments or from ``TENANCY_*`` environment variables."""

from __future__ import annotations

import base64
import binascii
import importlib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from sqlalchemy import MetaData
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from .errors import ConfigurationError
from .protocols import KeyWrapper, SecretProvider, UsageSender

UNLIMITED = "unlimited"
"""What stands for no limit where None cannot be written: in the settings file, and on the command line."""

Period = Literal["lifetime", "day", "month", "concurrent"]

SETTING_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$]{0,62}(\.[A-Za-z_][A-Za-z0-9_$]{0,62})?")
RESOURCE_NAME: Final = re.compile(r"[a-z][a-z0-9_.-]{0,62}")
LARGEST_AMOUNT: Final = 10**15  # leaves room to add without leaving PostgreSQL's bigint


ROLE_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "idle_in_transaction_session_timeout": "5min",
        "transaction_timeout": "1h",  # PostgreSQL 17 and later
        "temp_file_limit": "10GB",  # of one session
    }
)
"""What every tenant's role gets unless ``TenancyConfig.role_settings`` says otherwise; and the server's work_mem."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How much of a resource a tenant may use per period.

    ``amount`` is a whole number of the resource's own unit, at most 10**15; None means no limit (usage is still
    counted). ``period``: "lifetime" counts up and down, "day" and "month" start again in the tenant's time zone,
    "concurrent" bounds what is held at one moment. ``soft`` lists fractions of the limit (0.8, say) at which an event
    is raised.
    """

    amount: int | None
    period: Period = "lifetime"
    soft: tuple[float, ...] = (0.8, 1.0)

    def __post_init__(self) -> None:
        """Refuse an amount that cannot be counted, an unknown period, and fractions outside 0 to 1."""
        # of this very type: True is an int too, and 1e9 would reach the database as 1000000000.0
        if self.amount is not None and (type(self.amount) is not int or not 0 <= self.amount <= LARGEST_AMOUNT):
            raise ConfigurationError(f"a limit's amount must be a whole number from 0 to 10**15, not {self.amount!r}")
        if self.period not in get_args(Period):
            raise ConfigurationError(f"unknown period {self.period!r}; use lifetime, day, month or concurrent")
        if not _are_fractions(self.soft):
            raise ConfigurationError(f"soft limits are fractions above 0 and at most 1, not {self.soft!r}")
        object.__setattr__(self, "soft", tuple(self.soft))


def _are_fractions(values: object) -> bool:
    return isinstance(values, (tuple, list)) and all(_is_above_zero(value, up_to=1) for value in values)


def _is_text(value: object) -> bool:
    return value is None or (isinstance(value, str) and "\x00" not in value)


def _is_above_zero(value: object, *, up_to: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= up_to


@dataclass(frozen=True, slots=True, init=False)
class Tier:
    """A named set of limits.

    Args:
        name: 1 to 31 of a-z, 0-9, _ and -, beginning with a letter.
        limits: A ``Limit`` for each resource; a number is short for ``Limit(number)``, None for no limit.
        requests_per_second: Bounds the request rate of a tenant; None is unbounded.
        connection_limit: The CONNECTION LIMIT of a tenant's PostgreSQL role.
    """

    name: str
    limits: Mapping[str, Limit]
    requests_per_second: float | None
    connection_limit: int

    def __init__(
        self,
        name: str,
        limits: Mapping[str, Limit | int | None] | None = None,
        *,
        requests_per_second: float | None = None,
        connection_limit: int = 20,
    ) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", name):
            raise ConfigurationError(f"tier name {name!r} must be 1 to 31 of a-z, 0-9, _ and -, from a letter")
        if type(connection_limit) is not int or connection_limit < 1:
            raise ConfigurationError(f"connection_limit of tier {name!r} must be a whole number of at least 1")
        if requests_per_second is not None and not _is_above_zero(requests_per_second, up_to=LARGEST_AMOUNT):
            raise ConfigurationError(f"requests_per_second of tier {name!r} must be a number above 0")
        for resource in limits or {}:
            if resource == "requests_per_second" or not RESOURCE_NAME.fullmatch(resource):
                raise ConfigurationError(
                    f"resource {resource!r} of tier {name!r} must be 1 to 63 of a-z, 0-9, _, . and -, from a letter; "
                    "requests_per_second is an argument of its own"
                )
        given = {key: value if isinstance(value, Limit) else Limit(value) for key, value in (limits or {}).items()}
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "limits", MappingProxyType(given))
        object.__setattr__(self, "requests_per_second", requests_per_second)
        object.__setattr__(self, "connection_limit", connection_limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradePolicy:
    """At ``fraction`` of ``resource`` for ``sustained``, propose or apply the next tier.

    ``UpgradePolicy(resource="storage_bytes", fraction=0.9, sustained=timedelta(days=3))`` reads: at 90 % of storage for
    three days, propose the next tier. What falls below the fraction between two evaluations starts again, so this suits
    limits per lifetime or month better than those per day.

    Args:
        resource: Which limit.
        fraction: How much of it, above 0 and at most 1.
        sustained: For how long.
        apply: Whether the tier is changed, or only proposed.
        next_tier: The next tier of each; the order of ``TenancyConfig.tiers`` where it is empty.
        name: What distinguishes it from other policies; the resource and the fraction ("storage_bytes:0.9") where it is
            empty.
    """

    resource: str
    fraction: float = 0.9
    sustained: timedelta = timedelta(days=3)
    apply: bool = False
    next_tier: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        """Refuse a fraction outside 0 to 1, and a negative duration; name what has no name."""
        if not 0 < self.fraction <= 1:
            raise ConfigurationError(f"an upgrade policy's fraction is above 0 and at most 1, not {self.fraction}")
        if self.sustained < timedelta(0):
            raise ConfigurationError("an upgrade policy's duration must not be negative")
        object.__setattr__(self, "name", self.name or f"{self.resource}:{self.fraction}")


def _default_tiers() -> Mapping[str, Tier]:
    gib = 1024**3
    table = {
        "free": (3, 1_000, 1 * gib, 5),
        "starter": (10, 10_000, 10 * gib, 10),
        "pro": (50, 100_000, 100 * gib, 20),
        "enterprise": (None, None, None, 50),
    }
    return MappingProxyType(
        {
            name: Tier(
                name,
                {
                    "users": Limit(users),
                    "api_calls": Limit(calls, "day"),
                    "storage_bytes": Limit(storage),
                },
                connection_limit=connections,
            )
            for name, (users, calls, storage, connections) in table.items()
        }
    )


@dataclass(frozen=True, kw_only=True)
class TenancyConfig:
    """Everything a ``Tenancy`` needs to know. Every field can come from ``TENANCY_<FIELD>`` by ``from_env``.

    Args:
        control_url: The control database, ``postgresql://user:password@host/database``; or ``embedded`` /
            ``embedded:<directory>`` for a server of its own in development (extra ``embedded``).
        servers: Administrative URL of each PostgreSQL server that holds tenant databases, by name. Its role must be
            able to create databases and roles. Defaults to ``{"default": <the server of control_url>}``.
        metadata: The application's tables. Needed for autogenerate, and for templates where ``migrations`` is None.
        migrations: Directory of the application's Alembic environment (made by ``tenancy init``).
        extensions: PostgreSQL extensions every tenant database gets, through the template.
        encryption_keys: Keys that seal tenants' passwords, ``{"1": <32 bytes or their base64>}``; the last one seals,
            all of them open.
        secrets: Where the options in ``secret_options`` are read from when a ``Tenancy`` opens.
        secret_options: "encryption_keys", "key_peppers", or both; each is a secret of that name, written as its
            environment variable would be. Where None, "encryption_keys", or nothing with a ``key_wrapper``.
        key_wrapper: Wraps the keys that seal tenants' passwords (envelope encryption), which are then kept in the
            control database; ``encryption_keys`` is not needed, but opens what it has sealed before.
        key_prefix: What new API keys begin with, for secret scanners.
        key_prefixes: Further prefixes that are accepted (``("ten_test",)``, say), and that a key can be issued with.
        key_peppers: Secrets that key digests are bound to, ``{"1": <32 bytes or more, or their base64>}``, the
            oldest first; all of them verify. Keep them elsewhere than the control database.
        key_pepper_current: The one of them that new digests are made with, the last where None; "0" is none of them.
            Set it while some processes do not have the newest pepper yet.
        tiers: Tiers by name.
        default_tier: The tier of a tenant created without one.
        upgrade_policies: Rules that ``run_maintenance`` proposes, or applies, higher tiers by.
        usage_sender: Where ``run_maintenance`` sends the usage of periods that have ended, for billing. It is closed
            with the ``Tenancy`` where it has a ``close``.
        rate_processes: How many processes share the request rate of each tenant: every one of them admits its part.
        name_prefix: What the names of databases and roles begin with; 1 to 12 of a-z and 0-9.
        max_connections: How many connections this process may hold open to one server.
        max_connections_per_tenant: ... and how many of those for one tenant.
        max_engines: How many tenants' engines are kept.
        checkout_timeout: How long a session waits for a connection, in seconds.
        connect_timeout: How long opening a connection may take, in seconds.
        idle_timeout: An idle connection older than this many seconds is not reused.
        statement_timeout: PostgreSQL's statement_timeout for tenants' sessions, in seconds; 0 is none.
        session_settings: Settings that tenants' connections start with, ``search_path`` for example, in place of the
            server's own. They win over ``ALTER ROLE`` and ``ALTER DATABASE``; those in a server's URL win over them.
        lock_timeout: PostgreSQL's lock_timeout for migrations, in seconds.
        migration_wait: How long a migration waits for another run that migrates the same tenant, in seconds.
        migration_timeout: How long the migration of one tenant may take, in seconds.
        provision_timeout: How long creating or removing one database may take, in seconds.
        provision_concurrency: How many databases are created at once on one server.
        role_settings: PostgreSQL's settings for each tenant's role, by name, over the defaults of
            ``provisioning.role_settings``; "" leaves a default out.
        tenant_advisory_locks: Whether tenants' roles may take advisory locks, with which one of them can fill the lock
            table of the whole server.
        max_session_locks: The watchdog ends a tenant's session that holds more locks than this; 0 is no bound, here and
            below.
        max_transaction_seconds: ... or has had one transaction open for longer than this.
        max_idle_transaction_seconds: ... or has been idle in a transaction for longer than this.
        max_notify_queue: From this fraction of the server's notification queue on, the watchdog ends the tenants'
            sessions with the oldest transactions.
        full_reset: Whether a connection is cleaned by DISCARD ALL at every return (about 200 us).
        directory_size: How many looked-up keys and tenants are remembered.
        directory_ttl: ... for how long, in seconds.
        negative_ttl: How long an unknown key is remembered as unknown, in seconds.
        directory_timeout: How long one look-up in the control database may take, in seconds.
        key_usage_interval: Every how many seconds the keys' last-used times are written.
        lockout_failures: How many invalid keys a source, or one key id, may present within ``lockout_seconds`` before
            it is slowed down; 0 is no limit.
        lockout_seconds: ... and for how long at most, in seconds.
        grace: How long tenants already known keep working while the control database is away, in seconds.
        retention_seconds: How long a deleted tenant's data is kept before ``run_maintenance`` purges it.
        audit_retention_seconds: How long audit entries are kept before ``run_maintenance`` removes their month; for
            ever where it is 0.
        control_pool_size: Connections to the control database.
        listen_url: Another URL of the control database, for LISTEN: needed where ``control_url`` leads through a pooler
            in transaction mode, which drops it.
    """

    control_url: str = field(repr=False)
    servers: Mapping[str, str] | None = field(default=None, repr=False)
    metadata: MetaData | None = field(default=None, repr=False)
    migrations: str | Path | None = None
    extensions: tuple[str, ...] = ()
    encryption_keys: Mapping[str, str | bytes] | None = field(default=None, repr=False)
    secrets: SecretProvider | None = field(default=None, repr=False)
    secret_options: tuple[str, ...] | None = None
    key_wrapper: KeyWrapper | None = field(default=None, repr=False)
    key_prefix: str = "ten_live"
    key_prefixes: tuple[str, ...] = ()
    key_peppers: Mapping[str, str | bytes] | None = field(default=None, repr=False)
    key_pepper_current: str | None = None
    tiers: Mapping[str, Tier] = field(default_factory=_default_tiers, repr=False)
    default_tier: str = "free"
    upgrade_policies: tuple[UpgradePolicy, ...] = ()
    usage_sender: UsageSender | None = field(default=None, repr=False)
    rate_processes: int = 1
    name_prefix: str = "tenancy"
    max_connections: int = 20
    max_connections_per_tenant: int = 5
    max_engines: int = 1_000
    checkout_timeout: float = 10.0
    connect_timeout: float = 10.0
    idle_timeout: float = 600.0
    statement_timeout: float = 0.0
    session_settings: Mapping[str, str] = field(default_factory=dict)
    lock_timeout: float = 5.0
    migration_wait: float = 300.0
    migration_timeout: float = 3_600.0
    provision_timeout: float = 60.0
    provision_concurrency: int = 4
    role_settings: Mapping[str, str | None] = field(default_factory=dict)
    tenant_advisory_locks: bool = False
    max_session_locks: int = 2_000
    max_transaction_seconds: float = 7_200.0
    max_idle_transaction_seconds: float = 600.0
    max_notify_queue: float = 0.25
    full_reset: bool = False
    directory_size: int = 100_000
    directory_ttl: float = 30.0
    negative_ttl: float = 5.0
    directory_timeout: float = 2.0
    key_usage_interval: float = 30.0
    lockout_failures: int = 20
    lockout_seconds: float = 60.0
    grace: float = 300.0
    retention_seconds: float = 30 * 86_400.0
    audit_retention_seconds: float = 0.0
    control_pool_size: int = 5
    listen_url: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check every field, so that a mistake is reported where it was made."""
        if not self.control_url:
            raise ConfigurationError("control_url is empty; set it or TENANCY_CONTROL_URL")
        if not self.is_embedded:
            _check_url("control_url", self.control_url)
        if self.listen_url is not None:
            _check_url("listen_url", self.listen_url)
        for name, url in (self.servers or {}).items():
            if not re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", name):
                raise ConfigurationError(f"server name {name!r} must be 1 to 31 of a-z, 0-9, _ and -, from a letter")
            _check_url(f"servers[{name!r}]", url)
        if not re.fullmatch(r"[a-z][a-z0-9]{0,11}", self.name_prefix):
            raise ConfigurationError("name_prefix must be 1 to 12 of a-z and 0-9, from a letter")
        for prefix in (self.key_prefix, *self.key_prefixes):
            if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", prefix) or len(prefix) > 24:
                raise ConfigurationError("key_prefix must be at most 24 of a-z, 0-9 and single inner underscores")
        if self.default_tier not in self.tiers:
            raise ConfigurationError(f"default_tier {self.default_tier!r} is not among tiers")
        for name, tier in self.tiers.items():
            if name != tier.name:
                raise ConfigurationError(f"tier {tier.name!r} is filed under the name {name!r}")
        for policy in self.upgrade_policies:
            if unknown := {*policy.next_tier, *policy.next_tier.values()} - set(self.tiers):
                raise ConfigurationError(f"an upgrade policy names unknown tiers: {', '.join(sorted(unknown))}")
        policies = [policy.name for policy in self.upgrade_policies]
        if twice := sorted({name for name in policies if policies.count(name) > 1}):
            raise ConfigurationError(f"two upgrade policies have the same name: {', '.join(twice)}; give each its own")
        counts = ("max_connections", "max_connections_per_tenant", "max_engines", "provision_concurrency")
        for option in (*counts, "rate_processes"):
            if getattr(self, option) < 1:
                raise ConfigurationError(f"{option} must be at least 1")
        positive = ("directory_timeout", "key_usage_interval", "lockout_seconds")
        for option in ("checkout_timeout", "connect_timeout", "provision_timeout", "directory_ttl", *positive):
            if getattr(self, option) <= 0:
                raise ConfigurationError(f"{option} must be above 0 seconds")
        _check_session_settings(self.session_settings)
        for extension in self.extensions:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", extension):
                raise ConfigurationError(f"extension {extension!r} is not a name")
        for setting, value in self.role_settings.items():
            if not SETTING_NAME.fullmatch(setting) or not _is_text(value):
                raise ConfigurationError(f"role_settings: {setting!r} is not a setting's name, or its value is no text")
        for option in (*_WATCHED, "max_notify_queue"):
            if getattr(self, option) < 0:
                raise ConfigurationError(f"{option} must be at least 0, which is no bound")
        if not set(self.secret_options or ()) <= {"encryption_keys", "key_peppers"}:
            raise ConfigurationError("secret_options may hold encryption_keys and key_peppers alone")
        _ = self.sealing_keys
        peppers_known = self.key_peppers is not None or "key_peppers" not in (self.secret_options or ())
        if peppers_known and self.key_pepper_current not in (None, "0", *self.peppers):
            raise ConfigurationError(f"key_pepper_current {self.key_pepper_current!r} is not among key_peppers")

    @property
    def is_embedded(self) -> bool:
        """Whether ``control_url`` asks for an embedded server."""
        return self.control_url == "embedded" or self.control_url.startswith("embedded:")

    @property
    def sealing_keys(self) -> Mapping[str, bytes]:
        """``encryption_keys`` as 32 bytes each, in order; the last one seals."""
        keys = {}
        for key_id, value in (self.encryption_keys or {}).items():
            try:
                raw = value if isinstance(value, bytes) else base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                raise ConfigurationError(f"encryption key {key_id!r} is not base64") from None
            if len(raw) != 32:
                raise ConfigurationError(f"encryption key {key_id!r} must be 32 bytes, not {len(raw)}")
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,16}", key_id):
                raise ConfigurationError("an encryption key's id must be 1 to 16 of A-Z, a-z, 0-9, _ and -")
            keys[key_id] = raw
        return keys

    @property
    def peppers(self) -> Mapping[str, bytes]:
        """``key_peppers`` as bytes, in order; ``key_pepper_current`` says which is used for new digests."""
        peppers = {}
        for version, value in (self.key_peppers or {}).items():
            try:
                raw = value if isinstance(value, bytes) else base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                raise ConfigurationError(f"key pepper {version!r} is not base64") from None
            if len(raw) < 32:
                raise ConfigurationError(f"key pepper {version!r} must be 32 bytes or more, not {len(raw)}")
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,16}", version) or version == "0":
                raise ConfigurationError("a key pepper's version must be 1 to 16 of A-Z, a-z, 0-9, _ and -, but not 0")
            peppers[version] = raw
        return peppers

    @property
    def server_urls(self) -> Mapping[str, URL]:
        """Administrative URL of each server, without a driver name."""
        urls = self.servers or {"default": self.control_url}
        return {name: plain_url(url) for name, url in urls.items()}

    def replace(self, **changes: Any) -> TenancyConfig:
        """Return a copy with ``changes``."""
        return replace(self, **changes)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> TenancyConfig:
        """Read a settings file and ``TENANCY_*`` variables; variables win over the file, ``overrides`` over both.

        The file is ``TENANCY_CONFIG``, or ``tenancy.toml`` in the working directory where there is one. Its keys are
        the fields of this class; ``[tiers.<name>]`` tables define tiers, in ascending order, and
        ``[[upgrade_policies]]`` their rules, with ``sustained_days``; ``metadata``, ``secrets``, ``key_wrapper`` and
        ``usage_sender`` are ``module:attribute``. Among the variables, ``TENANCY_SERVERS`` is ``name=url`` separated
        by spaces, ``TENANCY_ENCRYPTION_KEYS`` is ``id:base64`` separated by commas, ``TENANCY_SESSION_SETTINGS`` and
        ``TENANCY_ROLE_SETTINGS`` are ``name=value`` separated by semicolons, ``TENANCY_EXTENSIONS`` is comma-separated.

        Raises:
            ConfigurationError: a setting is malformed or unknown, or ``control_url`` is missing.
        """
        environ = os.environ if environ is None else environ
        types = {f.name: str(f.type) for f in fields(cls)}
        values = _read_file(environ.get("TENANCY_CONFIG"), types)
        for variable, text in environ.items():
            if not variable.startswith("TENANCY_") or variable in _OTHER_VARIABLES:
                continue
            name = variable.removeprefix("TENANCY_").lower()
            if name not in types or name in ("tiers", "upgrade_policies"):
                raise ConfigurationError(f"{variable} is not a setting; see TenancyConfig")
            values[name] = _parse(name, types[name], text)
        values.update(overrides)
        if "control_url" not in values:
            raise ConfigurationError(
                "control_url is not set: run tenancy init, write tenancy.toml, or set TENANCY_CONTROL_URL"
            )
        return cls(**values)


# variables of this package that are no fields of the configuration
_OTHER_VARIABLES = frozenset({"TENANCY_APP", "TENANCY_CONFIG", "TENANCY_TEST_DSN", "TENANCY_TEST_POSTGRES"})


_WATCHED = ("max_session_locks", "max_transaction_seconds", "max_idle_transaction_seconds")

# fields that a file or a variable names as module:attribute
_OBJECTS = frozenset({"metadata", "secrets", "key_wrapper", "usage_sender"})


def _read_file(named: str | None, types: Mapping[str, str]) -> dict[str, Any]:
    path = Path(named or "tenancy.toml")
    if named is None and not path.exists():
        return {}
    try:
        settings = tomllib.loads(path.read_text())
    except OSError as exc:
        raise ConfigurationError(f"settings file {str(path)!r} cannot be read: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"settings file {str(path)!r} is not TOML: {exc}") from exc
    unknown = sorted(set(settings) - set(types))
    if unknown:
        raise ConfigurationError(f"settings file {str(path)!r} has unknown keys: {', '.join(unknown)}")
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "tiers":
            values[name] = {tier: _tier_from(tier, table) for tier, table in value.items()}
        elif name == "upgrade_policies":
            values[name] = tuple(_policy_from(table) for table in value)
        elif name in _OBJECTS:
            values[name] = load_object(value)
        elif name == "migrations":
            # beside the file, wherever the program runs
            values[name] = str(path.parent / value)
        elif name in ("extensions", "key_prefixes", "secret_options"):
            values[name] = tuple(value)
        elif name == "role_settings":
            values[name] = {setting: str(given) for setting, given in value.items()}
        else:
            values[name] = value
    return values


def _tier_from(name: str, table: Mapping[str, Any]) -> Tier:
    try:
        settings = dict(table)
        limits = {resource: _limit_from(resource, value) for resource, value in settings.pop("limits", {}).items()}
        return Tier(name, limits, **settings)
    except TypeError as exc:
        raise ConfigurationError(f"tier {name!r} in the settings file is malformed: {exc}") from exc


def _limit_from(resource: str, value: Any) -> Limit:
    given = dict(value) if isinstance(value, dict) else {"amount": value}
    unknown = sorted(given.keys() - {"amount", "period", "soft"})
    if unknown or "amount" not in given:
        raise ConfigurationError(
            f"the limit of {resource!r} in the settings file has amount, and where you want them period and soft"
            + (f"; not {', '.join(unknown)}" if unknown else "")
        )
    if given["amount"] == UNLIMITED:  # TOML has no null
        given["amount"] = None
    if "soft" in given:
        given["soft"] = tuple(given["soft"])
    return Limit(**given)


def _policy_from(table: Mapping[str, Any]) -> UpgradePolicy:
    try:
        settings = dict(table)
        if (days := settings.pop("sustained_days", None)) is not None:
            settings["sustained"] = timedelta(days=days)
        return UpgradePolicy(**settings)
    except TypeError as exc:
        raise ConfigurationError(f"an upgrade policy in the settings file is malformed: {exc}") from exc


def plain_url(url: str | URL) -> URL:
    """Return ``url`` with the bare ``postgresql`` scheme, as asyncpg and psql read it."""
    return make_url(url).set(drivername="postgresql")


_OWN_SETTINGS = {
    "client_encoding": "the driver decides it",
    "statement_timeout": "use TenancyConfig.statement_timeout",
    **dict.fromkeys(("database", "options", "replication", "user"), "it is no setting of a session"),
}


def _check_session_settings(settings: Mapping[str, str]) -> None:
    for name, value in settings.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*", name):
            raise ConfigurationError(f"{name!r} in session_settings is not the name of a setting")
        if type(value) is not str or "\x00" in value:
            raise ConfigurationError(f"session_settings[{name!r}] must be text")
        if (why := _OWN_SETTINGS.get(name.lower())) is not None:
            raise ConfigurationError(f"session_settings cannot hold {name!r}: {why}")


def _check_url(option: str, url: str) -> None:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigurationError(f"{option} is not a URL; use postgresql://user:password@host/database") from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ConfigurationError(f"{option} must begin with postgresql://, not {parsed.get_backend_name()}://")
    if not parsed.database:
        raise ConfigurationError(f"{option} names no database")


def _parse(name: str, kind: str, text: str) -> Any:
    try:
        if name in _OBJECTS:
            return load_object(text)
        if name == "servers":
            return dict(item.split("=", 1) for item in text.split())
        if name in ("session_settings", "role_settings"):
            pairs = (item.split("=", 1) for item in text.split(";") if item.strip())
            return {setting.strip(): value.strip() for setting, value in pairs}
        if name in ("encryption_keys", "key_peppers"):
            return dict(item.strip().split(":", 1) for item in text.split(",") if item.strip())
        if name in ("extensions", "key_prefixes", "secret_options"):
            return tuple(item.strip() for item in text.split(",") if item.strip())
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
        if kind == "bool":
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
    except ConfigurationError:
        raise
    except (ValueError, KeyError):
        # the text itself may be a secret, so it is not repeated
        raise ConfigurationError(f"TENANCY_{name.upper()} is malformed; see TenancyConfig.from_env") from None
    return text


def parse_keys(name: str, text: str) -> Mapping[str, bytes]:
    """Read keys as ``TENANCY_ENCRYPTION_KEYS`` holds them, ``id:base64`` separated by commas, in order.

    Raises:
        ConfigurationError: the text, which ``name`` stands for in the message, is malformed or empty.
    """
    keys = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key_id, _, value = item.partition(":")
        try:
            keys[key_id] = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            keys = {}
            break
    if not all(keys.values()) or not keys:
        # the text is a secret, so it is not repeated
        raise ConfigurationError(f"the secret {name!r} is malformed; write it as id:base64, separated by commas")
    return keys


def load_object(path: str) -> Any:
    """Import ``module:attribute.path``.

    Raises:
        ConfigurationError: the path is malformed or names nothing.
    """
    module, separator, attribute = path.partition(":")
    if not separator or not module or not attribute:
        raise ConfigurationError(f"{path!r} is not of the form module:attribute")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as exc:
        raise ConfigurationError(f"{path!r} cannot be loaded: {exc}") from exc
    return found
