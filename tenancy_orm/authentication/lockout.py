"""Lock-out: slows down sources with too many invalid credentials, and key ids with too many wrong secrets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..config import TenancyConfig
from ..errors import TooManyAttemptsError
from ..events import CredentialLockedOut, EventBus
from ..keys.networks import source_group
from .throttle import Attempts, Throttle

logger = logging.getLogger("tenancy_orm.directory")

_LOCKED_DELAY = 1.0  # the longest delay of a refusal for a locked key id, in seconds
_MAX_DELAYED = 256  # refusals delayed at one time


class Lockout:
    """Counts invalid credentials by source and by key id, and slows further attempts down.

    Args:
        config: Limits and times, see ``TenancyConfig``.
        events: Where lock-outs are reported.
        clock: Seconds, monotonic.
    """

    def __init__(self, config: TenancyConfig, events: EventBus, *, clock: Callable[[], float]) -> None:
        self._seconds = config.lockout.seconds
        self._events = events
        self._clock = clock
        self._config = config
        self._delayed = 0
        self.forget()

    def __len__(self) -> int:
        """How many sources and key ids are counted."""
        return len(self._sources) + len(self._key_ids)

    def forget(self) -> None:
        """Begin to count again, as in a new process."""
        config = self._config
        self._sources = Throttle(limit=config.lockout.failures, window=config.lockout.seconds)
        self._key_ids = Throttle(limit=config.lockout.failures, window=config.lockout.seconds)
        self.attempts = Attempts(self._sources, timeout=2 * config.directory.timeout, clock=self._clock)

    def check(self, group: str) -> None:
        """Refuse a group of sources that must wait.

        Raises:
            TooManyAttemptsError: the group presented too many invalid credentials.
        """
        if pause := self._sources.pause(group, self._clock()):
            raise TooManyAttemptsError(pause)

    async def count(self, key_id: str | None, source: str | None) -> None:
        """Count an invalid credential, and delay the answer where its key id was tried too often."""
        now = self._clock()
        if source is not None:
            group = source_group(source)
            self._report(self._sources.fail(group, now), source=group)
        if key_id is None:
            return
        self._report(self._key_ids.fail(key_id, now), credential_id=key_id)
        delay = min(self._key_ids.pause(key_id, now), _LOCKED_DELAY)
        # only refusals are slow: the owner of the right key must not suffer from guesses at its public id
        if delay and self._delayed < _MAX_DELAYED:
            self._delayed += 1
            try:
                await asyncio.sleep(delay)
            finally:
                self._delayed -= 1

    def _report(self, failures: int | None, *, source: str | None = None, credential_id: str | None = None) -> None:
        if failures is None:
            return
        logger.warning("%d invalid credentials from %s: slowed down", failures, source or f"key id {credential_id}")
        self._events.emit(
            CredentialLockedOut(failures=failures, seconds=self._seconds, source=source, credential_id=credential_id)
        )
