"""An admission: whether the credential that a request was let in with still holds, and who hears when it does not.

State without I/O; ``admissions`` keeps all of them and asks the control database. It knows this module, not the other
way round: what an admission needs of it is in a ``Keeper``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace

from ..errors import AdmissionEndedError, TenancyError
from ..keys.networks import Network, is_in_networks
from ..registry.lifecycle import check_usable
from ..tenant import Status, Tenant

logger = logging.getLogger("tenancy_orm.directory")

_ALL_SCOPES = "*"


@dataclass(frozen=True, slots=True)
class Standing:
    """What the control database said of a credential when it was ``asked``.

    ``asked`` and ``expires`` are times of the directory's clock; ``secret`` is what the credential is compared with,
    and the version of how.
    """

    credential_id: str
    tenant: Tenant
    asked: float
    scopes: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    secret: tuple[str | None, bytes] = field(default=(None, b""), repr=False)
    revoked: bool = False
    expires: float | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """Why an admission ended, in one word, and the error that refuses what is done with it from then on."""

    credential_id: str
    reason: str
    error: TenancyError

    @property
    def by_status(self) -> bool:
        """Whether the tenant's status ended it, rather than the credential."""
        return not isinstance(self.error, AdmissionEndedError)


@dataclass(slots=True, eq=False)
class Keeper:
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
    note: Callable[[Admission], None]
    doubt: Callable[[Admission], None]
    watch: Callable[[Admission], None]
    unwatch: Callable[[Admission], None]
    generation: int = 0


class Admission:
    """Whether a credential that was looked up still holds, for those who were let in with it.

    All requests that found the same entry of the directory share one, whatever their source. A credential that is
    bound to networks has one for each source, and each websocket has one of its own.

    Args:
        keeper: Of those who keep it.
        granted: What was known of the credential when it was let in.
        source: The peer's address.
        shared: Whether it is of any source, so that ``source`` says nothing.
    """

    __slots__ = (
        "__weakref__",
        "_keeper",
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

    def __init__(self, keeper: Keeper, granted: Standing, *, source: str | None, shared: bool) -> None:
        self._keeper = keeper
        self._watchers: set[Callable[[Ended], None]] = set()
        self.granted = granted
        self.source = source
        self.shared = shared
        self.secret = granted.secret
        self.expires = granted.expires
        self.verified = granted.asked
        """When the control database was asked last, and said that it holds."""
        self.generation = keeper.generation
        self.ended: Ended | None = None
        """Why it does not hold any more; None while it does, as far as is known."""

    def __repr__(self) -> str:
        """Name its credential, and tell whether it holds."""
        state = "holds" if self.ended is None else f"ended: {self.ended.reason}"
        return f"<Admission of {self.granted.credential_id} {state}>"

    def of(self, source: str | None) -> Admission:
        """An admission by the same credential for one source alone."""
        if not self.shared and self.source == source:
            return self
        derived = Admission(self._keeper, self.granted, source=source, shared=False)
        derived.ended, derived.generation, derived.verified = self.ended, self.generation, self.verified
        derived.secret, derived.expires = self.secret, self.expires
        self._keeper.note(derived)
        return derived

    def check(self) -> None:
        """Refuse what is done with it once it has ended. Called for every statement.

        Raises:
            AdmissionEndedError: the credential does not hold any more.
            TenantUnavailableError, TenantNotFoundError: the tenant's status admits nobody any more.
        """
        if self.ended is None and self.expires is None and self.generation == self._keeper.generation:
            return
        self._doubt()
        ended = self.ended or self._expired()
        if ended is not None:
            raise copy(ended.error)

    def _doubt(self) -> None:
        if self.generation != self._keeper.generation:
            self._keeper.doubt(self)

    def _expired(self) -> Ended | None:
        if self.expires is None or self._keeper.clock() < self.expires:
            return None
        return _ended("expired", self.granted.credential_id)

    # --- watching: of connections that stay open --------------------------------------------------------------------

    @property
    def watched(self) -> bool:
        """Whether anyone is called when it ends."""
        return bool(self._watchers)

    def watch(self, watcher: Callable[[Ended], None]) -> Ended | None:
        """Have ``watcher`` called once, in the event loop, when it ends; where it has ended, return why instead."""
        ended = self.ended or self._expired()
        if ended is None:
            self._watchers.add(watcher)
            self._keeper.watch(self)
            self._doubt()
        return ended

    def unwatch(self, watcher: Callable[[Ended], None]) -> None:
        """Take back ``watch``."""
        self._watchers.discard(watcher)
        if not self._watchers:
            self._keeper.unwatch(self)

    def expire(self) -> bool:
        """End it if its time is over, and tell whether it is."""
        ended = self._expired()
        if ended is not None:
            self.end(ended)
        return ended is not None

    def end_unverified(self) -> None:
        """End it, since nobody could tell for too long whether it holds."""
        self.end(_ended("unverified", self.granted.credential_id))

    # --- what is learned of it --------------------------------------------------------------------------------------

    def judge(self, now: Standing | None) -> None:
        """Compare with what is known ``now`` (None: there is no such credential), and end it where it does not hold."""
        if self.ended is not None or (now is not None and now.asked < self.granted.asked):
            return
        ended = self._why_ended(now)
        if ended is not None:
            self.end(ended)
        elif now is not None:
            self.secret, self.expires = now.secret, now.expires
            self.verified = max(self.verified, now.asked)
            if self._watchers:
                self._keeper.watch(self)

    def end(self, ended: Ended) -> None:
        """Refuse what is done with it from now on, and call those who watch it."""
        if self.ended is not None:
            return
        self.ended = ended
        watchers, self._watchers = self._watchers, set()
        self._keeper.unwatch(self)
        for watcher in watchers:
            try:
                watcher(ended)
            except Exception:
                logger.exception("an open connection could not be ended")

    def _why_ended(self, now: Standing | None) -> Ended | None:
        granted = self.granted
        reason = None
        if now is None:
            reason = "unknown"
        elif now.revoked:
            reason = "revoked"
        elif now.tenant.id != granted.tenant.id:
            reason = "tenant"
        elif now.expires is not None and self._keeper.clock() >= now.expires:
            reason = "expired"
        elif now.secret != self.secret and now.secret[0] == self.secret[0]:
            # of another version it is the same secret, digested under the current pepper
            reason = "secret"
        elif not granted.scopes <= now.scopes and _ALL_SCOPES not in now.scopes:
            reason = "scope"
        if now is None or reason is not None:
            return _ended(reason or "unknown", granted.credential_id)
        try:
            # who was let in during maintenance is an operator
            check_usable(now.tenant, operator=granted.tenant.status is Status.MAINTENANCE)
        except TenancyError as error:
            return Ended(granted.credential_id, now.tenant.status.value, error.with_traceback(None))
        # those who share one came from anywhere: nobody has written down from where
        if now.networks != granted.networks and not (now.networks == () or self._is_of(now.networks)):
            return _ended("network", granted.credential_id)
        return None

    def _is_of(self, networks: tuple[Network, ...]) -> bool:
        return not self.shared and is_in_networks(self.source, networks)


def for_source(tenant: Tenant, source: str | None) -> Tenant:
    """Return a tenant whose admission is of ``source`` alone; as it is where it has none."""
    admission = tenant.admission
    return replace(tenant, admission=admission.of(source)) if isinstance(admission, Admission) else tenant


def _ended(reason: str, credential_id: str) -> Ended:
    return Ended(credential_id, reason, AdmissionEndedError(reason, credential_id=credential_id))


__all__ = ["Admission", "Ended", "Keeper", "Standing", "for_source"]
