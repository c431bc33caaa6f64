"""An admission: whether the credential that a request was let in with still holds, and who hears when it does not.

State without I/O; ``admissions`` keeps all of them and asks the control database. It knows this module, not the other
way round: what an admission needs of it is in a ``Monitor``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace

from ..errors import AdmissionEndedError, TenancyError
from ..keys.networks import Network, is_admitted
from ..registry.lifecycle import check_usable
from ..tenant import Status, Tenant

logger = logging.getLogger("tenancy_orm.directory")

_ALL_SCOPES = "*"


@dataclass(frozen=True, slots=True)
class CredentialState:
    """What the control database said of a credential when it was ``asked``.

    ``asked`` and ``expires`` are times of the directory's clock; ``secret`` is what the credential is compared with,
    and the version of how.
    """

    credential_id: str
    tenant: Tenant
    read_at: float
    scopes: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    secret: tuple[str | None, bytes] = field(default=(None, b""), repr=False)
    revoked: bool = False
    expires: float | None = None


@dataclass(frozen=True, slots=True)
class AdmissionEnd:
    """Why an admission ended, in one word, and the error that refuses what is done with it from then on."""

    credential_id: str
    reason: str
    error: TenancyError

    @property
    def by_status(self) -> bool:
        """Whether the tenant's status ended it, rather than the credential."""
        return not isinstance(self.error, AdmissionEndedError)


@dataclass(slots=True, eq=False)
class Monitor:
    """What all admissions of a process have in common, and what they call.

    Args:
        clock: The directory's.
        note: Keeps a new admission, so that it is found when its credential or tenant changes.
        doubt: Has one verified, soon; from any thread.
        watch: Has one end at its time, and when it cannot be verified for too long; called again when its time changed.
        unwatch: Takes back ``watch``.
        generation: Counts how often any credential may have changed unheard.
    """

    clock: Callable[[], float]
    register: Callable[[Admission], None]
    verify: Callable[[Admission], None]
    watch: Callable[[Admission], None]
    unwatch: Callable[[Admission], None]
    generation: int = 0


class Admission:
    """Whether a credential that was looked up still holds, for those who were let in with it.

    All requests that found the same entry of the directory share one, whatever their source. A credential that is
    bound to networks has one for each source, and each websocket has one of its own.

    Args:
        monitor: Of those who keep it.
        granted: What was known of the credential when it was let in.
        source: The peer's address.
        shared: Whether it is of any source, so that ``source`` says nothing.
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
        """When the control database was asked last, and said that it holds."""
        self.generation = monitor.generation
        self.ended: AdmissionEnd | None = None
        """Why it does not hold any more; None while it does, as far as is known."""

    def __repr__(self) -> str:
        """Name its credential, and tell whether it holds."""
        state = "holds" if self.ended is None else f"ended: {self.ended.reason}"
        return f"<Admission of {self.granted.credential_id} {state}>"

    def for_source(self, source: str | None) -> Admission:
        """An admission by the same credential for one source alone."""
        if not self.shared and self.source == source:
            return self
        derived = Admission(self._monitor, self.granted, source=source, shared=False)
        derived.ended, derived.generation, derived.verified = self.ended, self.generation, self.verified
        derived.secret, derived.expires = self.secret, self.expires
        self._monitor.register(derived)
        return derived

    def check(self) -> None:
        """Refuse what is done with it once it has ended. Called for every statement.

        Raises:
            AdmissionEndedError: the credential does not hold any more.
            TenantUnavailableError, TenantNotFoundError: the tenant's status admits nobody any more.
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
        return _end_because("expired", self.granted.credential_id)

    # --- watching: of connections that stay open --------------------------------------------------------------------

    @property
    def watched(self) -> bool:
        """Whether anyone is called when it ends."""
        return bool(self._watchers)

    def watch(self, watcher: Callable[[AdmissionEnd], None]) -> AdmissionEnd | None:
        """Have ``watcher`` called once, in the event loop, when it ends; where it has ended, return why instead."""
        ended = self.ended or self._expired()
        if ended is None:
            self._watchers.add(watcher)
            self._monitor.watch(self)
            self._verify_if_outdated()
        return ended

    def unwatch(self, watcher: Callable[[AdmissionEnd], None]) -> None:
        """Take back ``watch``."""
        self._watchers.discard(watcher)
        if not self._watchers:
            self._monitor.unwatch(self)

    def expire(self) -> bool:
        """End it if its time is over, and tell whether it is."""
        ended = self._expired()
        if ended is not None:
            self.end(ended)
        return ended is not None

    def end_unverified(self) -> None:
        """End it, since nobody could tell for too long whether it holds."""
        self.end(_end_because("unverified", self.granted.credential_id))

    # --- what is learned of it --------------------------------------------------------------------------------------

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
        """Refuse what is done with it from now on, and call those who watch it."""
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

    def _why_ended(self, now: CredentialState | None) -> AdmissionEnd | None:
        granted = self.granted
        reason = None
        if now is None:
            reason = "unknown"
        elif now.revoked:
            reason = "revoked"
        elif now.tenant.id != granted.tenant.id:
            reason = "tenant"
        elif now.expires is not None and self._monitor.clock() >= now.expires:
            reason = "expired"
        elif now.secret != self.secret and now.secret[0] == self.secret[0]:
            # of another version it is the same secret, digested under the current pepper
            reason = "secret"
        elif not granted.scopes <= now.scopes and _ALL_SCOPES not in now.scopes:
            reason = "scope"
        if now is None or reason is not None:
            return _end_because(reason or "unknown", granted.credential_id)
        try:
            # who was let in during maintenance is an operator
            check_usable(now.tenant, operator=granted.tenant.status is Status.MAINTENANCE)
        except TenancyError as error:
            return AdmissionEnd(granted.credential_id, now.tenant.status.value, error.with_traceback(None))
        # those who share one came from anywhere: nobody has written down from where
        if now.networks != granted.networks and not (now.networks == () or self._is_inside(now.networks)):
            return _end_because("network", granted.credential_id)
        return None

    def _is_inside(self, networks: tuple[Network, ...]) -> bool:
        return not self.shared and is_admitted(self.source, networks)


def tenant_for_source(tenant: Tenant, source: str | None) -> Tenant:
    """Return a tenant whose admission is of ``source`` alone; as it is where it has none."""
    admission = tenant.admission
    return replace(tenant, admission=admission.for_source(source)) if isinstance(admission, Admission) else tenant


def _end_because(reason: str, credential_id: str) -> AdmissionEnd:
    return AdmissionEnd(credential_id, reason, AdmissionEndedError(reason, credential_id=credential_id))


__all__ = ["Admission", "AdmissionEnd", "CredentialState", "Monitor", "tenant_for_source"]
