"""``TenantManager``: create, find, change and remove tenants."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..authentication.directory import Directory
from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..config.placement import PlacementRequest, check_region
from ..context import refuse_while_bound
from ..control.names import Names
from ..errors import (
    ConfigurationError,
    InvalidCredentialError,
    PlacementError,
    SeveralTenantsError,
    TenantNotFoundError,
    UnknownTierError,
)
from ..events import EventBus, TenantCreated, TenantUpdated
from ..keys.format import KeyDigester, generate_key
from ..provisioning import Provisioner
from ..provisioning.creation.filled_creation import Filling
from ..provisioning.creation.takeover import Takeover
from ..quotas.overrides import check_overrides
from ..registry.reading import TenantFilter
from ..registry.registry import Registry
from ..registry.rows import TenantDraft, TenantPage, uuid7
from ..secrets.keyring import Keyring, new_password
from ..servers.placement import Placer
from ..tenant import Status, Tenant, TenantRef
from .fields import (
    check_aware,
    check_lookup,
    check_metadata,
    check_pattern,
    check_slug,
    check_timezone,
    is_slug,
    merged,
)
from .lifecycle import TenantLifecycle

_PLACEMENTS = 5  # how often a server is chosen for one tenant, if those that were chosen have become full
_NAMED = 3  # how many of the tenants that match a look-up an error names
_LONGEST_REDIRECT = 100 * 366 * 86_400.0


@dataclass(frozen=True, slots=True)
class CreatedTenant:
    """A new tenant and its first API key, available here only."""

    tenant: Tenant
    api_key: str = field(repr=False)
    key_id: str = ""

    @property
    def id(self) -> UUID:
        """The tenant's id."""
        return self.tenant.id

    @property
    def slug(self) -> str:
        """The tenant's slug."""
        return self.tenant.slug


def _names(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _statuses(given: Status | str | Iterable[Status | str]) -> list[Status]:
    try:
        return [Status(name) for name in _names(given)]
    except ValueError as exc:
        raise ConfigurationError(f"{exc}; statuses: {', '.join(Status)}") from None


def _filter(
    status: Status | str | Iterable[Status | str],
    tier: str | Iterable[str],
    server: str | None,
    region: str | None,
    slug: str | None,
    metadata: Mapping[str, Any] | None,
) -> TenantFilter:
    return TenantFilter(
        status=_statuses(status),
        tier=_names(tier),
        server=server,
        region=region,
        slug=check_pattern(slug),
        metadata=None if metadata is None else check_metadata(metadata),
    )


class TenantManager(TenantLifecycle):
    """Creates, finds, changes and removes tenants; ``tenancy.tenants``.

    Every method that takes a ``tenant`` accepts a slug, an id or a ``Tenant``. Every change is audited in the same
    transaction, under ``actor``.
    """

    def __init__(
        self,
        *,
        config: TenancyConfig,
        registry: Registry,
        directory: Directory,
        provisioner: Provisioner,
        names: Names,
        keyring: Keyring,
        events: EventBus,
        placer: Placer,
    ) -> None:
        super().__init__(registry=registry, directory=directory, provisioner=provisioner, events=events)
        self._config = config
        self._names = names
        self._keyring = keyring
        self._placer = placer

    # --- creation ---------------------------------------------------------------------------------------------------

    async def create(
        self,
        slug: str,
        *,
        tier: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        quotas: Mapping[str, Any] | None = None,
        status: Status | str = Status.ACTIVE,
        trial_ends_at: datetime | None = None,
        timezone: str = "UTC",
        server: str | None = None,
        region: str | None = None,
        key_name: str = "default",
        scopes: Sequence[str] = (),
        seed: bool = True,
        filling: Filling | Takeover | None = None,
        actor: Actor = SYSTEM,
    ) -> CreatedTenant:
        """Create a tenant: its registry row, database, role and first API key.

        Args:
            slug: What people type: 1 to 63 of a-z, 0-9 and inner hyphens, beginning with a letter.
            tier: Name of a configured tier; ``TenancyConfig.default_tier`` where None.
            metadata: A JSON object of at most 64 KiB, kept with the tenant.
            quotas: Overrides of the tier's limits, as ``tenancy.quotas.set`` takes them.
            status: ``active`` or ``trial``.
            trial_ends_at: When a trial ends, an aware datetime; if it has passed, as in a webhook that comes late, the
                next housekeeping suspends the tenant.
            timezone: IANA name of the time zone of its daily and monthly quotas.
            server: Name of the server to place it on; the one that ``TenancyConfig.placement`` chooses, or
                ``default_server`` says, where None.
            region: Where its data has to stay: it is only ever placed on a server of this region; anywhere where None.
            key_name: Name of the first API key.
            scopes: Its scopes.
            seed: Whether the seeds run that are not in the template; ``tenancy.seeds.apply`` runs them later.
            filling: Where its contents come from, as a restore or a clone makes it, or the database that is taken
                over; from the template where None.
            actor: Who does this, for the audit log.

        Raises:
            TenantExistsError: the slug is taken.
            InvalidSlugError, InvalidMetadataError, UnknownTierError, ConfigurationError: an argument is malformed.
            PlacementError: no server takes it, the one that was named does not, or nothing says which of several.
            UnknownServerError: there is no server of that name.
            ProvisioningError: a step failed; the steps before it have been undone. A ``SeedError`` names the seed.
            ControlUnavailableError, ServerUnavailableError: a server does not answer.
        """
        refuse_while_bound("creating a tenant")
        started = time.perf_counter()
        values: dict[str, Any] = {
            "slug": check_slug(slug),
            "tier": self._check_tier(tier or self._config.default_tier),
            "metadata": check_metadata(metadata or {}),
            "quotas": check_overrides(quotas or {}),
            "target_status": self._check_initial(status),
            "timezone": check_timezone(timezone),
            "trial_ends_at": check_aware("trial_ends_at", trial_ends_at),
            "region": None if region is None else check_region(region),
            # with the row itself: no copy is ever without it
            "copied_from": filling.copied_from if isinstance(filling, Filling) else None,
        }
        key = generate_key(
            self._config.keys.prefix, KeyDigester(self._config.keys.decoded_peppers, self._config.keys.pepper_current)
        )
        request = PlacementRequest(
            tier=values["tier"], region=values["region"], slug=values["slug"], metadata=values["metadata"]
        )
        attempts = _PLACEMENTS if server is None and self._placer.decides_again else 1
        tenant: Tenant | None = None
        while tenant is None:
            chosen = await self._placer.choose(request, server=server)
            draft = TenantDraft(**self._placement_values(chosen), **values)
            try:
                tenant = await self._provisioner.create(
                    draft, key=key, key_name=key_name, scopes=scopes, seed=seed, filling=filling, actor=actor
                )
            except PlacementError:
                # another creation took its last place, or its row was changed, since it was chosen
                attempts -= 1
                if not attempts:
                    raise
        # its connections stay, the one that has proved the login too
        self._directory.look_again(tenant.id)
        seconds = time.perf_counter() - started
        self._events.emit(TenantCreated(tenant_id=tenant.id, slug=tenant.slug, seconds=seconds))
        return CreatedTenant(tenant, key.text, key.key_id)

    def _placement_values(self, server: str) -> dict[str, Any]:
        tenant_id = uuid7()
        name = self._names.tenant(tenant_id)
        return {
            "id": tenant_id,
            "server": server,
            "database": name,
            "role": name,
            "sealed_password": self._keyring.seal_password(tenant_id, new_password()),
        }

    def _check_tier(self, tier: str) -> str:
        if tier not in self._config.tiers:
            raise UnknownTierError(tier, tuple(self._config.tiers))
        return tier

    @staticmethod
    def _check_initial(status: Status | str) -> Status:
        if status not in (Status.ACTIVE, Status.TRIAL):
            raise ConfigurationError(f"a tenant is created as active or trial, not {status}")
        return Status(status)

    # --- finding ----------------------------------------------------------------------------------------------------

    async def get(self, tenant: TenantRef) -> Tenant:
        """Return the current state of a tenant, by id, slug, former slug, verified domain or older ``Tenant``.

        Raises:
            TenantNotFoundError: there is none. By id, the tombstone of a purged tenant is found.
            CrossTenantError: another tenant is bound.
        """
        return await self._registry.find(tenant)

    async def get_by_slug(self, slug: str) -> Tenant:
        """Return the tenant with this slug, or with a former slug that still redirects; ``get`` takes any name.

        Raises:
            TenantNotFoundError: there is none.
            CrossTenantError: another tenant is bound.
        """
        if not is_slug(slug):
            raise TenantNotFoundError(slug[:64])
        return await self._registry.find(slug)

    async def get_by_api_key(self, key: str) -> Tenant:
        """Return the tenant of an API key.

        Raises:
            InvalidCredentialError: malformed, unknown, revoked, expired or a deleted tenant's; its message is the same.
            CrossTenantError: the key belongs to another tenant than the bound one.
        """
        credential = await self._directory.authenticate(key)
        if credential.tenant.status in (Status.DELETED, Status.PURGED):
            raise InvalidCredentialError("tenant deleted", credential_id=credential.id)
        return credential.tenant

    async def get_by_metadata(
        self, metadata: Mapping[str, Any], *, status: Status | str | Iterable[Status | str] = ()
    ) -> Tenant:
        """Return the one tenant with metadata that contains ``metadata``; for webhooks, for example.

        ``get_by_metadata({"stripe_customer": "cus_1"})`` finds the tenant of a payment; the look-up is indexed.

        Args:
            metadata: Names and values, nested ones too. Lists match where each element is among the tenant's.
            status: Only these; every tenant that is not purged where none is given, deleted ones too.

        Raises:
            TenantNotFoundError: there is none.
            SeveralTenantsError: there are several.
            InvalidMetadataError: ``metadata`` is malformed, or something in it is empty or null, which would match
                tenants that it does not name.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("finding a tenant by its metadata")
        looked_for = check_lookup(metadata)
        which = TenantFilter(status=_statuses(status), metadata=looked_for)
        found = (await self._registry.page(which, limit=_NAMED)).items
        if not found:
            raise TenantNotFoundError(metadata=looked_for)
        if len(found) > 1:
            raise SeveralTenantsError(looked_for, tuple(tenant.slug for tenant in found))
        return found[0]

    async def list(
        self,
        *,
        status: Status | str | Iterable[Status | str] = (),
        tier: str | Iterable[str] = (),
        server: str | None = None,
        region: str | None = None,
        slug: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        limit: int = 100,
        after: UUID | None = None,
    ) -> TenantPage:
        """Return a page of tenants in order of creation.

        Args:
            status: Only these; purged tenants are listed only where named here.
            tier: Only these.
            server: Only tenants on this server.
            region: Only tenants of this region.
            slug: Only slugs that match this pattern: ``*`` is any text, ``?`` one character (``"ac*"``).
            metadata: Only tenants with metadata that contains this (``{"plan": "annual"}``); indexed.
            limit: How many at most, 1 to 1,000.
            after: The ``next`` of the previous page.

        Raises:
            ConfigurationError: ``limit``, a status or the pattern is malformed.
            InvalidMetadataError: ``metadata`` is malformed.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("listing tenants")
        if not 1 <= limit <= 1_000:
            raise ConfigurationError(f"limit must be 1 to 1,000, not {limit}")
        which = _filter(status, tier, server, region, slug, metadata)
        return await self._registry.page(which, limit=limit, after=after)

    async def count(
        self,
        *,
        status: Status | str | Iterable[Status | str] = (),
        tier: str | Iterable[str] = (),
        server: str | None = None,
        region: str | None = None,
        slug: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> int:
        """Return the number of tenants that ``list`` with these arguments would list, on all pages.

        Raises:
            ConfigurationError: a status or the pattern is malformed.
            InvalidMetadataError: ``metadata`` is malformed.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("counting tenants")
        return await self._registry.count(_filter(status, tier, server, region, slug, metadata))

    async def iterate(
        self,
        *,
        status: Status | str | Iterable[Status | str] = (),
        tier: str | Iterable[str] = (),
        server: str | None = None,
        region: str | None = None,
        slug: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[Tenant]:
        """Yield every tenant in order of creation, page by page; the arguments are those of ``list``."""
        async for tenant in self._registry.iterate(_filter(status, tier, server, region, slug, metadata)):
            yield tenant
            # the caller must have left this tenant's scope before it gets the next one
            refuse_while_bound("listing tenants")

    # --- changes ----------------------------------------------------------------------------------------------------

    async def update(
        self,
        tenant: TenantRef,
        *,
        tier: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        merge_metadata: Mapping[str, Any] | None = None,
        timezone: str | None = None,
        trial_ends_at: datetime | None = None,
        region: str | None = None,
        expected_tier: str | None = None,
        actor: Actor = SYSTEM,
    ) -> Tenant:
        """Change fields of a tenant; a field that is None stays.

        Args:
            tenant: Which one.
            tier: Name of a configured tier.
            metadata: A JSON object of at most 64 KiB, which replaces all of the metadata.
            merge_metadata: What changes in its metadata, as a JSON merge patch (RFC 7396): names that are not given
                stay, null removes one, an object is merged into an object. Merges at once lose nothing.
            timezone: IANA name of a time zone.
            trial_ends_at: When its trial ends, an aware datetime; if it has passed, the next housekeeping suspends the
                tenant, where it is in trial.
            region: Where its data has to stay, which must be where it is; empty text: anywhere.
            expected_tier: Change nothing unless the tenant is still in this tier.
            actor: Who does this, for the audit log.

        Raises:
            TenantNotFoundError: no such tenant.
            TierChangedError: it is not in ``expected_tier``.
            PlacementError: its server is in another region than ``region``.
            UnknownTierError, InvalidMetadataError, ConfigurationError: an argument is malformed, or metadata is given
                in both ways; nothing changed.
        """
        if metadata is not None and merge_metadata is not None:
            raise ConfigurationError("give metadata, which replaces it, or merge_metadata, which changes it; not both")
        patch = None if merge_metadata is None else check_metadata(merge_metadata)
        values: dict[str, Any] = {}
        if tier is not None:
            values["tier"] = self._check_tier(tier)
        if metadata is not None:
            values["metadata"] = check_metadata(metadata)
        if timezone is not None:
            values["timezone"] = check_timezone(timezone)
        if trial_ends_at is not None:
            values["trial_ends_at"] = check_aware("trial_ends_at", trial_ends_at)
        if region is not None:
            values["region"] = check_region(region) if region else None
        found = await self._get_unpurged(tenant)
        if not values and not patch:
            return found
        return await run_to_completion(self._update(found, values, patch, expected_tier, actor))

    async def _update(
        self,
        found: Tenant,
        values: dict[str, Any],
        patch: Mapping[str, Any] | None,
        expected_tier: str | None,
        actor: Actor,
    ) -> Tenant:
        merge = partial(merged, patch=patch) if patch else None
        before, after = await self._registry.change(
            found.id, action="tenant.update", actor=actor, expected_tier=expected_tier, merge=merge, **values
        )
        self._directory.invalidate(tenant_id=found.id)
        if before.tier != after.tier:
            await self._align(after)
        fields = sorted({*values, *(("metadata",) if patch else ())})
        self._events.emit(TenantUpdated(tenant_id=after.id, slug=after.slug, fields=tuple(fields)))
        return after

    async def rename(
        self, tenant: TenantRef, slug: str, *, redirect_seconds: float = 30 * 86_400.0, actor: Actor = SYSTEM
    ) -> Tenant:
        """Give a tenant another slug. The names of its database and role do not change.

        Args:
            tenant: Which one.
            slug: Its new slug.
            redirect_seconds: How long the old slug redirects to this tenant; until then no other tenant can have it.
            actor: Who does this, for the audit log.

        Raises:
            TenantExistsError: the slug is taken, or still redirects to another tenant.
            InvalidSlugError: it is not valid.
            ConfigurationError: ``redirect_seconds`` is below 0, or longer than 100 years.
            TenantNotFoundError: no such tenant.
        """
        if not 0 <= redirect_seconds <= _LONGEST_REDIRECT:
            raise ConfigurationError(f"redirect_seconds must be from 0 to {_LONGEST_REDIRECT:.0f} (100 years)")
        found = await self._get_unpurged(tenant)
        return await run_to_completion(self._rename(found.id, check_slug(slug), redirect_seconds, actor))

    async def _rename(self, tenant_id: UUID, slug: str, redirect_seconds: float, actor: Actor) -> Tenant:
        before, after = await self._registry.rename(tenant_id, slug, redirect_seconds=redirect_seconds, actor=actor)
        self._directory.invalidate(tenant_id=tenant_id)
        if before.slug != after.slug:
            self._events.emit(TenantUpdated(tenant_id=after.id, slug=after.slug, fields=("slug",)))
        return after


__all__ = ["CreatedTenant", "TenantManager"]
