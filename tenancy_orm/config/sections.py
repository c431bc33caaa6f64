"""The sections of ``TenancyConfig``: what can be tuned, by the part of the package that it concerns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from types import MappingProxyType
from typing import Annotated, Self

from pydantic import Field, PlainValidator, field_validator, model_validator
from pydantic_core import from_json

from ..errors import SettingError
from .tiers import TierPolicyList
from .validation import Section
from .values import (
    SETTING_NAME,
    AlembicFile,
    AtLeastZero,
    Count,
    DirectoryPath,
    Fraction,
    LoadedHook,
    LoadedProvider,
    LoadedSender,
    LoadedWrapper,
    NamedKeys,
    Names,
    OptionalPairs,
    Pairs,
    PostgresUrl,
    RoleScopes,
    RowSource,
    Seconds,
    SecondsOrZero,
    SeedList,
    decode_keys,
)

ROLE_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "idle_in_transaction_session_timeout": "5min",
        "transaction_timeout": "1h",  # PostgreSQL 17 and later
        "temp_file_limit": "10GB",  # of one session
    }
)
"""What every tenant's role gets unless ``provisioning.role_settings`` says otherwise; and the server's work_mem."""


TENANT_PRIVILEGES = ("TEMPORARY", "TRUNCATE", "MAINTAIN")
"""What ``provisioning.tenant_privileges`` can grant."""


def _nothing() -> Mapping[str, str]:
    return MappingProxyType({})


def _default_roles() -> Mapping[str, tuple[str, ...]]:
    return MappingProxyType({"owner": ("*",), "admin": ("*",), "member": ()})


_NAMESERVER = re.compile(r"\[(?P<v6>[^]]+)\](:(?P<port6>\d{1,5}))?|(?P<v4>[0-9.]+):(?P<port4>\d{1,5})")


def parse_nameserver(text: str) -> tuple[str, int]:
    """Return the address and the port (53 where none is given) of a name server: ``9.9.9.9``, ``[::1]:5353``.

    Raises:
        ValueError: it is not an address with or without a port.
    """
    found = _NAMESERVER.fullmatch(text)
    address = text if found is None else found["v6"] or found["v4"]
    port = 53 if found is None else int(found["port6"] or found["port4"] or 53)
    try:
        ip_address(address)
    except ValueError:
        raise ValueError(f"{text!r} is not the address of a name server; write 9.9.9.9, or [::1]:5353") from None
    if not 0 < port < 65_536:
        raise ValueError(f"{text!r} has no valid port")
    return address, port


_KEY_PREFIX = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST_KEY_PREFIX = 24
_SHORTEST_PEPPER = 32

_NOT_OF_A_SESSION = {
    "client_encoding": "the driver decides it",
    "statement_timeout": "use sessions.statement_timeout",
    **dict.fromkeys(("database", "options", "replication", "user"), "it is not a setting of a session"),
}


class ControlConfig(Section, frozen=True):
    """Connections to the control database."""

    pool_size: Count = 5
    """How many connections each process may hold open to it."""
    listen_url: PostgresUrl | None = Field(default=None, repr=False, exclude=True)
    """The control database's own address, for LISTEN and ``tenancy init``: needed where ``control_url`` leads to a
    connection pooler."""


class PoolConfig(Section, frozen=True):
    """Connections of one process to the tenants' databases."""

    max_connections: Count | None = None
    """How many connections to one server the process may hold open at most. Unset, it may take all that the processes
    together may hold."""
    max_connections_per_tenant: Count = 5
    """How many connections the process may hold open for one tenant."""
    max_waiting_per_tenant: Count = 10_000
    """How many requests of one tenant may wait for a connection; further ones are refused at once."""
    max_engines: Count = 1_000
    """How many tenants' engines are kept."""
    checkout_timeout: Seconds = 10.0
    """How long a session waits for a connection, in seconds. One that cannot have a connection until then is refused at
    once."""
    connect_timeout: Seconds = 10.0
    """How long opening a connection may take, in seconds; one to the control database too."""
    idle_timeout: SecondsOrZero = 600.0
    """An idle connection older than this many seconds is not used again."""
    warm_tenants: AtLeastZero = 0
    """For how many tenants that seem to be busy a process opens a connection in the background once it is open, before
    their first requests."""
    full_reset: bool = False
    """Whether a connection is cleaned by DISCARD ALL at every return (about 200 us)."""

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        # a default is no contradiction: it is a bound above the bound
        per_tenant = self.max_connections_per_tenant
        most = self.max_connections
        if most is not None and "max_connections_per_tenant" in self.model_fields_set and per_tenant > most:
            reason = f"must be at most max_connections, which is {most}; lower it, or raise that"
            raise SettingError({"max_connections_per_tenant": reason})
        return self


class BreakerConfig(Section, frozen=True):
    """The breaker of each server, which refuses its tenants at once while it does not answer."""

    enabled: bool = True
    """Whether there is one."""
    timeout: Seconds = 3.0
    """How long a server may answer nothing that is waited for, in seconds, before it is probed; and how long the answer
    to a probe may take."""
    longest_pause: Seconds = 5.0
    """The longest time between two probes of a server that is down, in seconds."""
    end_after: SecondsOrZero = 30.0
    """How long a server may be down, in seconds, before the connections that wait for its answer are closed; 0 leaves
    them to ``sessions.answer_timeout``."""


class SessionConfig(Section, frozen=True):
    """What tenants' sessions start with."""

    statement_timeout: SecondsOrZero = 0.0
    """PostgreSQL's statement_timeout, in seconds; 0 is none."""
    answer_timeout: SecondsOrZero = 3_600.0
    """How long a process waits for PostgreSQL's answer to one statement where ``statement_timeout`` is 0, in seconds; 0
    is for ever. It ends the wait for a server that keeps the connection open and does not answer; so a statement that
    may run longer needs a larger value. A ``COPY`` by the driver is one statement, as long as its data take."""
    settings: Pairs = Field(default_factory=_nothing)
    """Settings that tenants' connections start with, ``search_path`` for example, in place of the server's own. They
    win over ``ALTER ROLE`` and ``ALTER DATABASE``; those in a server's URL win over them. As text: ``name=value``,
    separated by semicolons."""

    @field_validator("settings", mode="after")
    @classmethod
    def _check_settings(cls, settings: Mapping[str, str]) -> Mapping[str, str]:
        for name, value in settings.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*", name):
                raise ValueError(f"{name!r} is not the name of a setting of PostgreSQL")
            if type(value) is not str or "\x00" in value:
                raise ValueError(f"the value of {name!r} must be text")
            if (why := _NOT_OF_A_SESSION.get(name.lower())) is not None:
                raise ValueError(f"cannot hold {name!r}: {why}")
        return settings


class ReplicaConfig(Section, frozen=True):
    """Reads on replicas."""

    max_staleness: Seconds = 5.0
    """How old what a read on a replica sees may be, in seconds, where the read does not say."""


class DirectoryConfig(Section, frozen=True):
    """The directory: the cached look-up of credentials and tenants."""

    size: Count = 100_000
    """How many looked-up keys, tenants and people are remembered, of each."""
    ttl: Seconds = 30.0
    """How long a looked-up key, tenant or membership is believed, in seconds."""
    negative_ttl: SecondsOrZero = 5.0
    """How long an unknown key is remembered as unknown, in seconds."""
    timeout: Seconds = 2.0
    """How long one look-up in the control database may take, in seconds."""
    grace: SecondsOrZero = 300.0
    """How long tenants that are known keep working while the control database does not answer, in seconds."""


class KeyConfig(Section, frozen=True):
    """API keys."""

    prefix: str = "ten_live"
    """What new keys begin with, for secret scanners."""
    prefixes: Names = ()
    """Further prefixes that are accepted (``("ten_test",)``, say), and that a key can be issued with."""
    peppers: NamedKeys | None = Field(default=None, repr=False, exclude=True)
    """Secrets that key digests are bound to, ``{"1": <32 bytes or more, or their base64>}``, the oldest first; all of
    them verify. Keep them elsewhere than the control database. As text: ``id:base64``, separated by commas."""
    pepper_current: str | None = None
    """The pepper that new digests are made with, the last one where None; "0" is none of them. Set it while some
    processes do not have the newest pepper yet."""
    usage_interval: Seconds = 30.0
    """How often the keys' times of last use are written, in seconds."""

    @field_validator("prefix", "prefixes", mode="after")
    @classmethod
    def _check_prefixes(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for prefix in (given,) if isinstance(given, str) else given:
            if not _KEY_PREFIX.fullmatch(prefix) or len(prefix) > _LONGEST_KEY_PREFIX:
                raise ValueError("must be at most 24 of a-z, 0-9 and single inner underscores, from a letter")
        return given

    @field_validator("peppers", mode="after")
    @classmethod
    def _check_peppers(cls, given: Mapping[str, str | bytes] | None) -> Mapping[str, str | bytes] | None:
        for version, pepper in decode_keys(given, "key pepper").items():
            if len(pepper) < _SHORTEST_PEPPER:
                raise ValueError(f"key pepper {version!r} must be 32 bytes or more, not {len(pepper)}")
            if version == "0":
                raise ValueError("a key pepper's version must not be 0, which stands for none")
        return given

    @property
    def decoded_peppers(self) -> Mapping[str, bytes]:
        """``peppers`` as bytes, in order."""
        return decode_keys(self.peppers, "key pepper")


class MembersConfig(Section, frozen=True):
    """Members of tenants."""

    roles: RoleScopes = Field(default_factory=_default_roles)
    """The scopes that each role gives. Where it is not set, "owner" and "admin" give ``*``, which is everything, and
    "member" gives none; where it is set, there are no other roles. As text: ``role=scope scope``, separated by
    semicolons."""
    invitation_seconds: Seconds = 7 * 86_400.0
    """How long an invitation can be accepted, in seconds, where it is made without a time."""

    def scopes_of(self, roles: Iterable[str]) -> frozenset[str]:
        """The scopes that ``roles`` give together; a role that is not configured any more gives none."""
        return frozenset(scope for role in roles for scope in self.roles.get(role, ()))


class LockoutConfig(Section, frozen=True):
    """The lock-out of those who guess credentials."""

    failures: AtLeastZero = 20
    """How many invalid credentials a source, or one key id, may present within ``seconds`` before it is slowed down; 0
    means no limit."""
    seconds: Seconds = 60.0
    """The longest time between two attempts of a source that is slowed down, in seconds."""


class SecretsConfig(Section, frozen=True):
    """Where encryption keys and peppers come from, if not from the configuration itself."""

    provider: LoadedProvider | None = Field(default=None, repr=False, exclude=True)
    """Where the settings in ``options`` are read from when a ``Tenancy`` opens; as text ``module:attribute``."""
    options: Names | None = None
    """What is read from it: "encryption_keys", "key_peppers", or both. Each is a secret of that name, with the text
    that ``TENANCY_ENCRYPTION_KEYS`` or ``TENANCY_KEYS_PEPPERS`` would have. Where None, "encryption_keys", or nothing
    with a ``key_wrapper``."""
    key_wrapper: LoadedWrapper | None = Field(default=None, repr=False, exclude=True)
    """Wraps the keys that seal tenants' passwords (envelope encryption), which are then kept in the control database;
    ``encryption_keys`` is not needed, but opens what it has sealed before. As text ``module:attribute``."""

    @field_validator("options", mode="after")
    @classmethod
    def _check_options(cls, options: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if not set(options or ()) <= {"encryption_keys", "key_peppers"}:
            raise ValueError("may hold encryption_keys and key_peppers alone")
        return options


class ProvisioningConfig(Section, frozen=True):
    """How tenants' databases and roles are made."""

    timeout: Seconds = 60.0
    """How long creating or removing one database may take, in seconds."""
    concurrency: Count = 4
    """How many databases are created at once on one server."""
    warm_pool: AtLeastZero = 0
    """How many databases are kept ready for new tenants on each server that takes tenants; 0 is none. The worker fills
    the pool, and every process that has created a tenant does."""
    warm_pool_max: AtLeastZero = 50
    """Up to how many the pool of a server grows: it follows the busiest ten minutes of creations of the last day."""
    warm_pool_concurrency: Count = 1
    """How many databases one process makes at once for the pool of a server."""
    warm_pool_background: bool = True
    """Whether a process that has created a tenant refills the pool in the background; where False, the worker alone
    does, or ``tenancy warm-pool refill``."""
    role_settings: OptionalPairs = Field(default_factory=_nothing)
    """PostgreSQL's settings for each tenant's role, by name, over the defaults of ``ROLE_SETTINGS``; "" leaves a
    default out. As text: ``name=value``, separated by semicolons."""
    revoke_public: bool = True
    """Whether PUBLIC loses its rights on the databases that all share a server with: ``postgres``, ``template1``, the
    one of the administrator's URL and the control database. Where False, tenants' roles can connect to these."""
    tenant_advisory_locks: bool = False
    """Whether tenants' roles may take advisory locks, with which one of them can fill the lock table of the whole
    server."""
    tenant_privileges: Names = ()
    """What else tenants' roles may do: "TEMPORARY" (temporary tables), "TRUNCATE", "MAINTAIN" (REFRESH MATERIALIZED
    VIEW, VACUUM, ANALYZE; PostgreSQL 17 and later). Existing tenants get it with the next reconcile."""
    grants: LoadedHook | None = Field(default=None, exclude=True)
    """A function that returns further SQL for each tenant's database, given a ``GrantTarget``. It runs as the owner of
    the database, at creation, after an upgrade of the tenant and in a reconcile. As text ``module:attribute``."""
    seeds: SeedList = ()
    """What new tenants' databases are filled with, in this order: functions (as text ``module:function``), SQL files
    and directories of SQL files. As text: separated by commas."""
    seed_timeout: Seconds = 30.0
    """How long one seed, or the rows of one reference table, may take in one database, in seconds. At a creation,
    ``timeout`` bounds them all together as well."""
    client_programs: str | None = None
    """The directory of ``pg_dump`` and ``pg_restore``. Where None, they are looked for on ``PATH``, where packages of
    PostgreSQL put them, and in the package of the extra ``embedded``."""

    @field_validator("tenant_privileges", mode="after")
    @classmethod
    def _check_tenant_privileges(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(dict.fromkeys("TEMPORARY" if name.upper() == "TEMP" else name.upper() for name in given))
        if not set(names) <= set(TENANT_PRIVILEGES):
            raise ValueError(f"may hold {', '.join(TENANT_PRIVILEGES)} alone; grant others by provisioning.grants")
        return names

    @field_validator("role_settings", mode="after")
    @classmethod
    def _check_role_settings(cls, settings: Mapping[str, str | None]) -> Mapping[str, str | None]:
        for name, value in settings.items():
            if not SETTING_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a setting of PostgreSQL")
            if value is not None and (type(value) is not str or "\x00" in value):
                raise ValueError(f"the value of {name!r} must be text")
        return settings


_TABLE_NAME = re.compile(r"([^.\x00]{1,63}\.)?[^.\x00]{1,63}")


class ReferenceTable(Section, frozen=True):
    """A table with rows that are the same for all tenants."""

    table: str
    """The table, ``countries`` or ``schema.countries``; without a schema it is in ``public``. It is not quoted."""
    key: Names
    """The columns that tell the rows apart. The table must have a unique constraint on them."""
    source: RowSource
    """Where the rows come from: a file that ends in ``.csv``, ``.json``, ``.jsonl`` or ``.sql`` (one query), or a
    function that yields mappings, as text ``module:function``. In a settings file, relative to that file."""
    protected: bool = True
    """Whether tenants' roles may only read the table."""

    @property
    def place(self) -> tuple[str, str]:
        """The schema and the name of the table, unquoted."""
        schema, _, table = self.table.rpartition(".")
        return schema or "public", table

    @field_validator("table", mode="after")
    @classmethod
    def _check_table(cls, table: str) -> str:
        if not _TABLE_NAME.fullmatch(table):
            raise ValueError("must be table, or schema.table")
        return table

    @field_validator("key", mode="after")
    @classmethod
    def _check_key(cls, key: tuple[str, ...]) -> tuple[str, ...]:
        if not key or len(set(key)) < len(key):
            raise ValueError("must name one column or more, each once")
        return key


def _read_references(value: object) -> Mapping[str, ReferenceTable]:
    if isinstance(value, str):
        try:
            value = from_json(value)
        except ValueError as exc:
            raise ValueError(f"is not JSON: {exc}") from None
    if not isinstance(value, Mapping):
        raise ValueError("must be a table of reference tables by name")
    return MappingProxyType({str(name): _read_reference(str(name), given) for name, given in value.items()})


def _read_reference(name: str, given: object) -> ReferenceTable:
    if isinstance(given, ReferenceTable):
        return given
    if not isinstance(given, Mapping):
        raise SettingError({name: "must be a table with table, key and source"})
    try:
        return ReferenceTable(**given)
    except SettingError as exc:
        raise SettingError({f"{name}.{inner}": reason for inner, reason in exc.problems.items()}) from None


References = Annotated[
    Mapping[str, ReferenceTable], PlainValidator(_read_references, json_schema_input_type=dict[str, ReferenceTable])
]


class MigrationConfig(Section, frozen=True):
    """Migrations of the tenants' databases."""

    lock_timeout: SecondsOrZero = 5.0
    """PostgreSQL's lock_timeout, in seconds; 0 is none."""
    statement_timeout: SecondsOrZero = 0.0
    """PostgreSQL's statement_timeout for each statement of a revision, in seconds; 0 is none."""
    attempts: Count = 5
    """How often the migration of one tenant is tried in all, if a lock is not available or another session interferes
    (SQLSTATEs 55P03, 40P01, 40001)."""
    retry_pause: SecondsOrZero = 0.2
    """How long the pause before the second attempt is, in seconds; each further one is twice as long. Up to half of a
    pause is left out at random."""
    max_retry_pause: SecondsOrZero = 2.0
    """How long a pause is at most, in seconds."""
    wait: SecondsOrZero = 300.0
    """How long a migration waits for another run that migrates the same tenant, in seconds."""
    timeout: Seconds = 3_600.0
    """How long the migration of one tenant may take, in seconds."""
    server_wait: SecondsOrZero = 120.0
    """How long a run waits for a server that it has reached and that is down now, in seconds: it may be restarting.
    Then that server's tenants fail; 0 is at once."""
    preflight_timeout: Seconds = 60.0
    """How long each check of a revision's ``preflight()`` may take on one tenant, in seconds."""
    alembic_config: AlembicFile | None = None
    """Alembic's file for ``migrations``: an ini file, or a ``pyproject.toml`` with ``[tool.alembic]``. Where None, the
    one that ``ALEMBIC_CONFIG`` names, or one that is found by its ``script_location``. From Python, also Alembic's own
    ``Config``. In a settings file, relative to that file."""
    alembic_section: str | None = None
    """The section of an ini file to read, as ``alembic -n``. Where None, ``alembic``, or the only one that has
    ``migrations`` as its ``script_location``."""
    x_arguments: Names = ()
    """Arguments that ``context.get_x_argument`` returns to every template and every run, before those of
    ``alembic -x``. As text: separated by commas."""
    notice: SecondsOrZero = 0.25
    """How long a migration waits before it changes the schema of a tenant with open connections, in seconds: so that
    every process knows of it by then."""
    code_version: str | None = None
    """The version of the application that runs are recorded with. Where None, the commit that ``GITHUB_SHA``,
    ``CI_COMMIT_SHA``, ``GIT_COMMIT``, ``BUILD_SOURCEVERSION`` or ``SOURCE_VERSION`` names."""
    processes: Count | None = None
    """How many processes of its machine take part in a run that ``tenancy migrate`` starts or joins. Where None, one
    for each core and at most 4, if there are 500 tenants or more, and otherwise one."""
    catch_up: bool = True
    """Whether a tenant that older code has created after the migration of all the others is upgraded by itself: before
    its first use by new code, or by housekeeping."""
    on_demand: bool = False
    """Whether a tenant that is behind is upgraded before its use: one at a revision that ``compatible_revisions`` does
    not have, or any that is not at the code's own head where that is not set."""
    upgrade_wait: SecondsOrZero = 10.0
    """How long requests wait for such an upgrade of their tenant, in seconds from its beginning. Then they are answered
    503, later ones at once; the upgrade goes on."""
    background: bool = False
    """Whether ``tenancy worker`` upgrades the tenants that are behind, the busiest first, in recorded runs."""
    background_concurrency: Count = 2
    """How many tenants it upgrades at once."""
    data_batch_seconds: Seconds = 0.5
    """How long a batch of a data migration should take, in seconds; the number of its rows follows."""
    data_pause: SecondsOrZero = 1.0
    """For how long a data migration rests after each batch, as a multiple of the time that the batch took."""
    data_lock_timeout: Seconds = 1.0
    """How long a batch waits for a lock, in seconds, before it is rolled back and tried again."""
    data_statement_timeout: Seconds = 60.0
    """How long a statement of a batch may take, in seconds, before the batch is tried again with fewer rows."""
    data_max_active: AtLeastZero = 32
    """While more sessions than that are active on a server, data migrations there wait, for a minute before each batch
    at most; 0 is no bound."""
    data_max_lag_seconds: SecondsOrZero = 30.0
    """While a standby lags behind by more seconds than that, data migrations wait in the same way; 0 is no bound."""

    drift_ignore: Names = ()
    """Objects that no comparison of schemas looks at: names as patterns of a shell, with their schema unless that is
    public, such as ``events_2*`` for partitions that the application makes. One may begin with a kind, and must if the
    object belongs to a table: ``publication cdc_*``, ``index notes_tmp*``. As text: separated by commas."""


class RehearsalConfig(Section, frozen=True):
    """Clones of tenants that a migration is tried on."""

    max_bytes: Count = 10 * 1024**3
    """How large the database of a tenant may be that is cloned with its data, in bytes: the clone takes as much space
    on the tenant's server."""
    timeout: Seconds = 3_600.0
    """How long copying one tenant may take, and again all that is done on the clone, in seconds."""


class MoveConfig(Section, frozen=True):
    """Moves of tenants to other servers."""

    drain_seconds: SecondsOrZero = 1.0
    """For how long open transactions go on once the pause of a move has begun, before their sessions are ended."""
    pause_seconds: Seconds = 10.0
    """How long the pause may take, in seconds; after that it is given up, and the tenant stays where it is."""
    pause_bytes: AtLeastZero = 64 * 1024**2
    """How large unlogged tables and large objects may be together, in bytes: they are copied within the pause."""
    timeout: Seconds = 86_400.0
    """How long the first copy may take, and again to catch up with what is written since, in seconds."""
    keep_seconds: Seconds = 86_400.0
    """How long the former database follows the new one, so that a move can be rolled back, unless it is confirmed
    before."""
    max_slot_bytes: Count = 10 * 1024**3
    """How much of its log a server may keep for a move that cannot go on, in bytes, before its slot is dropped."""
    concurrency: Count = 2
    """How many tenants are moved at once from one server, by ``tenancy move --all-from`` and ``tenancy rebalance``."""


class AdoptionConfig(Section, frozen=True):
    """Existing databases, schemas and rows that become tenants."""

    timeout: Seconds = 21_600.0
    """How long copying one source may take, and all that is done with the copy, in seconds."""


class WatchdogConfig(Section, frozen=True):
    """Bounds at which the watchdog ends a tenant's sessions; 0 means no bound."""

    max_session_locks: AtLeastZero = 2_000
    """How many locks one session may hold."""
    max_transaction_seconds: SecondsOrZero = 7_200.0
    """For how long it may have one transaction open."""
    max_idle_transaction_seconds: SecondsOrZero = 600.0
    """For how long it may be idle in a transaction."""
    max_notify_queue: Fraction = 0.25
    """From this fraction of the server's notification queue on, the sessions with the oldest transactions end."""


class QuotaConfig(Section, frozen=True):
    """Quotas and request rates."""

    rate_processes: Count = 1
    """How many processes share the request rate of each tenant: every one of them admits its part."""
    address_requests_per_second: Count = 20
    """How many requests a second each address may make where no tenant's credential counts them: to public paths and
    those without a tenant, and with a token or session that does not allow the tenant."""


class MeteringConfig(Section, frozen=True):
    """What is done with what tenants use."""

    usage_sender: LoadedSender | None = Field(default=None, repr=False, exclude=True)
    """Where housekeeping sends the usage of periods that have ended, for billing; as text ``module:attribute``. It is
    closed with the ``Tenancy`` where it has a ``close``."""
    tier_policies: TierPolicyList = ()
    """Rules by which housekeeping proposes, or applies, the next tier. As text: JSON of what a settings file holds."""


class DomainConfig(Section, frozen=True):
    """Tenants' own domains."""

    claim_seconds: SecondsOrZero = 7 * 86_400.0
    """How long a claim can be verified; housekeeping removes it then. 0 is for ever."""
    verify_seconds: SecondsOrZero = 86_400.0
    """How often housekeeping looks up the TXT record of a verified domain again, in seconds; 0 is never."""
    grace_seconds: SecondsOrZero = 14 * 86_400.0
    """For how long a verified domain may lack its TXT record, found missing at least three times, before it is a claim
    again. A look-up that is not answered does not count."""
    nameservers: Names = ()
    """Addresses of the name servers to ask, ``("9.9.9.9", "127.0.0.1:5353")`` for example; the system's where none is
    given. As text: separated by commas."""

    @field_validator("nameservers", mode="after")
    @classmethod
    def _check_nameservers(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for nameserver in given:
            parse_nameserver(nameserver)
        return given


class ErasureConfig(Section, frozen=True):
    """What certificates of erasure say about copies that this package does not keep."""

    server_backup_seconds: Seconds | None = None
    """For how long base backups and WAL of whole servers are kept at most, in seconds, by whatever makes them. Not
    known where None, which a certificate says. Those of ``recovery.provider`` are kept for as long as
    ``recovery.keep_seconds`` and the time between two base backups together."""
    control_backup_seconds: Seconds | None = None
    """The same of backups of the control database that this package makes."""
    control_server_backup_seconds: Seconds | None = None
    """The same of base backups and WAL of the control database's server, and of dumps of that database by other means:
    they have the sealed keys of backups."""


class ExportConfig(Section, frozen=True):
    """Exports of tenants' data."""

    exclude: Names = ()
    """What no export has: tables (``users``, ``public.users``, ``audit.*``) and columns (``users:password_hash``,
    ``*:*_secret``). As text: separated by commas."""
    large_value_bytes: Annotated[int, Field(ge=65_536)] = 1_048_576
    """A value of more bytes is a file of its own in the archive, beside the file of its table."""
    request_timeout: Seconds = 3_600.0
    """How long an export that is sent as the answer to a request may take, in seconds."""
    stall_timeout: Seconds = 60.0
    """How long its client may read nothing, in seconds, before it is ended."""


class WorkerConfig(Section, frozen=True):
    """Workers: the processes that do what is due, on any number of machines."""

    housekeeping_seconds: Seconds = 60.0
    """How often housekeeping runs, in seconds from the end of one run to the beginning of the next."""
    warm_pool_seconds: Seconds = 10.0
    """How often the warm pool is filled, where ``provisioning.warm_pool`` is set, in seconds."""
    stop_seconds: SecondsOrZero = 25.0
    """How long jobs may go on after SIGTERM, in seconds; those that are not done by then are cancelled, and another
    worker does them."""


class RetentionConfig(Section, frozen=True):
    """For how long things are kept that nobody uses any more."""

    tenant_seconds: SecondsOrZero = 30 * 86_400.0
    """How long a deleted tenant's data is kept before housekeeping purges it."""
    audit_seconds: SecondsOrZero = 0.0
    """How long audit entries are kept before housekeeping removes their month; 0 is for ever."""
    template_seconds: SecondsOrZero = 7 * 86_400.0
    """How long a template is kept that no process has used, before housekeeping drops it; 0 is for ever."""
    run_seconds: SecondsOrZero = 400 * 86_400.0
    """How long the records of a migration run are kept, which an undo needs, before housekeeping removes them; 0 is for
    ever."""


_STORE = re.compile(r"(file:/|s3://|gs://|az://)[^@?#]+")


class BackupConfig(Section, frozen=True):
    """Encrypted backups of the tenants' databases and of the control database."""

    store: str | None = None
    """Where backups are kept: ``file:/var/backups/tenancy``, ``s3://bucket/prefix``, ``gs://bucket/prefix`` or
    ``az://container/prefix``, without credentials. There are no backups where it is None."""
    store_options: Pairs = Field(default_factory=_nothing, repr=False, exclude=True)
    """What else obstore is given for the store: ``region``, ``endpoint``, ``access_key_id``, ``secret_access_key`` and
    so on. Where credentials are not given, they are those of the machine. As text: ``name=value``, separated by
    semicolons."""
    compression: str = "gzip:6"
    """How ``pg_dump`` compresses: ``gzip`` with a level of 0 to 9; ``lz4`` or ``zstd`` (from PostgreSQL 16 on)."""
    directory: DirectoryPath | None = None
    """Where a dump is until it is in the store, and a backup that is restored; the system's temporary directory where
    None."""
    max_temporary_bytes: Count = 10 * 1024**3
    """How much of that directory one backup or one restore may use, in bytes."""
    concurrency: Count = 2
    """How many tenants of one server are backed up at once, by all processes together."""
    timeout: Seconds = 6 * 3_600.0
    """How long one backup, the verification of one, or bringing one in for a restore may take, in seconds."""
    every_seconds: SecondsOrZero = 86_400.0
    """How often ``tenancy worker`` backs each tenant up, and the control database, in seconds; 0 is never."""
    overdue_seconds: Seconds | None = None
    """How old a tenant's newest good backup, and that of the control database, may become before housekeeping reports
    it as overdue, in seconds; twice ``every_seconds`` where None."""
    control_recipients: Names = ()
    """age recipients that can read the backups of the control database too, without its own key. As text: separated by
    commas."""
    keep_last: Count = 3
    """How many of the newest backups of a tenant are kept; so are those of the next three settings."""
    keep_daily: AtLeastZero = 7
    """For how many days the newest backup of each day (UTC) is kept."""
    keep_weekly: AtLeastZero = 4
    """For how many weeks the newest backup of each week is kept."""
    keep_monthly: AtLeastZero = 6
    """For how many months the newest backup of each month is kept."""
    keep_replaced: SecondsOrZero = 7 * 86_400.0
    """How long the database that a restore has replaced is kept before housekeeping drops it, in seconds; until then
    ``tenancy backup undo-restore`` swaps back."""

    @property
    def overdue_after(self) -> float | None:
        """``overdue_seconds``, or what it is where it is None; None where nothing says how often backups are made."""
        return self.overdue_seconds or 2 * self.every_seconds or None

    @field_validator("store", mode="after")
    @classmethod
    def _check_store(cls, store: str | None) -> str | None:
        if store is not None and not _STORE.fullmatch(store):
            # it may have a password
            raise ValueError("must be file: and an absolute path, or s3://, gs:// or az://, without credentials")
        return store

    @field_validator("compression", mode="after")
    @classmethod
    def _check_compression(cls, compression: str) -> str:
        if not re.fullmatch(r"gzip(:[0-9])?|lz4(:[0-9]{1,2})?|zstd(:[0-9]{1,2})?|none", compression):
            raise ValueError("must be none, gzip, lz4 or zstd, with a level as in gzip:6")
        return compression

    @field_validator("control_recipients", mode="after")
    @classmethod
    def _check_recipients(cls, recipients: tuple[str, ...]) -> tuple[str, ...]:
        for recipient in recipients:
            if not re.fullmatch(r"age1[0-9a-z]{20,100}", recipient):
                raise ValueError(f"{recipient!r} is not an age recipient: age1...")
        return recipients
