"""An admission: whether the credential that a request was let in with still holds, and who hears when it does not.

State without I/O; ``admissions`` keeps all of them and asks the control database.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..context import Status, Tenant
from ..errors import AdmissionEndedError, TenancyError
from .lifecycle import check_usable
from .networks import Network, is_admitted

if TYPE_CHECKING:
    from .admissions import Admissions

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


class Admission:
    """Whether a credential that was looked up still holds, for those who were let in with it.

    All requests that found the same entry of the directory share one, whatever their source. A credential that is
    bound to networks has one for each source, and each websocket has one of its own.

    Args:
        admissions: Who keeps it.
        granted: What was known of the credential when it was let in.
        source: The peer's address.
        shared: Whether it is of any source, so that ``source`` says nothing.
    """

    __slots__ = (
        "__weakref__",
        "_admissions",
        "_watchers",
        "ended",
        "expires",
        "generation",
        "granted",
        "secret",
        "shared",
        "source",
    )

    def __init__(self, admissions: Admissions, granted: Standing, *, source: str | None, shared: bool) -> None:
        self._admissions = admissions
        self._watchers: set[Callable[[Ended], None]] = set()
        self.granted = granted
        self.source = source
        self.shared = shared
        self.secret = granted.secret
        self.expires = granted.expires
        self.generation = admissions.generation
        self.ended: Ended | None = None
        """Why it does not hold any more; None while it does, as far as is known."""

    def __repr__(self) -> str:
        """Name its credential, and tell whether it holds."""
        state = "holds" if self.ended is None else f"ended: {self.ended.reason}"
        return f"<Admission of {self.granted.credential_id} {state}>"

    def of(self, source: str | None) -> Admission:
        """An admission by the same credential for one source alone."""
        return self if not self.shared and self.source == source else self._admissions.derive(self, source)

    def check(self) -> None:
        """Refuse what is done with it once it has ended. Called for every statement.

        Raises:
            AdmissionEndedError: the credential does not hold any more.
            TenantUnavailableError, TenantNotFoundError: the tenant's status admits nobody any more.
        """
        if self.ended is None and self.expires is None and self.generation == self._admissions.generation:
            return
        if self.generation != self._admissions.generation:
            self._admissions.doubt_one(self)
        ended = self.ended or self._expired()
        if ended is not None:
            raise copy(ended.error)

    def _expired(self) -> Ended | None:
        if self.expires is None or self._admissions.clock() < self.expires:
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
            self._admissions.keep_watch(self)
        return ended

    def unwatch(self, watcher: Callable[[Ended], None]) -> None:
        """Take back ``watch``."""
        self._watchers.discard(watcher)
        if not self._watchers:
            self._admissions.end_watch(self)

    def expire(self) -> bool:
        """End it if its time is over, and tell whether it is."""
        ended = self._expired()
        if ended is not None:
            self.end(ended)
        return ended is not None

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
            if self._watchers:
                self._admissions.keep_watch(self)

    def end(self, ended: Ended) -> None:
        """Refuse what is done with it from now on, and call those who watch it."""
        if self.ended is not None:
            return
        self.ended = ended
        watchers, self._watchers = self._watchers, set()
        self._admissions.end_watch(self)
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
        elif now.expires is not None and self._admissions.clock() >= now.expires:
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
        return not self.shared and is_admitted(self.source, networks)


def for_source(tenant: Tenant, source: str | None) -> Tenant:
    """Return a tenant whose admission is of ``source`` alone; as it is where it has none."""
    admission = tenant.admission
    return replace(tenant, admission=admission.of(source)) if isinstance(admission, Admission) else tenant


def _ended(reason: str, credential_id: str) -> Ended:
    return Ended(credential_id, reason, AdmissionEndedError(reason, credential_id=credential_id))


__all__ = ["Admission", "Ended", "Standing", "for_source"]
