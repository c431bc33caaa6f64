"""An admission: whether the credential that a request was admitted with is still valid, and who is called when it ends.

State without I/O. ``admissions`` holds all admissions and queries the control database. This module does not import it:
an admission calls it through a ``Monitor``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import dataclass, field, replace

from ..errors import AdmissionEndedError, TenancyError
from ..keys.networks import Network, is_in_networks
from ..registry.lifecycle import check_usable
from ..tenant import Status, Tenant
from .credential import ALL_SCOPES, Credential

logger = logging.getLogger("tenancy_orm.directory")


@dataclass(frozen=True, slots=True)
class CredentialState:
    """What the control database said about a credential at ``read_at``.

    ``read_at`` (before the query was sent) and ``expires`` are times of the directory's clock. ``secret`` is the
    digest's version and the digest. ``tenant`` is None where the request is bound to none. ``credential`` is a token,
    session or visitor as it was authenticated, None for a key; ``tags`` are what else it is found by when something
    changes. ``credential_id`` is the key's id, or unique in this process.
    """

    credential_id: str
    tenant: Tenant | None
    read_at: float
    scopes: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    secret: tuple[str | None, bytes] = field(default=(None, b""), repr=False)
    revoked: bool = False
    expires: float | None = None
    credential: Credential | None = None
    tags: tuple[Hashable, ...] = ()

    @property
    def public_id(self) -> str:
        """The id of the credential as people know it."""
        return self.credential_id if self.credential is None else self.credential.public_id


@dataclass(frozen=True, slots=True)
class AdmissionEnd:
    """Why an admission ended: ``reason`` in one word, and the error that every later use raises."""

    credential_id: str
    reason: str
    error: TenancyError

    @property
    def by_status(self) -> bool:
        """Whether the tenant's status ended it, rather than the credential."""
        return not isinstance(self.error, AdmissionEndedError)


@dataclass(slots=True, eq=False)
class Monitor:
    """What all admissions of a process share: the clock, a counter, and the functions that they call.

    Args:
        clock: The directory's.
        register: Keeps a new admission, so that it is found when its credential or tenant changes.
        verify: Schedules the verification of an admission. Safe to call from any thread.
        watch: Ends an admission when it expires, or when it cannot be verified for too long. Called again when the
            time of its expiry changed.
        unwatch: Undoes ``watch``.
        generation: Increased each time that changes of credentials may have been missed.
    """

    clock: Callable[[], float]
    register: Callable[[Admission], None]
    verify: Callable[[Admission], None]
    watch: Callable[[Admission], None]
    unwatch: Callable[[Admission], None]
    generation: int = 0


class Admission:
    """Whether a credential is still valid for the requests that were admitted with it.

    All requests that found the same entry of the directory share one admission, whatever their source. A credential
    that is bound to networks has one for each source, and each websocket has its own.

    Args:
        monitor: Shared by all admissions of the process.
        granted: The credential's state when it was admitted.
        source: The peer's address.
        shared: Whether requests from any source share it; ``source`` is then ignored.
    """

    __slots__ = (
        "__weakref__",
        "_monitor",
        "_watchers",
        "ended",
        "expires",
        "generation",
        "granted",
        "secret",
        "shared",
        "source",
        "verified",
    )

    def __init__(self, monitor: Monitor, granted: CredentialState, *, source: str | None, shared: bool) -> None:
        self._monitor = monitor
        self._watchers: set[Callable[[AdmissionEnd], None]] = set()
        self.granted = granted
        self.source = source
        self.shared = shared
        self.secret = granted.secret
        self.expires = granted.expires
        self.verified = granted.read_at
        """When the control database last confirmed it, by the directory's clock."""
        self.generation = monitor.generation
        self.ended: AdmissionEnd | None = None
        """Why it ended; None while it is valid, as far as is known."""

    def __repr__(self) -> str:
        """Name its credential, and say whether it is valid."""
        state = "valid" if self.ended is None else f"ended: {self.ended.reason}"
        return f"<Admission of {self.granted.public_id} {state}>"

    def for_source(self, source: str | None) -> Admission:
        """Return an admission of the same credential for one source alone."""
        if not self.shared and self.source == source:
            return self
        derived = Admission(self._monitor, self.granted, source=source, shared=False)
        derived.ended, derived.generation, derived.verified = self.ended, self.generation, self.verified
        derived.secret, derived.expires = self.secret, self.expires
        self._monitor.register(derived)
        return derived

    def check(self) -> None:
        """Raise the reason once it has ended. Called for every statement.

        Raises:
            AdmissionEndedError: the credential is no longer valid.
            TenantUnavailableError, TenantNotFoundError: the tenant's status no longer admits anyone.
        """
        if self.ended is None and self.expires is None and self.generation == self._monitor.generation:
            return
        self._verify_if_outdated()
        ended = self.ended or self._expired()
        if ended is not None:
            raise copy(ended.error)

    def _verify_if_outdated(self) -> None:
        if self.generation != self._monitor.generation:
            self._monitor.verify(self)

    def _expired(self) -> AdmissionEnd | None:
        if self.expires is None or self._monitor.clock() < self.expires:
            return None
        return _end_because("expired", self.granted.public_id)

    # --- watching: for connections that stay open -------------------------------------------------------------------

    @property
    def watched(self) -> bool:
        """Whether anyone is called when it ends."""
        return bool(self._watchers)

    def watch(self, watcher: Callable[[AdmissionEnd], None]) -> AdmissionEnd | None:
        """Call ``watcher`` once, in the event loop, when it ends. Returns the reason if it has ended already."""
        ended = self.ended or self._expired()
        if ended is None:
            self._watchers.add(watcher)
            self._monitor.watch(self)
            self._verify_if_outdated()
        return ended

    def unwatch(self, watcher: Callable[[AdmissionEnd], None]) -> None:
        """Undo ``watch``."""
        self._watchers.discard(watcher)
        if not self._watchers:
            self._monitor.unwatch(self)

    def expire(self) -> bool:
        """End it if it has expired; returns whether it has."""
        ended = self._expired()
        if ended is not None:
            self.end(ended)
        return ended is not None

    def end_unverified(self) -> None:
        """End it because it could not be verified for too long."""
        self.end(_end_because("unverified", self.granted.public_id))

    # --- verifying --------------------------------------------------------------------------------------------------

    def verify(self, state: CredentialState | None) -> None:
        """End it where the credential's current ``state`` no longer admits it (None: there is no such credential)."""
        if self.ended is not None or (state is not None and state.read_at < self.granted.read_at):
            return
        ended = self._why_ended(state)
        if ended is not None:
            self.end(ended)
        elif state is not None:
            self.secret, self.expires = state.secret, state.expires
            self.verified = max(self.verified, state.read_at)
            if self._watchers:
                self._monitor.watch(self)

    def end(self, ended: AdmissionEnd) -> None:
        """End it: every later ``check`` raises, and every watcher is called."""
        if self.ended is not None:
            return
        self.ended = ended
        watchers, self._watchers = self._watchers, set()
        self._monitor.unwatch(self)
        for watcher in watchers:
            try:
                watcher(ended)
            except Exception:
                logger.exception("an open connection could not be ended")

    def _why_ended(self, state: CredentialState | None) -> AdmissionEnd | None:
        granted = self.granted
        reason = None
        if state is None:
            reason = "unknown"
        elif state.revoked:
            reason = "revoked"
        elif state.tenant != granted.tenant:
            reason = "tenant"
        elif state.expires is not None and self._monitor.clock() >= state.expires:
            reason = "expired"
        elif state.secret != self.secret and state.secret[0] == self.secret[0]:
            # with another version it is the same secret, digested under the current pepper
            reason = "secret"
        elif not granted.scopes <= state.scopes and ALL_SCOPES not in state.scopes:
            reason = "scope"
        if state is None or reason is not None:
            return _end_because(reason or "unknown", granted.public_id)
        if state.tenant is not None and granted.tenant is not None:
            try:
                # whoever was admitted during maintenance is an operator
                check_usable(state.tenant, operator=granted.tenant.status is Status.MAINTENANCE)
            except TenancyError as error:
                return AdmissionEnd(granted.public_id, state.tenant.status.value, error.with_traceback(None))
        # the sources of a shared admission are not recorded
        if state.networks != granted.networks and not (state.networks == () or self._is_inside(state.networks)):
            return _end_because("network", granted.public_id)
        return None

    def _is_inside(self, networks: tuple[Network, ...]) -> bool:
        return not self.shared and is_in_networks(self.source, networks)


def tenant_for_source(tenant: Tenant, source: str | None) -> Tenant:
    """Return the tenant with an admission for ``source`` alone; unchanged where it has no admission."""
    admission = tenant.admission
    return replace(tenant, admission=admission.for_source(source)) if isinstance(admission, Admission) else tenant


def _end_because(reason: str, credential_id: str) -> AdmissionEnd:
    return AdmissionEnd(credential_id, reason, AdmissionEndedError(reason, credential_id=credential_id))


__all__ = ["Admission", "AdmissionEnd", "CredentialState", "Monitor", "tenant_for_source"]
