"""Intrusions: a key that names several other tenants is probing for them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from ..control.lookup import NAME_LENGTH
from ..events import CrossTenantRequest, EventBus, IntrusionSuspected
from .cache import put_bounded
from .credential import Credential
from .journal import KeyJournal

logger = logging.getLogger("tenancy_orm.directory")

_REPORTED_COUNTS = frozenset({3, 6, 12, 24, 48, 96})  # numbers of other tenants named by one key that are reported
_WINDOW_SECONDS = 3_600.0
_MAX_KEYS = 1_000
_MAX_NAMES = 100


class Intrusions:
    """Reports requests that named another tenant than their key's, and keys that named several.

    Args:
        events: Where both are reported.
        journal: Where each request is recorded.
        clock: Seconds, monotonic.
    """

    def __init__(self, events: EventBus, journal: KeyJournal, *, clock: Callable[[], float]) -> None:
        self._events = events
        self._journal = journal
        self._clock = clock
        self._named: OrderedDict[str, dict[str, float]] = OrderedDict()

    def report(self, credential: Credential, named: str, resolver: str, source: str | None) -> None:
        """Report one request; see ``Directory.report_cross_tenant``."""
        tenant, named = credential.tenant, named[:NAME_LENGTH]
        self._events.emit(
            CrossTenantRequest(
                tenant_id=tenant.id,
                slug=tenant.slug,
                named=named,
                resolver=resolver,
                key_id=credential.key_id,
                source=source,
            )
        )
        self._journal.record_cross_tenant(credential, named, resolver, source)
        now = self._clock()
        seen = self._named.pop(credential.key_id, {})
        recent = {name: at for name, at in seen.items() if now - at < _WINDOW_SECONDS}
        before = len(recent)
        if before < _MAX_NAMES:
            recent[named] = now
        put_bounded(self._named, credential.key_id, recent, _MAX_KEYS)
        if len(recent) > before and len(recent) in _REPORTED_COUNTS:
            logger.error("key %s of tenant %s named %d other tenants", credential.key_id, tenant.slug, len(recent))
            self._events.emit(
                IntrusionSuspected(
                    tenant_id=tenant.id,
                    slug=tenant.slug,
                    key_id=credential.key_id,
                    named=tuple(recent),
                    source=source,
                )
            )
