"""Every error this package raises, in one tree.

```text
    TenancyError
    ├── ConfigurationError (ValueError)
    │   ├── SettingError                     a setting is malformed, unknown or missing
    │   ├── MissingExtraError (ImportError)
    │   ├── PlacementError                   no server takes a tenant
    │   ├── PoolerError                      an address must lead to PostgreSQL itself, and a pooler answers
    │   └── AdministratorNeededError         the control database's role lacks a right; it has the SQL to run
    ├── NotOpenError (RuntimeError)          the Tenancy object is not open, or already closed
    ├── WrongEventLoopError (RuntimeError)   used from another event loop or thread than the one that opened it
    ├── EventLoopBlockedError (RuntimeError)   a thread waited for an event loop that ran nothing
    ├── ControlSchemaError                   the control database is not initialised, or at another revision
    ├── ControlUnavailableError              the control database does not answer
    ├── ContextError
    │   ├── NoTenantError (LookupError)      no tenant is bound
    │   ├── AdmissionEndedError (PermissionError)   the request's credential was revoked, has expired or changed
    │   ├── CrossTenantError (PermissionError)   code bound to one tenant used another
    │   ├── InvalidNameError (ValueError)    a key or a path would lead outside a tenant's own names
    │   └── UnprefixedError (AttributeError)   a wrapped client's method that knows no tenants
    ├── TenantError
    │   ├── TenantNotFoundError (LookupError)
    │   ├── SeveralTenantsError (LookupError)   one tenant was looked for, and several match
    │   ├── TenantExistsError
    │   ├── InvalidSlugError (ValueError)
    │   ├── InvalidMetadataError (ValueError)
    │   ├── UnknownTierError (ValueError)
    │   ├── TierChangedError                 a tenant's tier is not the one that the change expected
    │   ├── InvalidTransitionError
    │   ├── LoginNotBlockedError             suspended or deleted, but its login was not blocked in time
    │   └── TenantUnavailableError           its status does not admit sessions
    │       ├── TenantProvisioningError
    │       ├── TenantPausedError            its database is being exchanged for another one, which takes too long
    │       ├── TenantRevisionError          its schema is at a revision that this code cannot work with
    │       ├── TenantSuspendedError
    │       ├── TenantMaintenanceError
    │       └── TenantDeletedError
    ├── DomainError (ValueError)             a domain is malformed, not verified, or another tenant's
    ├── CredentialError
    │   ├── InvalidCredentialError           missing, malformed, unknown, revoked, expired: one answer
    │   ├── CredentialsUnavailableError      an identity provider's keys cannot be fetched now
    │   ├── CrossOriginError (PermissionError)   a page of another origin used a cookie
    │   ├── TenantNotAllowedError (PermissionError)   the credential does not allow the tenant that was named
    │   ├── TenantNotNamedError              the credential allows several tenants, and none was named
    │   ├── TooManyAttemptsError             too many invalid credentials from one source; wait
    │   ├── MissingScopeError (PermissionError)
    │   └── ApiKeyError
    │       ├── ApiKeyNotFoundError (LookupError)
    │       └── ApiKeyInactiveError          revoked, expired or already rotated: it cannot be changed
    ├── MemberError
    │   ├── InvalidSubjectError (ValueError)
    │   ├── UnknownRoleError (ValueError)
    │   ├── InvalidInvitationError (PermissionError)   unknown, expired, withdrawn, accepted: one answer
    │   ├── InvitationNotFoundError (LookupError)
    │   └── InvitationAcceptedError          it cannot be withdrawn any more
    ├── MalformedRequestError (ValueError)   a request names a tenant by a malformed name
    ├── SecretProviderError                  the provider of secrets does not answer, or refuses
    │   └── SecretNotFoundError (LookupError)
    ├── QuotaError
    │   ├── UnknownQuotaError (ValueError)
    │   ├── QuotaExceededError
    │   └── UsageExportError                 a usage record could not be sent for billing
    ├── IsolationError
    │   ├── MarkerMismatchError              a database is not the expected tenant's
    │   └── SecretError                      a stored secret cannot be opened with any configured key
    ├── RoutingError
    │   ├── UnknownServerError (LookupError)
    │   ├── CheckoutTimeoutError (sqlalchemy.exc.TimeoutError)
    │   │   └── CheckoutRefusedError         it could not have had a connection before its deadline
    │   └── ServerUnavailableError
    │       ├── ServerIdentityError          its address leads to another cluster
    │       ├── ConnectionLimitError         the tenant's role, or the server, has all the connections it may have
    │       └── LoginRefusedError            the server answers, but refuses the login of the tenant's role
    ├── ProvisioningError
    │   ├── DatabaseExistsError
    │   ├── SeedError                        a seed failed, or took too long
    │   ├── ReferenceDataError               the rows of a reference table could not be written
    │   ├── FleetSeedError                   some tenants failed in a run over the fleet
    │   └── TemplateError
    │       └── ExtensionUnavailableError    a server does not have a configured extension
    ├── OperationError                       a backup, restore, clone, adoption, move or export failed
    │   ├── OperationNotFoundError (LookupError)   no operation has that number
    │   ├── ContentsRefusedError             contents from elsewhere would raise rights
    │   ├── OperationStateError              an operation's state does not allow it
    │   ├── OperationConflictError           another operation moves the tenant's data now
    │   └── BackupError                      a backup cannot be made, read or removed
    │       ├── BackupNotFoundError (LookupError)   there is no such backup, or its store does not have it
    │       ├── BackupUnderWayError          another process backs the tenant up now, or has done so since
    │       ├── BackupDamagedError           it is not what was written: its signature, checksum or encryption is wrong
    │       ├── BackupKeyDestroyedError      its key was destroyed: nobody can read it
    │       └── FleetBackupError             some tenants failed in a run over the fleet
    │   ├── RecoveryTargetError (ValueError)   what is kept does not reach the time that was asked for
    │   └── RecoveryError                    a server could not be recovered, or a base backup not be taken
    │   └── AdoptionError                    what exists cannot become a tenant; it is as it was
    │       └── AdoptionDifferencesError     its schema is not that of its revision
    │   ├── ErasureError                     a tenant's erasure is not complete, or a certificate is not valid
    │   └── AnonymisationError               the rules of a clone cannot be followed; none was made
    │   └── ExportError                      an export would not be whole, or cannot be written there
    │       └── ExportRunningError           another export of the tenant is under way
    ├── JobLostError                         another process does by now what this one had claimed
    ├── MigrationError
    │   ├── FleetMigrationError
    │   ├── PreflightError                   checks of pending revisions do not pass; no tenant was touched
    │   ├── RunNotFoundError (LookupError)   no run has that number
    │   ├── RunStateError                    a run's state does not allow it
    │   ├── RunConflictError                 a run that is under way moves tenants elsewhere
    │   ├── UndoRefusedError                 a run cannot be undone without a decision
    │   ├── RunMismatchError                 this code is not the one that a run was started with
    │   ├── RehearsalError                   a migration failed on clones of tenants; no tenant was changed
    │   └── SchemaDriftError                 tenants' schemas are not what their revisions say
    ├── ReadOnlyError                        a read-only session was to write, or to end its transaction by SQL
    ├── QueryError                           a query over the fleet was refused in a tenant's database
    ├── FleetQueryError                      a query failed for some tenants, and was answered by the others
    ├── TaskRefusedError                     a task that has arrived must not run
    └── AuditError
        └── AuditChainError
```

A message says what failed, for which tenant, and the remedy; the same facts are typed attributes. Every error
can be pickled. No message, attribute or ``repr`` contains a secret. An application's own SQLAlchemy errors (an
``IntegrityError``, say) are never wrapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.exc import DontWrapMixin
from sqlalchemy.exc import TimeoutError as SATimeoutError


def counted(number: int) -> str:
    """Return "1 tenant", "2 tenants"."""
    return f"{number} tenant{'s' * (number != 1)}"


def _rebuild(cls: type[TenancyError], args: tuple[Any, ...], state: dict[str, Any]) -> TenancyError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class TenancyError(DontWrapMixin, Exception):
    """Base of every error raised by this package. SQLAlchemy does not wrap one that is raised inside its calls."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the state, since subclasses take keyword arguments that ``args`` does not contain."""
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))


@dataclass(frozen=True, slots=True)
class QueryFailure:
    """The failure of a query in one tenant's database.

    Args:
        tenant_id: The tenant.
        slug: Its slug.
        sqlstate: PostgreSQL's code; None where the failure is not PostgreSQL's.
        message: One line, without the statement and its parameters.
    """

    tenant_id: UUID
    slug: str
    sqlstate: str | None
    message: str


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
    """A module needs a package that one of this distribution's extras installs.

    Remedy: run the command in the message.
    """

    def __init__(self, module: str, extra: str) -> None:
        """Name the missing ``module`` and the ``extra`` that installs it."""
        super().__init__(f"{module} is not installed; run: pip install 'tenancy-orm[{extra}]'")
        self.module = module
        self.extra = extra


class AdministratorNeededError(ConfigurationError):
    """The control database's role lacks a right that is needed once.

    Remedy: run ``statements`` as an administrator of that server; ``tenancy init`` does so itself where ``servers`` has
    an administrator of that server.
    """

    def __init__(self, statements: tuple[str, ...]) -> None:
        """Give the ``statements`` to run."""
        super().__init__(
            "the control database's role lacks a right; run once as an administrator: " + "; ".join(statements)
        )
        self.statements = statements


class PlacementError(ConfigurationError):
    """No server takes the tenant, or the one that was named does not.

    ``refused`` has the reason of each server, by name.
    """

    def __init__(self, message: str, refused: Mapping[str, str] | None = None) -> None:
        """Say what was wanted in ``message``."""
        super().__init__(message)
        self.refused = dict(refused or {})


class PoolerError(ConfigurationError):
    """An address that must lead to PostgreSQL itself leads to a connection pooler; or what was asked cannot work there.

    Remedy: give the server's own address there; ``ServerAddresses`` has another one for tenants' traffic, and
    ``control.listen_url`` is the control database's own. A pooler of tenants' traffic works by transactions or
    sessions, not by statements, and lets no notification through.
    """


class NotOpenError(TenancyError, RuntimeError):
    """The ``Tenancy`` object was used before ``open()`` or after ``close()``."""


class WrongEventLoopError(TenancyError, RuntimeError):
    """A ``Tenancy``, or an object that came from it, was used from another event loop or thread. Nothing was changed.

    Remedy: make the endpoint or the job ``async def``. In a worker thread use ``tenancy.sync``, which has sessions for
    it, or run the coroutine in the loop and wait for it:
    ``asyncio.run_coroutine_threadsafe(coroutine, tenancy.loop).result()``; in a thread that anyio or Starlette started,
    ``anyio.from_thread.run(function)`` does the same. The tenant that is bound in the thread is bound there as well. A
    loop that has nothing to do with the first one opens a ``Tenancy`` of its own, and so does each process after a
    fork.

    Attributes:
        forked: Whether this process was forked from the one that opened it.
        waiting: Whether synchronous code waited in the thread of the event loop, which would never answer.
    """

    def __init__(self, *, forked: bool = False, waiting: bool = False) -> None:
        """State the remedy."""
        super().__init__(
            "this Tenancy was opened before the process was forked, and its connections belong to the parent; open a "
            "Tenancy in each process after the fork, for example in the application's lifespan"
            if forked
            else _WAITS_FOR_ITSELF
            if waiting
            else "a Tenancy can only be used in the event loop that opened it, and this is another loop or thread; "
            "make the function async def, or use tenancy.sync in a worker thread, or there: "
            "asyncio.run_coroutine_threadsafe(coroutine, tenancy.loop).result(); "
            "a loop of its own needs another Tenancy: async with Tenancy(config) as tenancy"
        )
        self.forked = forked
        self.waiting = waiting


_WAITS_FOR_ITSELF = (
    "tenancy.sync waits for the event loop that the Tenancy is open in, and this is that loop's thread, or the loop "
    "does not run: it would wait for ever; await the asynchronous methods here (async with tenancy.session() as "
    "session), or call the function in a worker thread: await asyncio.to_thread(function)"
)


class EventLoopBlockedError(TenancyError, RuntimeError):
    """Synchronous code waited for the event loop of its ``Tenancy``, which ran nothing for ``seconds``.

    What the thread waited for is undone if the loop gets to it.

    Remedy: find what blocks the loop. If a coroutine waits for this thread (``future.result()``, ``thread.join()``),
    each waits for the other; await the thread instead: ``await asyncio.to_thread(function)``.

    Attributes:
        seconds: For how long it ran nothing.
    """

    def __init__(self, seconds: float) -> None:
        """State the remedy."""
        super().__init__(
            f"the event loop of this Tenancy has run nothing for {seconds:g} seconds, and tenancy.sync waits for it: "
            "something blocks the loop; where a coroutine waits for this thread, let it await the thread instead: "
            "await asyncio.to_thread(function)"
        )
        self.seconds = seconds


class ControlSchemaError(TenancyError):
    """The control database lacks the package's tables, or has another revision of them.

    Remedy: run ``tenancy init``.
    """


class ControlUnavailableError(TenancyError):
    """The control database could not be reached, or did not answer in time."""


# --- context --------------------------------------------------------------------------------------------------------


class ContextError(TenancyError):
    """The bound tenant does not allow what the code asked for."""


class NoTenantError(ContextError, LookupError):
    """No tenant is bound.

    Remedy: bind one with ``tenancy.scope(...)``, pass it explicitly, or let the middleware bind it from the credential.
    """

    def __init__(self, message: str = "") -> None:
        """Use the standard message unless ``message`` is given."""
        super().__init__(
            message
            or "no tenant is bound; enter tenancy.scope(...), or tenancy.sync.scope(...) in synchronous code, or pass "
            "the tenant; a request needs a credential, and a path that is neither exempt nor without_tenant"
        )


class CrossTenantError(ContextError, PermissionError):
    """Code bound to one tenant used another's session, object or binding, or asked for the whole fleet.

    Remedy: name the bound tenant, or none. Operators' work on other tenants runs where no tenant is bound.
    """

    def __init__(self, what: str, *, bound: str, requested: str | None) -> None:
        """Name the refused action, the ``bound`` tenant and the ``requested`` one (slugs or ids).

        ``requested`` is None for the whole fleet.
        """
        reason = f"but it belongs to tenant {requested!r}" if requested is not None else "and this is for all tenants"
        super().__init__(f"{what} refused: bound to tenant {bound!r}, {reason}; leave its scope first")
        self.bound = bound
        self.requested = requested


class AdmissionEndedError(ContextError, PermissionError):
    """The credential that the running request was let in with is no longer valid: revoked, expired, or changed.

    ``reason`` says which, for operators; it must not reach the caller.

    Remedy: send a new request with a valid credential. Run work that outlives its request in its own context:
    ``asyncio.create_task(work(), context=contextvars.Context())``, with ``tenancy.scope(...)`` inside.
    """

    def __init__(self, reason: str, *, credential_id: str) -> None:
        """Record the ``reason`` and the public id of the credential."""
        super().__init__(
            "this request's credential is no longer valid; send a new request with a valid one, and run work that "
            "outlives its request in its own context"
        )
        self.reason = reason
        self.credential_id = credential_id


class InvalidNameError(ContextError, ValueError):
    """A key, a path or a channel is not a name of the bound tenant's own, or might not be.

    Remedy: use plain relative names; the tenant's prefix is added by itself.
    """

    def __init__(self, name: str, reason: str) -> None:
        """Say what is wrong with the ``name``."""
        super().__init__(f"{name[:200]!r} {reason}; use a plain relative name")
        self.name = name
        self.reason = reason


class UnprefixedError(ContextError, AttributeError):
    """A method of a wrapped client that would reach names of other tenants, or that is not known to reach none.

    Remedy: use one that works on single keys or paths, or a client of your own that never holds a tenant's data.
    """

    def __init__(self, client: str, method: str) -> None:
        """Name the wrapped ``client`` and its ``method``."""
        super().__init__(f"{client}.{method} is refused: it is not known to stay within one tenant's names")
        self.client = client
        self.method = method


# --- tenants --------------------------------------------------------------------------------------------------------


class TenantError(TenancyError):
    """Base of errors about one tenant. ``tenant`` is its slug, or its id if the slug is not known."""

    def __init__(self, message: str, *, tenant: str | UUID | None = None) -> None:
        """Attach the ``tenant`` (slug or id) to the message."""
        super().__init__(message)
        self.tenant = None if tenant is None else str(tenant)


def _shown(metadata: Mapping[str, Any]) -> str:
    return f"the metadata {str(dict(metadata))[:200]}"


class TenantNotFoundError(TenantError, LookupError):
    """The tenant does not exist, or has been purged."""

    def __init__(self, tenant: str | UUID | None = None, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Name the slug, the id or the ``metadata`` that was looked for."""
        message = f"tenant {str(tenant)!r} does not exist" if metadata is None else f"no tenant has {_shown(metadata)}"
        super().__init__(message, tenant=tenant)


class SeveralTenantsError(TenantError, LookupError):
    """One tenant was looked for by its metadata, and several match.

    Attributes:
        slugs: The first few of them, oldest first.
    """

    def __init__(self, metadata: Mapping[str, Any], slugs: tuple[str, ...]) -> None:
        """Name the ``metadata`` that was looked for, and the ``slugs`` that match."""
        super().__init__(
            f"several tenants have {_shown(metadata)}: {', '.join(slugs)}; look for more of it, or for a status as well"
        )
        self.slugs = slugs


class TenantExistsError(TenantError):
    """The slug is taken: by a tenant, by one being provisioned, or by one with a database that is not dropped yet."""

    def __init__(self, slug: str, *, reserved: bool = False) -> None:
        """Name the ``slug`` that is taken; ``reserved`` if it still redirects to a renamed tenant."""
        if reserved:
            message = (
                f"slug {slug!r} still redirects to a renamed tenant; choose another, or wait until the redirect ends"
            )
        else:
            message = f"tenant {slug!r} already exists; choose another slug"
        super().__init__(message, tenant=slug)
        self.reserved = reserved


class InvalidSlugError(TenantError, ValueError):
    """A slug is not 1 to 63 characters of a-z, 0-9 and inner hyphens that begin with a letter."""


class InvalidMetadataError(TenantError, ValueError):
    """Tenant metadata is not a JSON object, or is larger than allowed."""


class UnknownTierError(TenantError, ValueError):
    """A tier that the configuration does not define, or that is configured but not in force."""

    def __init__(self, tier: str, known: tuple[str, ...] = ()) -> None:
        """Name the ``tier`` and the ``known`` tiers; none where it is configured, but not in force."""
        if known:
            super().__init__(f"tier {tier!r} is not configured; known tiers: {', '.join(known)}")
        else:
            super().__init__(f"tier {tier!r} is not in force; run: tenancy tiers apply")
        self.tier = tier
        self.known = known


class TierChangedError(TenantError):
    """A tenant's tier is no longer the one that the change expected; nothing was changed."""

    def __init__(self, tenant: str, *, expected: str, found: str) -> None:
        """Name the ``tenant`` (slug), the ``expected`` tier and the one that was ``found``."""
        super().__init__(f"tenant {tenant!r} is now in tier {found!r}, not in {expected!r}", tenant=tenant)
        self.expected = expected
        self.found = found


class LoginNotBlockedError(TenantError):
    """A tenant is suspended or deleted, and the application refuses it; but its server did not block its login in time.

    Its connections may still be open. Remedy: run ``tenancy reconcile``, or wait for ``tenancy housekeeping``.
    """

    def __init__(self, tenant: str, status: str, reason: str) -> None:
        """Name the ``tenant`` (slug), its new ``status``, and the ``reason`` why its login is not blocked."""
        super().__init__(
            f"tenant {tenant!r} is {status}, but its login is not blocked ({reason}), and its connections may still be "
            "open; run: tenancy reconcile",
            tenant=tenant,
        )
        self.status = status
        self.reason = reason


_REMEDIES = {  # by the current status and the target, or by the current status alone
    ("deleted", ""): "; restore it first",
    ("provisioning", ""): "; wait until it has been created",
    ("active", "trial"): "; suspend it first",
    ("trial", "trial"): "; its trial can be extended: update(trial_ends_at=...), or tenancy update --trial-days",
}


class InvalidTransitionError(TenantError):
    """The lifecycle does not allow this change of status."""

    def __init__(self, tenant: str, current: str, target: str) -> None:
        """Name the ``tenant`` (slug), its ``current`` status and the ``target`` that was refused."""
        remedy = _REMEDIES.get((current, target)) or _REMEDIES.get((current, "")) or ""
        if target == "purged" and current not in ("deleted", "provisioning"):
            remedy = "; delete it first"
        super().__init__(f"tenant {tenant!r} cannot change from {current} to {target}{remedy}", tenant=tenant)
        self.current = current
        self.target = target


class TenantUnavailableError(TenantError):
    """The tenant exists, but its status does not admit sessions."""

    status: str = "unavailable"
    _state: str | None = None  # the status in a sentence, where its name alone does not fit

    def __init__(self, tenant: str, *, reason: str | None = None) -> None:
        """Name the ``tenant`` (slug) and, where an operator gave one, the ``reason``."""
        state = self._state or self.status
        super().__init__(f"tenant {tenant!r} is {state}" + (f": {reason}" if reason else ""), tenant=tenant)
        self.reason = reason


class TenantProvisioningError(TenantUnavailableError):
    """The tenant is still being created, or its schema upgraded for its first use; try again shortly."""

    status = "provisioning"
    _state = "not ready"

    def __init__(self, tenant: str, *, reason: str = "it is still being created") -> None:
        """Name the ``tenant`` (slug) and what it waits for."""
        super().__init__(tenant, reason=reason)


class TenantPausedError(TenantUnavailableError):
    """The tenant's database is being exchanged for another one, and a session has waited for that as long as it may.

    Remedy: try again after ``retry_after`` seconds. If it goes on, see ``tenancy operations list``.

    Attributes:
        retry_after: After how many seconds another attempt may succeed.
    """

    status = "paused"
    _state = "paused"

    def __init__(self, tenant: str) -> None:
        """Name the ``tenant`` (slug)."""
        super().__init__(tenant, reason="its database is being exchanged for another one; try again")
        self.retry_after = 2.0


class TenantRevisionError(TenantUnavailableError):
    """The tenant's schema is at a revision that this code cannot work with, or on the way to one.

    Remedy: wait for the migration that runs, or migrate the tenant; where newer code has migrated it, replace the code.

    Attributes:
        revision: Its revision, as the control database has it.
        retry_after: After how many seconds another attempt may succeed.
    """

    status = "revision"
    _state = "not served by this code"

    def __init__(self, tenant: str, *, reason: str, revision: str | None = None) -> None:
        """Name the ``tenant`` (slug), its ``revision`` and what this code works with."""
        super().__init__(tenant, reason=reason)
        self.revision = revision
        self.retry_after = 10.0


class TenantSuspendedError(TenantUnavailableError):
    """An operator suspended the tenant."""

    status = "suspended"


class TenantMaintenanceError(TenantUnavailableError):
    """The tenant is in maintenance; try again later."""

    status = "maintenance"
    _state = "in maintenance"


class TenantDeletedError(TenantUnavailableError):
    """The tenant is deleted (its data is kept until it is purged)."""

    status = "deleted"


class DomainError(TenancyError, ValueError):
    """A domain is malformed, not claimed, not verified, or another tenant's."""


# --- credentials and quotas -----------------------------------------------------------------------------------------


class CredentialError(TenancyError):
    """Base of errors about a credential: an API key, a token, a session. Never contains it."""


class InvalidCredentialError(CredentialError):
    """A credential is not valid, or there is none.

    The message is the same for a malformed, unknown, revoked or expired one; ``reason`` says which, for the audit log,
    and must not reach the caller.
    """

    def __init__(self, reason: str = "unknown", *, kind: str = "key", credential_id: str | None = None) -> None:
        """Record the ``reason``, the ``kind`` of credential and its public ``credential_id`` for the audit log."""
        super().__init__("the credential is not valid")
        self.reason = reason
        self.kind = kind
        self.credential_id = credential_id


class CredentialsUnavailableError(CredentialError):
    """A credential cannot be verified now: the identity provider's keys cannot be fetched.

    Remedy: see that the process reaches the address in the message; the next request tries again.
    """


class CrossOriginError(CredentialError, PermissionError):
    """A page of another origin sent a request with the cookie of a user who is logged in (CSRF).

    Remedy: where the page is the application's own, add its origin to ``TenancyMiddleware(trusted_origins=...)``.
    """

    def __init__(self, origin: str | None) -> None:
        """Name the ``origin`` of the page, where the browser sent it."""
        super().__init__("this request comes from a page of another origin, which may not use a cookie")
        self.origin = origin


class TenantNotAllowedError(CredentialError, PermissionError):
    """A credential does not allow the tenant that the request names, or allows none at all.

    ``requested`` is the name in the request, None where it names none.
    """

    def __init__(self, requested: str | None = None) -> None:
        """Record the ``requested`` tenant, which need not exist."""
        super().__init__(
            "this credential allows no tenant" if requested is None else "this credential does not allow this tenant"
        )
        self.requested = requested


class TenantNotNamedError(CredentialError):
    """A credential allows several tenants, and the request names none of them. ``slugs`` are those it may name.

    Remedy: name one, by the host, path or header that the middleware's resolvers read.
    """

    def __init__(self, slugs: tuple[str, ...]) -> None:
        """List the ``slugs``."""
        super().__init__(f"this credential allows {len(slugs)} tenants; name one of them in the request")
        self.slugs = slugs


class ApiKeyError(CredentialError):
    """Base of errors about an API key as such: issuing, rotating, revoking it. Never contains the key."""


class ApiKeyNotFoundError(ApiKeyError, LookupError):
    """There is no key with this id."""

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


class TooManyAttemptsError(CredentialError):
    """A source has presented too many invalid credentials; those that are already in use still work from there.

    Remedy: wait ``retry_after`` seconds.
    """

    def __init__(self, retry_after: float) -> None:
        """Give the seconds after which the source may try again."""
        super().__init__(f"too many invalid credentials; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class MissingScopeError(CredentialError, PermissionError):
    """The request's credential lacks a scope that the route requires."""

    def __init__(self, scope: str) -> None:
        """Name the missing ``scope``."""
        super().__init__(f"this credential lacks the scope {scope!r}")
        self.scope = scope


class MemberError(TenancyError):
    """Base of errors about members of tenants and invitations."""


class InvalidSubjectError(MemberError, ValueError):
    """A subject is empty, longer than 255 characters, or has characters that cannot be printed."""

    def __init__(self, what: str = "a subject") -> None:
        """Say ``what`` is malformed, without its text."""
        super().__init__(f"{what} must be 1 to 255 printable characters")


class UnknownRoleError(MemberError, ValueError):
    """A role is not one of ``members.roles``. ``known`` are those that are."""

    def __init__(self, roles: tuple[str, ...], known: tuple[str, ...]) -> None:
        """Name the unknown ``roles``, and those that are ``known``."""
        named = ", ".join(map(repr, roles))
        super().__init__(f"unknown roles: {named}; members.roles has {', '.join(map(repr, known)) or 'none'}")
        self.roles = roles
        self.known = known


class InvalidInvitationError(MemberError, PermissionError):
    """An invitation cannot be accepted.

    The message is the same for an unknown, forged, expired, withdrawn or accepted one; ``reason`` says which, for the
    audit log, and must not reach the caller.
    """

    def __init__(self, reason: str = "unknown") -> None:
        """Record the ``reason`` for the audit log."""
        super().__init__("the invitation is not valid; ask for another one")
        self.reason = reason


class InvitationNotFoundError(MemberError, LookupError):
    """There is no invitation with this id."""

    def __init__(self, invitation_id: UUID | str) -> None:
        """Name the ``invitation_id``."""
        super().__init__(f"invitation {str(invitation_id)!r} does not exist")
        self.invitation_id = str(invitation_id)


class InvitationAcceptedError(MemberError):
    """The invitation was accepted, so that it cannot be withdrawn.

    Remedy: remove the member; ``subject`` says who it is.
    """

    def __init__(self, invitation_id: UUID, *, subject: str) -> None:
        """Name the ``invitation_id``, and the ``subject`` that has accepted it."""
        super().__init__(f"invitation {str(invitation_id)!r} was accepted by {subject!r}; remove that member instead")
        self.invitation_id = str(invitation_id)
        self.subject = subject


class MalformedRequestError(TenancyError, ValueError):
    """A request names a tenant twice, or by a text that cannot be a slug, domain or id."""

    def __init__(self, where: str) -> None:
        """Say ``where`` the name was: a header, the path. The name itself is left out."""
        super().__init__(f"{where} is malformed or repeated")
        self.where = where


class SecretProviderError(TenancyError):
    """The provider of secrets (files, Vault, AWS) does not answer, or refuses. Never contains a secret."""


class SecretNotFoundError(SecretProviderError, LookupError):
    """The provider has no secret of this name."""

    def __init__(self, name: str, where: str) -> None:
        """Name the missing secret, and ``where`` it was looked up."""
        super().__init__(f"secret {name!r} does not exist in {where}")
        self.name = name
        self.where = where


class QuotaError(TenancyError):
    """Base of errors about quotas and usage."""


class UnknownQuotaError(QuotaError, ValueError):
    """Neither the tenant's tier nor an override gives the resource a limit."""

    def __init__(self, resource: str, *, tenant: str) -> None:
        """Name the ``resource`` and the ``tenant`` (slug)."""
        super().__init__(f"resource {resource!r} has no limit for tenant {tenant!r}; give its tier or the tenant one")
        self.resource = resource
        self.tenant = tenant


class QuotaExceededError(QuotaError):
    """The use would exceed the limit; nothing was counted."""

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
        """Give the ``limit``, what is ``used`` and ``requested``, when the ``period`` ends (UTC), and its kind."""
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
    """A usage record could not be sent. ``permanent`` if another attempt cannot succeed."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        """Say what failed, without secrets, and whether it is ``permanent``."""
        super().__init__(message)
        self.permanent = permanent


# --- isolation ------------------------------------------------------------------------------------------------------


class IsolationError(TenancyError):
    """A layer of isolation refused. This is an incident, not a user's mistake."""


class MarkerMismatchError(IsolationError):
    """A database's marker does not name the expected tenant. The connection was closed before any use."""

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
    """A stored secret cannot be opened: the encryption key is missing or wrong, or it is another tenant's."""


# --- routing --------------------------------------------------------------------------------------------------------


class RoutingError(TenancyError):
    """A tenant's database could not be reached."""


class UnknownServerError(RoutingError, LookupError):
    """A server has no row, or its address is neither in its row nor in this process's settings."""

    def __init__(self, server: str) -> None:
        """Name the ``server``."""
        super().__init__(
            f"server {server!r} is not known here; add it with: tenancy servers add {server}, or to "
            "TenancyConfig.servers; if another process has its address in its settings, put it into its row there: "
            f"tenancy servers update {server} --from-settings"
        )
        self.server = server


class CheckoutTimeoutError(RoutingError, SATimeoutError):
    """No connection became free within ``pool.checkout_timeout``, or before a sooner ``deadline``.

    Attributes:
        retry_after: After how many seconds another attempt may succeed.
    """

    def __init__(
        self, *, server: str, tenant: str, timeout: float, limit: int, setting: str = "pool.max_connections"
    ) -> None:
        """Name the ``server`` and ``tenant``, the ``timeout`` in seconds, the ``limit`` and the ``setting`` it is."""
        super().__init__(
            f"no connection to server {server!r} for tenant {tenant!r} within {timeout:g} s: "
            + (f"all {limit} are in use; close sessions sooner, or" if limit else "this process may have none;")
            + f" raise {setting}"
        )
        self.server = server
        self.tenant = tenant
        self.timeout = timeout
        self.limit = limit
        self.setting = setting
        self.retry_after = 1.0


class CheckoutRefusedError(CheckoutTimeoutError):
    """A request was refused a connection at once: it could not have one before its deadline, or too many wait already.

    It is a ``CheckoutTimeoutError``, so what handles that handles this: the request has had no connection either way,
    but it has not waited for nothing.

    Attributes:
        reason: "deadline", or "queue": as many requests of the tenant wait as ``pool.max_waiting_per_tenant`` allows.
        timeout: How long it would have waited in total, in seconds.
        expected: How long it would have had to wait from then on, at least; 0 where that is not known.
        left: How long it was until its deadline then, in seconds.
        waiting: How many requests of the tenant wait.
        retry_after: After how many seconds another attempt may succeed.
    """

    def __init__(
        self,
        *,
        server: str,
        tenant: str,
        timeout: float,
        limit: int,
        setting: str = "pool.max_connections",
        reason: str = "deadline",
        expected: float = 0.0,
        left: float = 0.0,
        waiting: int = 0,
        retry_after: float = 1.0,
    ) -> None:
        """Give what ``CheckoutTimeoutError`` has, and the attributes."""
        super().__init__(server=server, tenant=tenant, timeout=timeout, limit=limit, setting=setting)
        if reason == "queue":
            why = f"{waiting} of its requests wait already; raise pool.max_waiting_per_tenant, or slow the tenant down"
        elif expected:
            why = (
                f"it would take {expected:.3g} s or longer, and {left:.3g} s are left: {waiting} of its requests wait, "
                f"and all {limit} connections are in use; close sessions sooner, or raise {setting}"
            )
        else:
            why = "its deadline has passed, and no connection is free"
        self.args = (f"no connection to server {server!r} for tenant {tenant!r}: {why}",)
        self.reason = reason
        self.expected = expected
        self.left = left
        self.waiting = waiting
        self.retry_after = retry_after


class ServerUnavailableError(RoutingError):
    """A PostgreSQL server refused a new connection or did not answer. ``tenant`` is None for an administrative one.

    ``address`` is ``host:port/database``; ``reason`` is PostgreSQL's message with its SQLSTATE, or the system's.
    ``retry_after`` is the number of seconds after which another attempt makes sense, where the server's breaker is open
    and nothing was sent to the server.
    """

    def __init__(
        self,
        *,
        server: str,
        tenant: str | None = None,
        sqlstate: str | None = None,
        address: str | None = None,
        reason: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Name the ``server``, the ``tenant`` if there is one, and the ``sqlstate`` if PostgreSQL answered."""
        super().__init__(self._summary(server, tenant) + _details(address, reason, sqlstate))
        self.server = server
        self.tenant = tenant
        self.sqlstate = sqlstate
        self.address = address
        self.reason = reason
        self.retry_after = retry_after

    @staticmethod
    def _summary(server: str, tenant: str | None) -> str:
        return f"server {server!r} is not available" + (f" for tenant {tenant!r}" if tenant else "")


class ServerIdentityError(ServerUnavailableError):
    """A server's address leads to another PostgreSQL cluster than the one that its tenants are on.

    Remedy: correct the address. Where the server was moved to a new cluster on purpose (by dump and restore, or logical
    replication), run ``tenancy servers update <name> --accept-identity``.
    """


class ConnectionLimitError(ServerUnavailableError):
    """PostgreSQL accepted no further connection of a tenant (53300) within ``pool.checkout_timeout``.

    The limit holds for all processes together, and other processes use the connections.

    Attributes:
        limit: How many connections are allowed; None if PostgreSQL could not be asked.
        setting: The setting to raise.
    """

    def __init__(self, *, server: str, tenant: str, limit: int | None, setting: str) -> None:
        """Name the ``server``, the ``tenant``, the ``limit`` in connections and the ``setting`` to raise."""
        super().__init__(server=server, tenant=tenant, sqlstate="53300")
        number = "its" if limit is None else f"all {limit}"
        message = (
            f"server {server!r} accepts no further connection for tenant {tenant!r}: {number} connections are in use, "
            f"in all processes together; close sessions sooner, or raise {setting}"
        )
        self.args = (message,)
        self.limit = limit
        self.setting = setting


class LoginRefusedError(ServerUnavailableError):
    """The server answers, but refuses the login of the tenant's role: another attempt cannot succeed.

    The cause, by ``sqlstate``: 28P01, the stored password is not the role's; 28000, the role may not log in, as during
    a suspension, or pg_hba.conf refuses it; 42501, the role lacks CONNECT; 3D000, the database does not exist. Remedy,
    except for a suspension: run ``tenancy reconcile``.
    """

    @staticmethod
    def _summary(server: str, tenant: str | None) -> str:
        return f"server {server!r} refuses the login of tenant {tenant!r}"


def _details(address: str | None, reason: str | None, sqlstate: str | None) -> str:
    """What follows in a message: where, and why."""
    where = f" at {address}" if address else ""
    if reason:
        return f"{where}: {reason}"
    return where + (f" ({sqlstate})" if sqlstate else "")


# --- provisioning and migrations ------------------------------------------------------------------------------------


class ProvisioningError(TenancyError):
    """Creating or removing a tenant's database failed; it was undone, or is left to ``tenancy reconcile``."""

    def __init__(self, message: str, *, tenant: str | None = None, step: str | None = None) -> None:
        """Attach the ``tenant`` (slug) and the ``step`` that failed."""
        super().__init__(message)
        self.tenant = tenant
        self.step = step


class DatabaseExistsError(ProvisioningError):
    """A database or role of that name already exists, and is never taken over."""


class SeedError(ProvisioningError):
    """A seed failed, or took too long. Nothing of it remains; a creation that it was part of is undone."""

    def __init__(self, message: str, *, seed: str, tenant: str | None = None, step: str | None = None) -> None:
        """Attach the name of the ``seed``."""
        super().__init__(message, tenant=tenant, step=step)
        self.seed = seed


class ReferenceDataError(ProvisioningError):
    """The rows of a reference table could not be written to a database. Nothing was changed there."""

    def __init__(self, message: str, *, reference: str, tenant: str | None = None, step: str | None = None) -> None:
        """Attach the name of the ``reference`` table."""
        super().__init__(message, tenant=tenant, step=step)
        self.reference = reference


class FleetSeedError(ProvisioningError):
    """Some tenants did not get all seeds and reference data; the others did."""

    def __init__(self, failures: Mapping[str, str], *, total: int) -> None:
        """Give the reason by the slug of each tenant that failed; ``total`` is how many the run was for."""
        names = ", ".join(sorted(failures)[:5]) + (", ..." if len(failures) > 5 else "")
        super().__init__(f"{len(failures)} of {counted(total)} failed to be seeded: {names}")
        self.failures = dict(failures)
        self.total = total


class TemplateError(ProvisioningError):
    """The template database could not be built."""


class ExtensionUnavailableError(TemplateError):
    """A server does not have an extension that the setting ``extensions`` names. Install its package there.

    Attributes:
        server: The server.
        extensions: The extensions that it lacks.
    """

    def __init__(self, extensions: Sequence[str], *, server: str) -> None:
        """Name the extensions and the server."""
        self.extensions = tuple(extensions)
        self.server = server
        named = ", ".join(map(repr, self.extensions))
        super().__init__(
            f"server {server!r} does not have the extension {named} of the setting extensions; install the package "
            "on that server (a managed service has a list of those it allows), or remove the name from the setting"
        )


class MigrationError(TenancyError):
    """A schema migration failed."""


class FleetMigrationError(MigrationError):
    """Some tenants did not reach the target; the others did."""

    def __init__(self, failures: Mapping[str, str], *, total: int) -> None:
        """Give the reason by the slug of each tenant that failed; ``total`` is how many were to be migrated."""
        names = ", ".join(sorted(failures)[:5]) + (", ..." if len(failures) > 5 else "")
        super().__init__(f"{len(failures)} of {counted(total)} failed to migrate: {names}")
        self.failures = dict(failures)
        self.total = total


class PreflightError(MigrationError):
    """Checks of pending revisions do not pass for some tenants; no tenant was touched."""

    def __init__(self, failures: Mapping[str, str], *, total: int) -> None:
        """Give what did not pass by the slug of each tenant; ``total`` is how many were asked."""
        shown = [f"{slug}: {reason}" for slug, reason in list(failures.items())[:3]]
        more = ["..."] if len(failures) > 3 else []
        super().__init__(
            f"preflight: {len(failures)} of {counted(total)} failed, and none was touched: {'; '.join(shown + more)}"
        )
        self.failures = dict(failures)
        self.total = total


class RunNotFoundError(MigrationError, LookupError):
    """No run of the fleet has the number that was given."""

    def __init__(self, run: int) -> None:
        """Give the number."""
        super().__init__(f"there is no run {run}; list them with: tenancy migrate runs")
        self.run = run


class RunStateError(MigrationError):
    """A run of the fleet cannot be cancelled, resumed, retried or joined, because of its state.

    Or none can be started beside it; its number is ``run``.
    """

    def __init__(self, run: int, state: str, action: str, *, message: str | None = None) -> None:
        """Give the run's number and state, and what was to be done, as "cancelled"; or the whole message."""
        super().__init__(message or f"run {run} is {state}, and cannot be {action}")
        self.run = run
        self.state = state


class RunConflictError(MigrationError):
    """A run of the fleet that is under way moves tenants elsewhere; no tenant was touched."""

    def __init__(self, run: int, command: str, target: str) -> None:
        """Give the number, the command and the target of the run that is under way."""
        super().__init__(
            f"run {run} ({command} {target}) is under way, and moves some of these tenants elsewhere; no tenant was "
            f"touched: wait for its end, or stop it with: tenancy migrate cancel {run}"
        )
        self.run = run
        self.command = command
        self.target = target


class RunMismatchError(MigrationError):
    """This process has other revisions, options or ``-x`` arguments than the run was started with."""

    def __init__(self, run: int, reason: str) -> None:
        """Give the run's number, and what differs."""
        super().__init__(f"run {run} was started with {reason}; no tenant was touched")
        self.run = run
        self.reason = reason


class UndoRefusedError(MigrationError):
    """A run of the fleet cannot be undone as it is; no tenant was touched."""

    def __init__(self, run: int, *, irreversible: Mapping[str, str], moved: Mapping[str, str]) -> None:
        """Give by revision why it cannot be taken back, and by slug why it is not certain what to do with a tenant."""
        parts = [f"revision {revision}: {reason}" for revision, reason in irreversible.items()]
        if parts:
            parts[-1] += " (take its changes back by hand, or add --stamp-irreversible)"
        alike: dict[str, list[str]] = {}
        for slug, reason in moved.items():
            alike.setdefault(reason, []).append(slug)
        for reason, slugs in list(alike.items())[:5]:
            more = f" and {len(slugs) - 5} more" if len(slugs) > 5 else ""
            parts.append(f"tenant{'s' * (len(slugs) > 1)} {', '.join(slugs[:5])}{more}: {reason}")
        if moved:
            parts[-1] += f"{' and others' if len(alike) > 5 else ''} (add --leave-moved to undo it for the others)"
        super().__init__(f"run {run} cannot be undone, and no tenant was touched: {'; '.join(parts)}")
        self.run = run
        self.irreversible = dict(irreversible)
        self.moved = dict(moved)


class SchemaDriftError(MigrationError):
    """Tenants' schemas are not what their revisions say; nothing was changed."""

    def __init__(self, drifted: Iterable[str], errors: Mapping[str, str], *, total: int) -> None:
        """Give the slugs of those that drift, and the reason by the slug of each that could not be compared.

        ``total`` is how many were compared.
        """
        self.drifted = tuple(drifted)
        self.failures = dict(errors)
        self.total = total
        names = [*self.drifted, *self.failures]
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        super().__init__(
            f"of {counted(total)}, {len(self.drifted)} drifted and {len(self.failures)} could not be compared: "
            f"{listed}; nothing was changed: run tenancy migrate drift, which shows the differences"
        )


class RehearsalError(MigrationError):
    """A migration failed on clones of tenants, or led to another schema than new tenants have; none was changed."""

    def __init__(self, failures: Mapping[str, str], *, total: int) -> None:
        """Give the reason by the slug of each tenant that was cloned; ``total`` is how many were."""
        names = ", ".join(sorted(failures)[:5]) + (", ..." if len(failures) > 5 else "")
        super().__init__(f"the rehearsal failed for clones of {len(failures)} of {counted(total)}: {names}")
        self.failures = dict(failures)
        self.total = total


_FINDINGS_SHOWN = 10


class OperationError(TenancyError):
    """A backup, restore, clone, adoption, move or export failed, or is refused."""


class OperationNotFoundError(OperationError, LookupError):
    """No operation has the number that was given."""

    def __init__(self, operation: int) -> None:
        """Give the number."""
        super().__init__(f"there is no operation {operation}; list them with: tenancy operations list")
        self.operation = operation


class ContentsRefusedError(OperationError):
    """Contents from elsewhere have code or rights that their revision does not make: they would raise rights."""

    def __init__(
        self, revision: str | None, findings: Sequence[str], *, may_accept: bool = True, remedy: str = ""
    ) -> None:
        """Give the revision of the contents, and what was found; ``may_accept``: an operator may let it through.

        ``remedy`` says what helps where it may not be accepted.
        """
        shown = "; ".join(findings[:_FINDINGS_SHOWN])
        more = f" and {len(findings) - _FINDINGS_SHOWN} more" if len(findings) > _FINDINGS_SHOWN else ""
        made = "" if revision is None else f", which revision {revision} does not make"
        if may_accept:
            remedy = "look at them, and accept them with --accept-differences (accept=True in Python)"
        super().__init__(f"the contents are refused: they have {shown}{more}{made}{'; ' if remedy else ''}{remedy}")
        self.revision = revision
        self.findings = tuple(findings)
        self.may_accept = may_accept


class OperationStateError(OperationError):
    """An operation has ended, waits for a decision, or is done by another process now."""


class OperationConflictError(OperationError):
    """Another operation moves the tenant's data now, or waits for a decision."""

    def __init__(self, tenant: str, kind: str, operation: int, state: str) -> None:
        """Give the tenant's slug, and the other operation's kind, number and state."""
        super().__init__(
            f"operation {operation}, a {kind} of tenant {tenant!r}, is {state}; end it first, "
            f"see: tenancy operations show {operation}"
        )
        self.tenant = tenant
        self.kind = kind
        self.operation = operation
        self.state = state


class BackupError(OperationError):
    """A backup cannot be made, read or removed."""


class BackupNotFoundError(BackupError, LookupError):
    """There is no such backup, or its store does not have it any more."""


class BackupUnderWayError(BackupError):
    """Another process backs the tenant up now, or has done so since it was found to be due."""

    def __init__(self) -> None:
        """Use the standard message."""
        super().__init__("it is being backed up now by another process, or is not due any more")


class BackupDamagedError(BackupError):
    """A backup is not what was written: its signature, a checksum or its encryption is wrong.

    Remedy: take an older backup, and find out who can write to the store.
    """


class BackupKeyDestroyedError(BackupError):
    """The key of a backup was destroyed, with the tenant's erasure: nobody can read it."""


class FleetBackupError(BackupError):
    """Some tenants could not be backed up; the others were.

    Attributes:
        reasons: Why, by slug.
    """

    def __init__(self, reasons: Mapping[str, str], done: int) -> None:
        """Give the reasons by slug, and how many were backed up."""
        first, reason = next(iter(reasons.items()))
        more = f", and {counted(len(reasons) - 1)} more" if len(reasons) > 1 else ""
        super().__init__(f"{first}: {reason}{more}; {counted(done)} backed up")
        self.reasons = dict(reasons)
        self.done = done


class RecoveryTargetError(OperationError, ValueError):
    """Nothing that is kept reaches the time that was asked for. Nothing was started."""


class RecoveryError(OperationError):
    """A server could not be recovered, or a base backup could not be taken."""


class AdoptionError(OperationError):
    """An existing database, schema or set of rows cannot become a tenant. It is as it was."""


class AdoptionDifferencesError(AdoptionError):
    """What is to become a tenant has another schema than its revision; nothing was changed."""

    def __init__(self, tenant: str, source: str, revision: str | None, differences: Sequence[str]) -> None:
        """Give the tenant's slug, the source, its revision, and the differences in words."""
        count = len(differences)
        listed = "; ".join(differences[:3]) + ("; ..." if count > 3 else "")
        super().__init__(
            f"{source} is not what revision {revision or 'base'} makes, in {count} "
            f"difference{'s' * (count != 1)}: {listed}; nothing was changed: correct the source, name its revision, or "
            "accept the differences"
        )
        self.tenant = tenant
        self.source = source
        self.revision = revision
        self.differences = tuple(differences)


class ErasureError(OperationError):
    """A tenant's erasure is not complete, so that nothing is certified; or a certificate is not valid."""


class AnonymisationError(OperationError):
    """The rules of an anonymisation cannot be followed; no clone was made."""

    def __init__(self, message: str, *, columns: Sequence[str]) -> None:
        """Give the message, and the columns that it is about, as ``schema.table.column``."""
        super().__init__(message)
        self.columns = tuple(columns)


class ExportError(OperationError):
    """An export would not be whole, or cannot be written to that place. What was written is not a complete archive."""


class ExportRunningError(ExportError):
    """Another export of the tenant is under way; one at a time is made on request."""

    def __init__(self, tenant: str, operation: int) -> None:
        """Give the tenant's slug, and the number of the export that is under way."""
        super().__init__(f"operation {operation}, an export of tenant {tenant!r}, is under way; wait for its end")
        self.tenant = tenant
        self.operation = operation


class JobLostError(TenancyError):
    """This process could not renew its claim on a job in time, so that another one does it by now."""

    def __init__(self) -> None:
        """Use the standard message."""
        super().__init__("the claim could not be renewed in time; another process continues it")


class ReadOnlyError(TenancyError):
    """A read-only session was to write an object, or to begin or end a transaction by a statement. Nothing was sent.

    An object is refused when it is added, deleted or flushed, and when the session ends with one that is changed.
    What PostgreSQL refuses in such a session is SQLAlchemy's ``DBAPIError``, with SQLSTATE 25006.
    """


class QueryError(TenancyError):
    """A query over the fleet was refused in one tenant's database before it was executed, or its commit is in doubt."""


class FleetQueryError(TenancyError):
    """A query failed for some tenants. Those that answered were yielded before.

    Attributes:
        failures (tuple[QueryFailure, ...]): The failed tenants, each with its SQLSTATE and PostgreSQL's message.
        total (int): How many tenants were asked.
    """

    def __init__(self, failures: Sequence[QueryFailure], *, total: int) -> None:
        """List the failures, in the order in which they happened."""
        shown = "; ".join(f"{one.slug}: {one.message}" for one in failures[:3]) + ("; ..." if len(failures) > 3 else "")
        super().__init__(f"the query failed for {len(failures)} of {counted(total)}: {shown}")
        self.failures = tuple(failures)
        self.total = total


class TaskRefusedError(TenancyError):
    """A task that has arrived from a queue must not run, now or ever.

    Attributes:
        task: The task's name.
        reason: "suspended", "purged", "forged", ...; the values of ``tasks.Reason``.
        outcome: What is done with it: "retry", "reject" or "drop".
        tenant: The tenant's slug, where it is known.
        retry_seconds: When it is tried again; None where it is not.
    """

    def __init__(
        self,
        task: str,
        reason: str,
        outcome: str = "reject",
        tenant: str | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        """Name the ``task``, the ``reason``, the ``outcome`` and the ``tenant`` (slug)."""
        # result backends keep an error as its class and ``args``
        super().__init__(task, reason, outcome, tenant, retry_seconds)
        self.task = task
        self.reason = reason
        self.outcome = outcome
        self.tenant = tenant
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        """Say why, for which tenant."""
        named = f" for tenant {self.tenant!r}" if self.tenant else ""
        return f"task {self.task!r}{named} must not run: {_TASK_REASONS.get(self.reason, self.reason)}"


_TASK_REASONS = {
    "provisioning": "the tenant is being provisioned",
    "revision": "the tenant's schema is at a revision that this code cannot work with",
    "maintenance": "the tenant is in maintenance",
    "suspended": "the tenant is suspended",
    "deleted": "the tenant is deleted",
    "purged": "the tenant does not exist any more",
    "unavailable": "the control database does not answer",
    "forged": "its header was not signed for this message by this installation",
    "cross-tenant": "it carries what is another tenant's",
    "no-tenant": "it needs a tenant, and was sent with none bound",
    "tenant-bound": "it is an operator's task, and a tenant is bound",
}


class AuditError(TenancyError):
    """Base of errors about the audit log."""


class AuditChainError(AuditError):
    """The audit log's hash chain is broken at entry ``sequence``."""

    def __init__(self, message: str, *, sequence: int) -> None:
        """Name the first bad ``sequence`` number."""
        super().__init__(message)
        self.sequence = sequence
