"""Records of requests, written in the background: a request never waits for a write.

Collected in bounded memory and written every interval: when keys were last used, digests under the current pepper, and
refusals. Of many refusals the most frequent are written one by one and the rest as a count; of cross-tenant requests
the rest as a count for each key.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from typing import Protocol

from sqlalchemy import ARRAY, Float, LargeBinary, Text, bindparam, text
from sqlalchemy.exc import SQLAlchemyError

from ..audit.actor import ActorKind
from ..audit.log import AuditLog
from ..control.database import ControlDatabase
from ..errors import InvalidCredentialError, TenancyError
from ..keys.format import KeyDigester, ParsedKey
from ..tenant import Tenant
from .credential import CREDENTIAL_KINDS, Credential
from .refusal_log import append_refusals
from .refusals import Refusal, RefusalCounter

logger = logging.getLogger("tenancy_orm.keys")

_CHUNK = 1_000
_MAX_PENDING = 100_000
_MAX_DIGESTS = 1_000
_CLOSE_SECONDS = 5.0

# A row that another process has locked gets much the same time from it. SKIP LOCKED saves the wait, and rules out
# deadlocks between processes that write the same keys in another order.
_UPDATE_LAST_USED = text(
    """
    WITH used AS (
        SELECT k.id, now() - u.age * interval '1 second' AS at
        FROM unnest(:ids, :ages) AS u (id, age) JOIN tenancy.api_keys k ON k.id = u.id
        WHERE k.last_used_at IS NULL OR k.last_used_at < now() - (u.age + :grain) * interval '1 second'
        ORDER BY k.id FOR NO KEY UPDATE OF k SKIP LOCKED
    )
    UPDATE tenancy.api_keys k SET last_used_at = used.at FROM used WHERE k.id = used.id
    """
).bindparams(
    bindparam("ids", type_=ARRAY(Text)), bindparam("ages", type_=ARRAY(Float)), bindparam("grain", type_=Float)
)

_REDIGEST = text(
    """
    WITH old AS (
        SELECT k.id, n.digest FROM unnest(:ids, :versions, :digests) AS n (id, version, digest)
        JOIN tenancy.api_keys k ON k.id = n.id AND k.digest_version = n.version
        ORDER BY k.id FOR NO KEY UPDATE OF k SKIP LOCKED
    )
    UPDATE tenancy.api_keys k SET digest = old.digest, digest_version = :current FROM old WHERE k.id = old.id
    """
).bindparams(
    bindparam("ids", type_=ARRAY(Text)),
    bindparam("versions", type_=ARRAY(Text)),
    bindparam("digests", type_=ARRAY(LargeBinary)),
    bindparam("current", type_=Text),
)


class UsedKey(Protocol):
    """A cached key: ``used`` is its last use by the directory's clock, ``use_queued`` whether the journal has it."""

    used: float
    use_queued: bool

    @property
    def credential(self) -> Credential:
        """The key's credential."""


class KeyJournal:
    """Collects uses of keys, digests and refusals, and writes them.

    Args:
        control: The control database.
        audit: Where refusals are recorded; None records none.
        digester: Makes digests under the current pepper.
        interval: Seconds between writes.
        clock: The directory's clock.
    """

    def __init__(
        self,
        control: ControlDatabase,
        audit: AuditLog | None,
        digester: KeyDigester,
        *,
        interval: float,
        clock: Callable[[], float],
    ) -> None:
        self._control = control
        self._audit = audit
        self._digester = digester
        self._interval = interval
        self._clock = clock
        self._used: list[UsedKey] = []
        self._digests: dict[str, tuple[str, bytes]] = {}
        self._refused = RefusalCounter()
        self._cross_tenant = RefusalCounter()
        self._task: asyncio.Task[None] | None = None
        self._flushing = asyncio.Lock()

    def open(self) -> None:
        """Start to write every interval."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    async def close(self) -> None:
        """Write what is left, within five seconds."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._try_flush(_CLOSE_SECONDS)

    # --- collecting: called on the hot path -------------------------------------------------------------------------

    def record_use(self, key: UsedKey) -> None:
        """Queue a key's use; once per key and interval is enough, since ``key.used`` is read when it is written."""
        if len(self._used) < _MAX_PENDING:
            key.use_queued = True
            self._used.append(key)

    def record_digest(self, key: ParsedKey, version: str) -> None:
        """Replace the digest of a key, known to be right, by one under the current pepper instead of ``version``."""
        if len(self._digests) < _MAX_DIGESTS:
            self._digests[key.key_id] = (version, self._digester.digest(key.text))

    def record_refusal(self, error: InvalidCredentialError, source: str | None, tenant: Tenant | None = None) -> None:
        """Count a refused credential."""
        if self._audit is not None:
            owner = (tenant.id, tenant.slug) if tenant else (None, None)
            kind: ActorKind = error.kind if error.kind in CREDENTIAL_KINDS else "key"
            self._refused.add(Refusal.rejected(error.reason, error.credential_id, source, owner, kind))

    def record_cross_tenant(self, credential: Credential, named: str, resolver: str, source: str | None) -> None:
        """Count a request that named a tenant that its credential does not allow."""
        if self._audit is not None:
            bound, kind, subject = credential.bound, credential.kind, credential.subject
            owner = (bound.id, bound.slug) if bound else (None, None)
            self._cross_tenant.add(Refusal.cross_tenant_request(named, resolver, subject, source, owner, kind))

    # --- writing ----------------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Write what was collected.

        Raises:
            ControlUnavailableError: the control database does not answer; everything is kept for the next flush.
        """
        async with self._flushing:
            await self._write_uses()
            await self._write_digests()
            await self._write_refusals()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._try_flush(self._interval + _CLOSE_SECONDS)

    async def _try_flush(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self.flush()
        except (TenancyError, TimeoutError, SQLAlchemyError) as exc:
            logger.warning("key usage and refusals could not be written (%s); they are kept", type(exc).__name__)

    async def _write_uses(self) -> None:
        taken, self._used = self._used, []
        now = self._clock()
        ages: dict[str, float] = {}
        for key in taken:
            key.use_queued = False
            key_id = key.credential.id
            ages[key_id] = min(now - key.used, ages.get(key_id, float("inf")))
        try:
            ids = list(ages)
            for start in range(0, len(ids), _CHUNK):
                chunk = ids[start : start + _CHUNK]
                # a time up to half an interval older is as good: so only one of many processes writes
                values = {"ids": chunk, "ages": [ages[key_id] for key_id in chunk], "grain": self._interval / 2}
                async with self._control.transaction() as connection:
                    await connection.execute(text("SET LOCAL synchronous_commit = off"))
                    await connection.execute(_UPDATE_LAST_USED, values)
        except BaseException:
            for key in taken:
                # keys that were used again are queued already
                if not key.use_queued:
                    self.record_use(key)
            raise

    async def _write_digests(self) -> None:
        taken, self._digests = self._digests, {}
        if not taken:
            return
        values = {
            "ids": list(taken),
            "versions": [version for version, _ in taken.values()],
            "digests": [digest for _, digest in taken.values()],
            "current": self._digester.current,
        }
        try:
            async with self._control.transaction() as connection:
                await connection.execute(_REDIGEST, values)
        except BaseException:
            for key_id, digest in taken.items():
                if len(self._digests) < _MAX_DIGESTS:
                    self._digests.setdefault(key_id, digest)
            raise

    async def _write_refusals(self) -> None:
        refused, self._refused = self._refused, RefusalCounter()
        crossed, self._cross_tenant = self._cross_tenant, RefusalCounter()
        if self._audit is None or not (refused or crossed):
            return
        try:
            async with self._control.transaction() as connection:
                for counter in (crossed, refused):
                    await append_refusals(self._audit, connection, counter)
        except BaseException:
            self._refused.add_all(refused)
            self._cross_tenant.add_all(crossed)
            raise
