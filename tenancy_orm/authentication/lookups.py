"""Look-ups of keys and tenants in the control database, and the handling of its outages."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextvars import Context
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID

import asyncpg
from sqlalchemy import ARRAY, SelectBase, Text, Uuid, any_, bindparam, cast, func, select, union_all
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect
from sqlalchemy.exc import SQLAlchemyError

from ..config import TenancyConfig
from ..control.database import ControlDatabase
from ..control.direct import ControlRow
from ..control.lookup import named
from ..control.models import api_keys, tenants
from ..errors import ControlUnavailableError
from ..events import DirectoryMissed, DirectoryUnavailable, EventBus
from ..keys.networks import parse_networks
from ..keys.rows import NETWORKS
from ..registry.rows import TENANT_COLUMNS, tenant_from_row
from ..tenant import Status, Tenant
from .admission import CredentialState
from .batch import BatchLoader

logger = logging.getLogger("tenancy_orm.directory")

EVERYTHING: Final = "*"
"""The tag under which everything is invalidated."""

REVOCATION_MARGIN: Final = timedelta(minutes=10)
"""How long a revocation refuses after its end: a token is accepted for its leeway longer, and clocks differ."""

_POOL_SIZE = 2
_PROBE_SECONDS = 1.0

T = TypeVar("T")


def _sql(statement: SelectBase, *parameters: str) -> str:
    """The text of a query for asyncpg, with these parameters as ``$1``, ``$2`` and so on."""
    compiled = statement.compile(dialect=asyncpg_dialect())  # type: ignore[no-untyped-call]
    if compiled.positiontup != list(parameters):
        raise AssertionError(compiled.positiontup)
    return str(compiled)


_KEYS = _sql(
    select(
        api_keys.c.id.label("key_id"),
        api_keys.c.digest,
        api_keys.c.digest_version,
        api_keys.c.scopes,
        NETWORKS,
        api_keys.c.name,
        api_keys.c.prefix,
        api_keys.c.expires_at,
        api_keys.c.revoked_at,
        func.now().label("now"),
        *TENANT_COLUMNS,
    )
    .join(tenants, tenants.c.id == api_keys.c.tenant_id)
    .where(api_keys.c.id == any_(bindparam("ids", type_=ARRAY(Text)))),
    "ids",
)

_TENANTS = _sql(
    union_all(
        # asyncpg knows the type text[], and would ask the server for uuid[], which takes 10 ms
        select(*TENANT_COLUMNS).where(tenants.c.id == any_(cast(bindparam("ids", type_=ARRAY(Text)), ARRAY(Uuid)))),
        *named(any_(bindparam("names", type_=ARRAY(Text))), *TENANT_COLUMNS),
    ),
    "ids",
    "names",
)

_SUBJECTS = """
    SELECT subject, tenant_id, roles, NULL::timestamptz AS revoked_at, NULL AS token
    FROM tenancy.members WHERE subject = ANY($1::text[])
    UNION ALL
    SELECT value, NULL, NULL, revoked_at, NULL FROM tenancy.revocations
    WHERE kind = 'subject' AND value = ANY($1::text[]) AND (expires_at IS NULL OR expires_at > now() - $3::interval)
    UNION ALL
    SELECT NULL, NULL, NULL, revoked_at, value FROM tenancy.revocations
    WHERE kind = 'token' AND value = ANY($2::text[]) AND (expires_at IS NULL OR expires_at > now() - $3::interval)
    """


class SubjectRow(NamedTuple):
    """What the control database says about a person, and about one token or session.

    ``roles`` by tenant. What was issued to the person before ``revoked_at`` is refused, and where ``revoked`` is true
    this token or session is.
    """

    roles: Mapping[UUID, frozenset[str]]
    revoked_at: datetime | None
    revoked: bool
    read_at: float


def credential_state(row: ControlRow, read_at: float) -> CredentialState:
    """Return the state of a key from its row, read at this time."""
    return CredentialState(
        credential_id=row["key_id"],
        tenant=tenant_from_row(row),
        read_at=read_at,
        scopes=frozenset(row["scopes"]),
        networks=parse_networks(row["networks"]),
        secret=(row["digest_version"], row["digest"]),
        revoked=row["revoked_at"] is not None,
        # by the database's clock, so that a difference between the clocks does not matter
        expires=None if row["expires_at"] is None else read_at + (row["expires_at"] - row["now"]).total_seconds(),
    )


class DirectoryLookups:
    """Queries the control database; look-ups at the same moment share a query.

    Args:
        control: The control database.
        config: Times, see ``TenancyConfig``.
        events: Where look-ups and outages of the control database are reported.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, control: ControlDatabase, config: TenancyConfig, events: EventBus, *, clock: Callable[[], float]
    ) -> None:
        # connections of its own: provisioning must not make look-ups wait for one
        self._control = ControlDatabase(
            control.dsn,
            pool_size=_POOL_SIZE,
            connect_timeout=config.directory.timeout,
            purpose="tenancy-directory",
            pooled=control.is_pooled,
            hot=True,
        )
        self._config = config
        self._events = events
        self._clock = clock
        timeout = config.directory.timeout
        # each value with the time when it was read
        self._keys: BatchLoader[str, tuple[ControlRow, float]] = BatchLoader(self._load_keys, timeout=timeout)
        self._tenants: BatchLoader[UUID | str, tuple[Tenant, float]] = BatchLoader(self._load_tenants, timeout=timeout)
        self._subjects: BatchLoader[tuple[str, str], SubjectRow] = BatchLoader(self._load_subjects, timeout=timeout)
        self._probe: asyncio.Task[None] | None = None  # set while the control database does not answer
        self._closing = False

    @property
    def available(self) -> bool:
        """Whether the control database answers, as far as is known."""
        return self._probe is None

    async def key(self, key_id: str) -> tuple[tuple[ControlRow, float] | None, set[Hashable]]:
        """Return a key's row with the time it was read, and the tags invalidated while it was looked up.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        self._check()
        return await self._guarded(self._keys.get(key_id))

    async def tenant(self, wanted: UUID | str) -> tuple[tuple[Tenant, float] | None, set[Hashable]]:
        """Return a tenant by id or name, as ``key`` does.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        self._check()
        return await self._guarded(self._tenants.get(wanted))

    async def subject(self, subject: str, token_id: str) -> tuple[SubjectRow, set[Hashable]]:
        """Return a person's memberships and revocations, as ``key`` does.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        self._check()
        found, invalidated = await self._guarded(self._subjects.get((subject, token_id)))
        if found is None:
            raise AssertionError("every subject has a row, if an empty one")
        return found, invalidated

    def invalidate(self, tag: Hashable) -> None:
        """Mark running look-ups: what they read may be older than the change of ``tag``."""
        self._subjects.invalidate(tag)
        self._keys.invalidate(tag)
        self._tenants.invalidate(tag)

    def stop(self) -> None:
        """Treat failing look-ups as part of the closing from now on, not as an outage of the control database."""
        self._closing = True

    async def close(self) -> None:
        """End every look-up and close the connections."""
        self.stop()
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        await self._subjects.close()
        await self._keys.close()
        await self._tenants.close()
        await self._control.close()

    def _check(self) -> None:
        if self._probe is not None:
            raise ControlUnavailableError(f"the control database {self._control.dsn} is not available")

    async def _guarded(self, look_up: Awaitable[T]) -> T:
        try:
            return await look_up
        except ControlUnavailableError as exc:
            self._begin_probing()
            raise ControlUnavailableError(*exc.args) from exc

    def _begin_probing(self) -> None:
        """Answer from the cache, without waiting, until the control database answers again."""
        if self._probe is not None or self._closing:
            return
        logger.warning(
            "the control database does not answer; cached entries stay valid for %g s", self._config.directory.grace
        )
        self._events.emit(DirectoryUnavailable())
        self._probe = asyncio.get_running_loop().create_task(self._probe_until_back(), context=Context())

    async def _probe_until_back(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_SECONDS * random.uniform(0.5, 1.0))
            try:
                async with asyncio.timeout(self._config.directory.timeout):
                    await self._control.fetch("SELECT 1")
            except Exception as exc:  # noqa: BLE001 - ending here would leave the directory without its database for ever
                logger.debug("the control database still does not answer: %s", type(exc).__name__)
                continue
            self._probe = None
            logger.info("the control database answers again")
            return

    async def _query(self, statement: str, *parameters: Any) -> tuple[Sequence[ControlRow], float]:
        """Run one SELECT, a second time where the first try met a connection that a restart had left dead.

        Returns its rows and a time before it was sent: what they say may change from then on.

        Raises:
            ControlUnavailableError: the database does not answer, or refuses: its password is being changed, or it is
                being restored. Callers handle both alike: cached entries stay valid.
        """
        for attempt in range(2):
            try:
                read_at = self._clock()
                return await self._control.fetch(statement, *parameters), read_at
            except ControlUnavailableError:
                if attempt:
                    raise
            except (SQLAlchemyError, asyncpg.PostgresError) as exc:
                logger.error("the control database refused a look-up: %s", type(exc).__name__)
                raise ControlUnavailableError("the control database refused a look-up") from exc
        raise AssertionError("unreachable")

    async def _load_keys(self, key_ids: list[str]) -> Mapping[str, tuple[ControlRow, float]]:
        started = time.perf_counter()
        rows, read_at = await self._query(_KEYS, key_ids)
        seconds = time.perf_counter() - started
        self._events.emit(DirectoryMissed(keys=len(key_ids), tenants=0, seconds=seconds))
        return {row["key_id"]: (row, read_at) for row in rows}

    async def _load_tenants(self, wanted: list[UUID | str]) -> Mapping[UUID | str, tuple[Tenant, float]]:
        started = time.perf_counter()
        ids = [str(x) for x in wanted if isinstance(x, UUID)]
        names = [x for x in wanted if isinstance(x, str)]
        rows, read_at = await self._query(_TENANTS, ids, names)
        seconds = time.perf_counter() - started
        self._events.emit(DirectoryMissed(keys=0, tenants=len(wanted), seconds=seconds))
        found: dict[UUID | str, Tenant] = {}
        for row in rows:
            tenant = tenant_from_row(row)
            found[tenant.id] = tenant
            if tenant.status is not Status.PURGED:
                for name in tenant.aliases:
                    found.setdefault(name, tenant)
                found[tenant.slug] = tenant
        return {key: (tenant, read_at) for key, tenant in found.items()}

    async def _load_subjects(self, wanted: list[tuple[str, str]]) -> Mapping[tuple[str, str], SubjectRow]:
        started = time.perf_counter()
        subjects = list({subject for subject, _ in wanted})
        token_ids = list({token for _, token in wanted if token})
        rows, read_at = await self._query(_SUBJECTS, subjects, token_ids, REVOCATION_MARGIN)
        seconds = time.perf_counter() - started
        self._events.emit(DirectoryMissed(keys=0, tenants=0, subjects=len(wanted), seconds=seconds))
        roles: dict[str, dict[UUID, frozenset[str]]] = {}
        revoked_at: dict[str, datetime] = {}
        tokens: set[str] = set()
        for row in rows:
            if row.token is not None:
                tokens.add(row.token)
            elif row.tenant_id is not None:
                roles.setdefault(row.subject, {})[row.tenant_id] = frozenset(row.roles)
            else:
                revoked_at[row.subject] = row.revoked_at
        return {
            (subject, token): SubjectRow(roles.get(subject, {}), revoked_at.get(subject), token in tokens, read_at)
            for subject, token in wanted
        }
