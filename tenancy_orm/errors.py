"""Every error this package raises, in one tree.

```text
    TenancyError
    ├── ConfigurationError (ValueError)
    │   ├── SettingError                     a setting is malformed, unknown or missing
    │   ├── MissingExtraError (ImportError)
    │   └── AdministratorNeededError         the control database's role lacks a right; the SQL to run is in it
    ├── NotOpenError (RuntimeError)          the Tenancy object is not open, or already closed
    ├── WrongEventLoopError (RuntimeError)   used from another event loop or thread than the one that opened it
    ├── ControlSchemaError                   the control database is not initialised, or at another revision
    ├── ControlUnavailableError              the control database does not answer
    ├── ContextError
    │   ├── NoTenantError (LookupError)      no tenant is bound
    │   ├── AdmissionEndedError (PermissionError)   what the request was let in with was revoked, expired, changed
    │   └── CrossTenantError (PermissionError)   code bound to one tenant reached for another
    ├── TenantError
    │   ├── TenantNotFoundError (LookupError)
    │   ├── TenantExistsError
    │   ├── InvalidSlugError (ValueError)
    │   ├── InvalidMetadataError (ValueError)
    │   ├── UnknownTierError (ValueError)
    │   ├── TierChangedError                 a tenant's tier is not the one that the change was made for
    │   ├── InvalidTransitionError
    │   ├── LoginNotBlockedError             suspended or deleted, but its server could not be told in time
    │   └── TenantUnavailableError           its status does not admit sessions
    │       ├── TenantProvisioningError
    │       ├── TenantSuspendedError
    │       ├── TenantMaintenanceError
    │       └── TenantDeletedError
    ├── DomainError (ValueError)             a domain is malformed, not proven, or another tenant's
    ├── ApiKeyError
    │   ├── InvalidApiKeyError               malformed, unknown, revoked, expired: one answer
    │   ├── ApiKeyNotFoundError (LookupError)
    │   ├── ApiKeyInactiveError              revoked, expired or already rotated: it cannot be changed
    │   ├── TooManyAttemptsError             too many invalid keys from one source; wait
    │   └── MissingScopeError (PermissionError)
    ├── MalformedRequestError (ValueError)   a request names a tenant in a way that no tenant can be named
    ├── SecretProviderError                  what keeps the secrets does not answer, or refuses
    │   └── SecretNotFoundError (LookupError)
    ├── QuotaError
    │   ├── UnknownQuotaError (ValueError)
    │   ├── QuotaExceededError
    │   └── UsageExportError                 a usage record could not be sent to where it is billed
    ├── IsolationError
    │   ├── MarkerMismatchError              a database is not the expected tenant's
    │   └── SecretError                      a stored secret does not open under any configured key
    ├── RoutingError
    │   ├── UnknownServerError (LookupError)
    │   ├── CheckoutTimeoutError (sqlalchemy.exc.TimeoutError)
    │   └── ServerUnavailableError
    │       └── LoginRefusedError            the server answers, but does not let the tenant's role in
    ├── ProvisioningError
    │   ├── DatabaseExistsError
    │   └── TemplateError
    ├── MigrationError
    │   └── FleetMigrationError
    └── AuditError
        └── AuditChainError
```

A message says what failed, for which tenant, and the remedy; the same facts are typed attributes. Every error
can be pickled. No message, attribute or ``repr`` contains a secret. An application's own SQLAlchemy errors (an
``IntegrityError``, say) are never wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.exc import DontWrapMixin
from sqlalchemy.exc import TimeoutError as SATimeoutError


def _rebuild(cls: type[TenancyError], args: tuple[Any, ...], state: dict[str, Any]) -> TenancyError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class TenancyError(DontWrapMixin, Exception):
    """Base of every error raised by this package. SQLAlchemy passes one on unwrapped that is raised inside a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the state, since subclasses take keyword arguments that ``args`` does not hold."""
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))


class ConfigurationError(TenancyError, ValueError):
    """A setting is missing, malformed or contradicts another. The message names the setting."""


class SettingError(ConfigurationError):
    """Settings are malformed, unknown or missing. The message names each, where it came from, and what is wrong.

    Attributes:
        problems: What is wrong with each setting, by its dotted name (``pool.max_connections``).
        origins: Where each came from: a variable, a file; none where it was an argument.
    """

    def __init__(self, problems: Mapping[str, str], origins: Mapping[str, str] | None = None) -> None:
        """Say what is wrong with each setting."""
        self.problems = dict(problems)
        self.origins = {name: origin for name, origin in (origins or {}).items() if name in self.problems}
        found = ((name, f" ({self.origins[name]})" if name in self.origins else "") for name in self.problems)
        super().__init__("; ".join(f"{name}{origin}: {self.problems[name]}" for name, origin in found))


class MissingExtraError(ConfigurationError, ImportError):
    """A module needs a package that an extra of this distribution installs.

    Remedy: run the command in the message.
    """

    def __init__(self, module: str, extra: str) -> None:
        """Name the missing ``module`` and the ``extra`` that brings it."""
        super().__init__(f"{module} is not installed; run: pip install 'tenancy-orm[{extra}]'")
        self.module = module
        self.extra = extra


class AdministratorNeededError(ConfigurationError):
    """The control database's role may not do something that has to be done once.

    Remedy: run ``statements`` as an administrator of that server; ``tenancy init`` does so itself where ``servers`` has
    an administrator of it.
    """

    def __init__(self, statements: tuple[str, ...]) -> None:
        """Give the ``statements`` to run."""
        super().__init__(
            "the control database's role may not do what an administrator must do once: " + "; ".join(statements)
        )
        self.statements = statements


class NotOpenError(TenancyError, RuntimeError):
    """The ``Tenancy`` object was used before ``open()`` or after ``close()``."""


class WrongEventLoopError(TenancyError, RuntimeError):
    """A ``Tenancy``, or something that came from it, was used from another event loop or thread. Nothing was touched.

    Remedy: make the endpoint or the job ``async def``. In a worker thread, have the loop do the work and wait for it:
    ``asyncio.run_coroutine_threadsafe(coroutine, tenancy.loop).result()``; in a thread that anyio or Starlette started,
    ``anyio.from_thread.run(function)`` does the same. The tenant that is bound in the thread is bound there as well.
    """

    def __init__(self) -> None:
        """Say what to do."""
        super().__init__(
            "a Tenancy belongs to the event loop that opened it, and this is another loop or thread; make the function "
            "async def, or in a worker thread: asyncio.run_coroutine_threadsafe(coroutine, tenancy.loop).result()"
        )


class ControlSchemaError(TenancyError):
    """The control database lacks the package's tables, or holds another revision of them.

    Remedy: run ``tenancy init``.
    """


class ControlUnavailableError(TenancyError):
    """The control database did not answer within its deadline."""


# --- context --------------------------------------------------------------------------------------------------------


class ContextError(TenancyError):
    """The ambient tenant does not admit what the code asked for."""


class NoTenantError(ContextError, LookupError):
    """No tenant is bound.

    Remedy: bind one with ``tenancy.scope(...)``, pass it explicitly, or let the middleware bind it from the key.
    """

    def __init__(self, message: str = "") -> None:
        """Use the standard remedy unless ``message`` says something more precise."""
        super().__init__(
            message
            or "no tenant is bound; enter tenancy.scope(...), pass the tenant, or send a request with an API key"
        )


class CrossTenantError(ContextError, PermissionError):
    """Code that runs for one tenant reached for another's session, object or binding, or for the whole fleet.

    Remedy: name the bound tenant, or none; an operator's work over other tenants runs where no tenant is bound.
    """

    def __init__(self, what: str, *, bound: str, requested: str | None) -> None:
        """Say ``what`` was refused, for the tenant that is bound and the one that was requested (slugs or ids).

        ``requested`` is None where it was the whole fleet.
        """
        reason = f"but it belongs to tenant {requested!r}" if requested is not None else "and this is for all tenants"
        super().__init__(f"{what} refused: bound to tenant {bound!r}, {reason}; leave its scope first")
        self.bound = bound
        self.requested = requested


class AdmissionEndedError(ContextError, PermissionError):
    """What the running request was let in with does not hold any more: revoked, expired, or it may do less by now.

    ``reason`` tells which for operators, and must not reach the caller.

    Remedy: a new request with a credential that is valid. Work that must outlive its request runs in a context of its
    own: ``asyncio.create_task(work(), context=contextvars.Context())``, with ``tenancy.scope(...)`` inside.
    """

    def __init__(self, reason: str, *, credential_id: str) -> None:
        """Record the ``reason`` and the public id of the credential."""
        super().__init__(
            "what this request was admitted with is no longer valid; send a new one with a valid credential, and run "
            "work that outlives its request in a context of its own"
        )
        self.reason = reason
        self.credential_id = credential_id


# --- tenants --------------------------------------------------------------------------------------------------------


class TenantError(TenancyError):
    """Something about one tenant. ``tenant`` is its slug, or its id where the slug is not known."""

    def __init__(self, message: str, *, tenant: str | UUID | None = None) -> None:
        """Attach the ``tenant`` (slug or id) to the message."""
        super().__init__(message)
        self.tenant = None if tenant is None else str(tenant)


class TenantNotFoundError(TenantError, LookupError):
    """No such tenant, or it has been purged."""

    def __init__(self, tenant: str | UUID) -> None:
        """Name the slug or id that was looked for."""
        super().__init__(f"tenant {str(tenant)!r} does not exist", tenant=tenant)


class TenantExistsError(TenantError):
    """The slug is taken: by a tenant, by one being provisioned, or by one whose database is not yet gone."""

    def __init__(self, slug: str, *, reserved: bool = False) -> None:
        """Name the ``slug`` that is taken; ``reserved``: it still leads to a tenant that was renamed."""
        if reserved:
            message = (
                f"slug {slug!r} still leads to a tenant that was renamed; choose another, or wait until it does not"
            )
        else:
            message = f"tenant {slug!r} already exists; choose another slug, or purge that tenant first"
        super().__init__(message, tenant=slug)
        self.reserved = reserved


class InvalidSlugError(TenantError, ValueError):
    """A slug breaks the rule: 1 to 63 of a-z, 0-9 and inner hyphens, beginning with a letter."""


class InvalidMetadataError(TenantError, ValueError):
    """Tenant metadata is not a JSON object, or is larger than allowed."""


class UnknownTierError(TenantError, ValueError):
    """A tier that the configuration does not define, or that is configured but not in force."""

    def __init__(self, tier: str, known: tuple[str, ...] = ()) -> None:
        """Name the ``tier`` and those that are ``known``; with none, it is configured, but not in force."""
        if known:
            super().__init__(f"tier {tier!r} is not configured; known tiers: {', '.join(known)}")
        else:
            super().__init__(f"tier {tier!r} is not in force; run: tenancy tiers apply")
        self.tier = tier
        self.known = known


class TierChangedError(TenantError):
    """A tenant's tier was to be changed from the one it had, and is another one by now; nothing was changed."""

    def __init__(self, tenant: str, *, expected: str, found: str) -> None:
        """Name the ``tenant`` (slug), the tier that was ``expected`` and the one that was ``found``."""
        super().__init__(f"tenant {tenant!r} is in tier {found!r} by now, not in {expected!r}", tenant=tenant)
        self.expected = expected
        self.found = found


class LoginNotBlockedError(TenantError):
    """A tenant is suspended or deleted, and refused by the application; but its server could not be told in time.

    Connections that were open may still be. ``tenancy reconcile`` (or ``housekeeping``) tells the server.
    """

    def __init__(self, tenant: str, status: str, reason: str) -> None:
        """Name the ``tenant`` (slug), its ``status`` from now on, and the ``reason`` why its server does not know."""
        super().__init__(
            f"tenant {tenant!r} is {status}, but its server was not told ({reason}): its connections may still be "
            "open; run: tenancy reconcile",
            tenant=tenant,
        )
        self.status = status
        self.reason = reason


class InvalidTransitionError(TenantError):
    """A status change that the lifecycle does not have."""

    def __init__(self, tenant: str, current: str, target: str) -> None:
        """Name the ``current`` status and the ``target`` that was refused."""
        super().__init__(f"tenant {tenant!r} cannot go from {current} to {target}", tenant=tenant)
        self.current = current
        self.target = target


class TenantUnavailableError(TenantError):
    """The tenant exists, but its status admits no session."""

    status: str = "unavailable"

    def __init__(self, tenant: str, *, reason: str | None = None) -> None:
        """Name the ``tenant`` (slug) and, where an operator gave one, the ``reason``."""
        super().__init__(f"tenant {tenant!r} is {self.status}" + (f": {reason}" if reason else ""), tenant=tenant)
        self.reason = reason


class TenantProvisioningError(TenantUnavailableError):
    """The tenant is still being created; try again shortly."""

    status = "provisioning"


class TenantSuspendedError(TenantUnavailableError):
    """An operator suspended the tenant."""

    status = "suspended"


class TenantMaintenanceError(TenantUnavailableError):
    """The tenant is in maintenance; try again later."""

    status = "maintenance"


class TenantDeletedError(TenantUnavailableError):
    """The tenant is deleted (its data is kept until it is purged)."""

    status = "deleted"


class DomainError(TenancyError, ValueError):
    """A tenant's domain is malformed, not claimed, not proven, or belongs to another tenant."""


# --- API keys and quotas --------------------------------------------------------------------------------------------


class ApiKeyError(TenancyError):
    """Something about an API key. Never contains the key."""


class InvalidApiKeyError(ApiKeyError):
    """A key is not valid.

    The message is the same whether it is malformed, unknown, revoked or expired; ``reason`` tells them apart for the
    audit log and must not reach the caller.
    """

    def __init__(self, reason: str = "unknown", *, key_id: str | None = None) -> None:
        """Record the ``reason`` and the public ``key_id`` for the audit log."""
        super().__init__("the API key is not valid")
        self.reason = reason
        self.key_id = key_id


class ApiKeyNotFoundError(ApiKeyError, LookupError):
    """No key with this id."""

    def __init__(self, key_id: str) -> None:
        """Name the public ``key_id``."""
        super().__init__(f"API key {key_id!r} does not exist")
        self.key_id = key_id


class ApiKeyInactiveError(ApiKeyError):
    """The key is revoked, expired or already rotated, so it cannot be rotated.

    Remedy: issue a new one.
    """

    def __init__(self, key_id: str, state: str) -> None:
        """Name the public ``key_id`` and its ``state``: "revoked", "expired" or "rotated"."""
        super().__init__(f"API key {key_id!r} is {state}; issue a new one")
        self.key_id = key_id
        self.state = state


class TooManyAttemptsError(ApiKeyError):
    """A source has presented too many invalid keys; keys that are in use already still work from there.

    Remedy: wait ``retry_after`` seconds.
    """

    def __init__(self, retry_after: float) -> None:
        """Say after how many seconds the source may try again."""
        super().__init__(f"too many invalid API keys; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class MissingScopeError(ApiKeyError, PermissionError):
    """The request's key lacks a scope that the route requires."""

    def __init__(self, scope: str) -> None:
        """Name the missing ``scope``."""
        super().__init__(f"this API key lacks the scope {scope!r}")
        self.scope = scope


class MalformedRequestError(TenancyError, ValueError):
    """A request names a tenant twice, or by something that can be no tenant's slug or id."""

    def __init__(self, where: str) -> None:
        """Say ``where`` the name stands: a header, the path. What stands there is not repeated."""
        super().__init__(f"{where} is malformed or repeated")
        self.where = where


class SecretProviderError(TenancyError):
    """What keeps the secrets (a file, Vault, AWS) does not answer, or refuses. Never contains a secret."""


class SecretNotFoundError(SecretProviderError, LookupError):
    """The provider has no secret of this name."""

    def __init__(self, name: str, where: str) -> None:
        """Say which secret is missing, and ``where`` it was looked for."""
        super().__init__(f"secret {name!r} does not exist in {where}")
        self.name = name
        self.where = where


class QuotaError(TenancyError):
    """Something about a quota."""


class UnknownQuotaError(QuotaError, ValueError):
    """A resource that no tier and no override gives a limit."""

    def __init__(self, resource: str, *, tenant: str) -> None:
        """Name the ``resource`` and the ``tenant`` (slug)."""
        super().__init__(f"resource {resource!r} has no quota for tenant {tenant!r}; give its tier or itself a limit")
        self.resource = resource
        self.tenant = tenant


class QuotaExceededError(QuotaError):
    """Consuming would pass the limit; nothing was consumed."""

    def __init__(
        self,
        *,
        tenant: str,
        resource: str,
        limit: int,
        used: int,
        requested: int,
        resets_at: datetime | None = None,
        period: str | None = None,
    ) -> None:
        """Carry the ``limit``, what is ``used``, what was ``requested``, when the period ends (UTC), and its kind."""
        super().__init__(
            f"quota {resource!r} of tenant {tenant!r} exceeded: {used} of {limit} used, {requested} more requested"
        )
        self.tenant = tenant
        self.resource = resource
        self.limit = limit
        self.used = used
        self.requested = requested
        self.resets_at = resets_at
        self.period = period


class UsageExportError(QuotaError):
    """A usage record could not be sent. ``permanent`` tells that trying again is of no use."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        """Say what went wrong, without secrets, and whether it is ``permanent``."""
        super().__init__(message)
        self.permanent = permanent


# --- isolation ------------------------------------------------------------------------------------------------------


class IsolationError(TenancyError):
    """A layer of isolation refused; this is an incident, not a user's mistake."""


class MarkerMismatchError(IsolationError):
    """A database's own marker does not name the expected tenant; the connection was closed before any use."""

    def __init__(self, *, tenant: str, database: str, expected: str, found: str | None) -> None:
        """Name the ``database`` and the ``expected`` and ``found`` markers."""
        super().__init__(
            f"database {database!r} is not the one of tenant {tenant!r}: expected marker {expected!r}, "
            f"found {found!r}; its registry row or its placement is wrong"
        )
        self.tenant = tenant
        self.database = database
        self.expected = expected
        self.found = found


class SecretError(IsolationError):
    """A stored secret does not open: wrong or missing encryption key, or it belongs to another tenant."""


# --- routing --------------------------------------------------------------------------------------------------------


class RoutingError(TenancyError):
    """A tenant's database could not be reached."""


class UnknownServerError(RoutingError, LookupError):
    """A placement names a server that the configuration does not have."""

    def __init__(self, server: str) -> None:
        """Name the ``server``."""
        super().__init__(f"server {server!r} is not configured; add it to TenancyConfig.servers")
        self.server = server


class CheckoutTimeoutError(RoutingError, SATimeoutError):
    """No connection became free within ``checkout_timeout``."""

    def __init__(self, *, server: str, tenant: str, timeout: float, limit: int) -> None:
        """Name the ``server`` and ``tenant``, the ``timeout`` in seconds and the budget's ``limit`` in connections."""
        super().__init__(
            f"no connection to server {server!r} for tenant {tenant!r} within {timeout:g} s: all {limit} are in use; "
            "return sessions sooner, or raise max_connections"
        )
        self.server = server
        self.tenant = tenant
        self.timeout = timeout
        self.limit = limit


class ServerUnavailableError(RoutingError):
    """A PostgreSQL server refused or did not answer a new connection. ``tenant`` is None for an administrative one."""

    def __init__(self, *, server: str, tenant: str | None = None, sqlstate: str | None = None) -> None:
        """Name the ``server``, the ``tenant`` if it was for one and, where PostgreSQL answered, its ``sqlstate``."""
        whom = f" for tenant {tenant!r}" if tenant else ""
        super().__init__(f"server {server!r} is not available{whom}" + (f" ({sqlstate})" if sqlstate else ""))
        self.server = server
        self.tenant = tenant
        self.sqlstate = sqlstate


class LoginRefusedError(ServerUnavailableError):
    """The server answers, but does not let the tenant's role in: trying again will not help.

    Remedy, by ``sqlstate``: 28P01, the stored password is not the role's; 28000, the role may not log in, as after a
    suspension, or pg_hba.conf does not admit it; 42501, the role lacks CONNECT; 3D000, the database is gone. For all
    but the suspension, run ``tenancy reconcile``.
    """

    def __init__(self, *, server: str, tenant: str | None = None, sqlstate: str | None = None) -> None:
        """Name the ``server``, the ``tenant`` and PostgreSQL's ``sqlstate``."""
        super().__init__(server=server, tenant=tenant, sqlstate=sqlstate)
        self.args = (f"server {server!r} refuses the login of tenant {tenant!r} ({sqlstate})",)


# --- provisioning and migrations ------------------------------------------------------------------------------------


class ProvisioningError(TenancyError):
    """Creating or removing a tenant's database failed; what was made has been undone, or is left to ``reconcile``."""

    def __init__(self, message: str, *, tenant: str | None = None, step: str | None = None) -> None:
        """Attach the ``tenant`` (slug) and the ``step`` that failed."""
        super().__init__(message)
        self.tenant = tenant
        self.step = step


class DatabaseExistsError(ProvisioningError):
    """A database or role of that name exists already; an existing one is never adopted."""


class TemplateError(ProvisioningError):
    """The template database could not be built."""


class MigrationError(TenancyError):
    """A schema migration failed."""


class FleetMigrationError(MigrationError):
    """Some tenants did not reach the target; the others did."""

    def __init__(self, failures: Mapping[str, str], *, total: int) -> None:
        """Map each failed tenant's slug to its reason; ``total`` is how many were to be migrated."""
        names = ", ".join(sorted(failures)[:5]) + (", ..." if len(failures) > 5 else "")
        super().__init__(f"{len(failures)} of {total} tenants failed to migrate: {names}")
        self.failures = dict(failures)
        self.total = total


class AuditError(TenancyError):
    """Something about the audit log."""


class AuditChainError(AuditError):
    """The audit log's hash chain does not hold from ``sequence`` on."""

    def __init__(self, message: str, *, sequence: int) -> None:
        """Name the first bad ``sequence`` number."""
        super().__init__(message)
        self.sequence = sequence
