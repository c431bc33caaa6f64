"""All admissions of a process: found by credential and by tenant, and verified when something changed.

Nothing is done on the path of a request. An admission is registered when the directory builds an entry, and verified
when a notification says that its credential or tenant changed.
"""

from __future__ import annotations

import asyncio
import logging
import random
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Iterator
from contextvars import Context

from ..errors import ControlUnavailableError
from .admission import Admission, CredentialState, Monitor

logger = logging.getLogger("tenancy_orm.directory")

_PAGE = 200  # look-ups made at one time
_RETRY_SECONDS = 1.0  # while the control database does not answer


class _Ref(weakref.ref[Admission]):
    """A weak reference with the keys that it is stored under."""

    __slots__ = ("tags",)

    tags: tuple[Hashable, ...]


class Admissions:
    """Holds weak references to all admissions, and ends those that are no longer valid.

    While the control database does not answer, admissions stay valid, and are verified once it answers again. It may be
    unreachable for this process alone while another one revokes: a watched admission that cannot be verified for
    ``ttl + grace`` seconds ends, since new requests are refused from then on as well.

    Args:
        look_up: Returns the current state of an admitted credential, or None; raises ``ControlUnavailableError``.
        is_listening: Whether notifications of changes arrive now. While they do not, watched admissions are verified
            every ``ttl`` seconds, and the others when they are used.
        ttl: Seconds, see ``TenancyConfig.directory.ttl``.
        grace: Seconds, see ``TenancyConfig.directory.grace``.
        clock: The directory's.
    """

    def __init__(
        self,
        look_up: Callable[[CredentialState], Awaitable[CredentialState | None]],
        *,
        is_listening: Callable[[], bool],
        ttl: float,
        grace: float,
        clock: Callable[[], float],
    ) -> None:
        self._look_up = look_up
        self._is_listening = is_listening
        self._ttl = ttl
        self._max_unverified_seconds = ttl + grace
        self._clock = clock
        self._monitor = Monitor(clock, self._register, self._verify_soon, self._watch, self._unwatch)
        self._refs: dict[Hashable, set[_Ref]] = {}
        self._number = 0
        # the garbage collector may run in any thread: the next registration removes what it found
        self._dead: deque[_Ref] = deque()
        self._watched: dict[Admission, asyncio.TimerHandle | None] = {}
        # when notifications last arrived for certain: admissions that nobody had to verify were valid then
        self._listening_at = clock()
        # credentials to verify, each with the value of _listening_at when that was first scheduled
        self._unverified: dict[str, float] = {}
        self._due: set[str] = set()
        self._failed: set[str] = set()  # verified again later, by one task that sleeps
        self._retrying = False
        self._verification_scheduled = False  # whether the loop will call _verify_due
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def open(self) -> None:
        """Start to verify watched admissions while notifications do not arrive."""
        if not self._closed:
            self._start_task(self._verify_periodically())

    async def close(self) -> None:
        """Stop verifying."""
        self._closed = True
        for timer in self._watched.values():
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def watched(self) -> int:
        """How many admissions are watched by an open connection."""
        return len(self._watched)

    def __len__(self) -> int:
        """How many admissions there are."""
        self._discard_dead()
        return self._number

    # --- registering ------------------------------------------------------------------------------------------------

    def admit(self, granted: CredentialState, *, source: str | None = None, shared: bool = True) -> Admission:
        """Create and register an admission."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        admission = Admission(self._monitor, granted, source=source, shared=shared)
        self._register(admission)
        return admission

    def _register(self, admission: Admission) -> None:
        self._discard_dead()
        granted = admission.granted
        ref = _Ref(admission, self._dead.append)
        tenant = () if granted.tenant is None else (granted.tenant.id,)
        ref.tags = (granted.credential_id, *tenant, *granted.tags)
        for tag in ref.tags:
            self._refs.setdefault(tag, set()).add(ref)
        self._number += 1

    def _discard_dead(self) -> None:
        while self._dead:
            ref = self._dead.popleft()
            self._number -= 1
            for tag in ref.tags:
                siblings = self._refs.get(tag)
                if siblings is not None:
                    siblings.discard(ref)
                    if not siblings:
                        del self._refs[tag]

    def _active(self, tag: Hashable) -> Iterator[Admission]:
        for ref in tuple(self._refs.get(tag, ())):
            admission = ref()
            if admission is not None and admission.ended is None:
                yield admission

    # --- watching ---------------------------------------------------------------------------------------------------

    def _watch(self, admission: Admission) -> None:
        self._unwatch(admission)
        timer = None
        if admission.expires is not None and self._loop is not None:
            timer = self._loop.call_later(
                max(admission.expires - self._clock(), 0.0), self._on_expiry, admission, context=Context()
            )
        self._watched[admission] = timer

    def _unwatch(self, admission: Admission) -> None:
        timer = self._watched.pop(admission, None)
        if timer is not None:
            timer.cancel()

    def _on_expiry(self, admission: Admission) -> None:
        if not admission.expire():
            self._watch(admission)

    # --- verifying --------------------------------------------------------------------------------------------------

    def verify(self, tag: Hashable) -> None:
        """Schedule the verification of the admissions of a credential, tenant or subject: that may have changed."""
        self._schedule(admission.granted.credential_id for admission in self._active(tag))

    def verify_all(self) -> None:
        """Verify watched admissions now, and the others when they are next used: anything may have changed."""
        self._monitor.generation += 1
        self._schedule(admission.granted.credential_id for admission in self._watched)

    def _verify_soon(self, admission: Admission) -> None:
        # at once: an admission that cannot be verified now stays scheduled until it can be
        admission.generation = self._monitor.generation
        self._schedule((admission.granted.credential_id,))

    def _schedule(self, credential_ids: Iterable[str]) -> None:
        for credential_id in credential_ids:
            self._unverified.setdefault(credential_id, self._listening_at)
            self._due.add(credential_id)
        if self._due and not self._verification_scheduled and not self._closed and self._loop is not None:
            self._verification_scheduled = True
            self._loop.call_soon_threadsafe(self._verify_due, context=Context())

    def _verify_due(self) -> None:
        self._verification_scheduled = False
        due, self._due = list(self._due), set()
        if due and not self._closed:
            self._start_task(self._verify(due))

    def _start_task(self, work: Coroutine[object, object, None]) -> None:
        # a context of its own: the work does not belong to the request that was running when something changed
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _verify(self, credential_ids: list[str]) -> None:
        for start in range(0, len(credential_ids), _PAGE):
            page = credential_ids[start : start + _PAGE]
            outcomes = await asyncio.gather(*(self._verify_one(credential_id) for credential_id in page))
            self._failed.update(credential_id for credential_id, done in zip(page, outcomes, strict=True) if not done)
        if self._failed and not self._retrying:
            # other verifications may start sooner; these wait until the control database answers
            self._retrying = True
            await asyncio.sleep(_RETRY_SECONDS * random.uniform(0.5, 1.0))
            self._retrying = False
            self._retry_failed()

    def _retry_failed(self) -> None:
        """Verify again what failed, and end watched admissions that could not be verified for too long."""
        failed, self._failed = self._failed, set()
        latest = self._clock() - self._max_unverified_seconds
        for credential_id in failed:
            since = self._unverified.pop(credential_id, self._listening_at)
            for admission in self._active(credential_id):
                if admission.watched and max(since, admission.verified) <= latest:
                    admission.end_unverified()
            if any(self._active(credential_id)):
                self._unverified[credential_id] = since
        self._schedule(failed & self._unverified.keys())

    async def _verify_one(self, credential_id: str) -> bool:
        self._failed.discard(credential_id)
        granted = next((admission.granted for admission in self._active(credential_id)), None)
        if granted is None:
            self._unverified.pop(credential_id, None)
            return True
        try:
            state = await self._look_up(granted)
        except ControlUnavailableError:
            return False
        except Exception:
            logger.exception("the admissions of credential %s could not be verified; trying again", granted.public_id)
            return False
        self._unverified.pop(credential_id, None)
        for admission in self._active(credential_id):
            admission.verify(state)
        return True

    async def _verify_periodically(self) -> None:
        while True:
            await asyncio.sleep(self._ttl)
            if self._is_listening():
                self._listening_at = self._clock()
            else:
                self.verify_all()


__all__ = ["Admissions"]
