"""All admissions of a process: found again by credential and by tenant, and verified when something changed.

Nothing is done on the path of a request: an admission is noted when the directory builds an entry, and asked about when
a notification says that its credential or tenant changed.
"""

from __future__ import annotations

import asyncio
import logging
import random
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextvars import Context
from uuid import UUID

from ..errors import ControlUnavailableError
from .admission import Admission, Standing

logger = logging.getLogger("tenancy_orm.directory")

_PAGE = 200  # look-ups asked for at one time
_RETRY_SECONDS = 1.0  # while the control database is away


class _Ref(weakref.ref[Admission]):
    """A weak reference that knows where it is kept."""

    __slots__ = ("credential_id", "tenant_id")

    credential_id: str
    tenant_id: UUID


class Admissions:
    """Keeps weak references to what requests were admitted with, and ends those that no longer hold.

    Where the control database does not answer, they go on: nobody can revoke anything while it is away. What was to
    be verified then is verified once it is back.

    Args:
        look_up: Returns what is known of a credential now, or None; raises ``ControlUnavailableError``.
        hears: Whether changes are heard of now. While they are not, what is watched is verified every ``ttl`` seconds,
            and what is not watched when it is used.
        ttl: Seconds, see ``TenancyConfig.directory_ttl``.
        clock: The directory's.
    """

    def __init__(
        self,
        look_up: Callable[[str], Awaitable[Standing | None]],
        *,
        hears: Callable[[], bool],
        ttl: float,
        clock: Callable[[], float],
    ) -> None:
        self._look_up = look_up
        self._hears = hears
        self._ttl = ttl
        self.clock = clock
        self.generation = 0
        """Counts how often any credential may have changed unheard."""
        self._refs: dict[str | UUID, set[_Ref]] = {}
        # the collector may run in any thread: what it finds is taken out by the next who adds
        self._dead: deque[_Ref] = deque()
        self._watched: dict[Admission, asyncio.TimerHandle | None] = {}
        self._due: set[str] = set()
        self._begun = False  # whether _begin will be called for what is due
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def open(self) -> None:
        """Begin to verify what is watched while changes are not heard of."""
        self._start(self._patrol())

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
        """How many admissions have connections that stay open."""
        return len(self._watched)

    def __len__(self) -> int:
        """How many admissions there are."""
        self._bury()
        return sum(len(refs) for tag, refs in self._refs.items() if isinstance(tag, str))

    # --- keeping ----------------------------------------------------------------------------------------------------

    def admit(self, granted: Standing, *, source: str | None = None, shared: bool = True) -> Admission:
        """Return a new admission."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._bury()
        admission = Admission(self, granted, source=source, shared=shared)
        ref = _Ref(admission, self._dead.append)
        ref.credential_id, ref.tenant_id = granted.credential_id, granted.tenant.id
        self._refs.setdefault(ref.credential_id, set()).add(ref)
        self._refs.setdefault(ref.tenant_id, set()).add(ref)
        return admission

    def derive(self, admission: Admission, source: str | None) -> Admission:
        """Return an admission by the same credential for one source alone. It has ended where the first has."""
        derived = self.admit(admission.granted, source=source, shared=False)
        derived.ended, derived.generation = admission.ended, admission.generation
        derived.secret, derived.expires = admission.secret, admission.expires
        return derived

    def _bury(self) -> None:
        while self._dead:
            ref = self._dead.popleft()
            for tag in (ref.credential_id, ref.tenant_id):
                siblings = self._refs.get(tag)
                if siblings is not None:
                    siblings.discard(ref)
                    if not siblings:
                        del self._refs[tag]

    def _living(self, tag: str | UUID) -> Iterator[Admission]:
        for ref in tuple(self._refs.get(tag, ())):
            admission = ref()
            if admission is not None and admission.ended is None:
                yield admission

    # --- watching ---------------------------------------------------------------------------------------------------

    def keep_watch(self, admission: Admission) -> None:
        """Have an admission end at its time; called again whenever that time changed."""
        self.end_watch(admission)
        timer = None
        if admission.expires is not None and self._loop is not None:
            timer = self._loop.call_later(
                max(admission.expires - self.clock(), 0.0), self._expire, admission, context=Context()
            )
        self._watched[admission] = timer

    def end_watch(self, admission: Admission) -> None:
        """Take back ``keep_watch``."""
        timer = self._watched.pop(admission, None)
        if timer is not None:
            timer.cancel()

    def _expire(self, admission: Admission) -> None:
        if not admission.expire():
            self.keep_watch(admission)

    # --- verifying --------------------------------------------------------------------------------------------------

    def ask(self, tag: str | UUID) -> None:
        """Verify what was admitted by a credential, or by any of a tenant's: it may have changed."""
        self._ask(admission.granted.credential_id for admission in self._living(tag))

    def doubt(self) -> None:
        """Verify what is watched, and the rest when it is used next: anything may have changed."""
        self.generation += 1
        self._ask(admission.granted.credential_id for admission in self._watched)

    def doubt_one(self, admission: Admission) -> None:
        """Verify one that is used, once; from any thread."""
        # at once: what cannot be verified now is kept until it can be
        admission.generation = self.generation
        self._ask((admission.granted.credential_id,))

    def _ask(self, credential_ids: Iterable[str]) -> None:
        self._due.update(credential_ids)
        if self._due and not self._begun and not self._closed and self._loop is not None:
            self._begun = True
            self._loop.call_soon_threadsafe(self._begin, context=Context())

    def _begin(self) -> None:
        self._begun = False
        due, self._due = list(self._due), set()
        if due:
            self._start(self._verify(due))

    def _start(self, work: Coroutine[object, object, None]) -> None:
        if self._closed:
            return
        # a context of its own: it is not the work of whoever was there when something changed
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _verify(self, credential_ids: list[str]) -> None:
        failed: list[str] = []
        for start in range(0, len(credential_ids), _PAGE):
            page = credential_ids[start : start + _PAGE]
            outcomes = await asyncio.gather(*(self._verify_one(credential_id) for credential_id in page))
            failed += [credential_id for credential_id, done in zip(page, outcomes, strict=True) if not done]
        if failed:
            # others may be asked for sooner; these wait until the control database is back
            await asyncio.sleep(_RETRY_SECONDS * random.uniform(0.5, 1.0))
            self._ask(credential_id for credential_id in failed if any(self._living(credential_id)))

    async def _verify_one(self, credential_id: str) -> bool:
        try:
            standing = await self._look_up(credential_id)
        except ControlUnavailableError:
            return False
        except Exception:
            logger.exception("what was admitted by %s could not be verified; it is tried again", credential_id)
            return False
        for admission in self._living(credential_id):
            admission.judge(standing)
        return True

    async def _patrol(self) -> None:
        while True:
            await asyncio.sleep(self._ttl)
            if not self._hears():
                self.doubt()


__all__ = ["Admissions"]
