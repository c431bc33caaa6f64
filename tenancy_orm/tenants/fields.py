"""Checks of a tenant's slug, metadata and times."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ..errors import ConfigurationError, InvalidMetadataError, InvalidSlugError

SLUG = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_UUID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_METADATA_BYTES = 64 * 1024


def check_slug(slug: str) -> str:
    """Return ``slug`` if it is valid: 1 to 63 of a-z, 0-9 and inner hyphens, beginning with a letter, and no UUID.

    The rule is that of a DNS label, since a slug may be a sub-domain.

    Raises:
        InvalidSlugError: it is not valid.
    """
    if not SLUG.fullmatch(slug) or _UUID.fullmatch(slug):
        # a slug that reads as an id would be looked up as one
        raise InvalidSlugError(
            f"slug {slug!r} must be 1 to 63 of a-z, 0-9 and inner hyphens, beginning with a letter, and no UUID",
            tenant=slug,
        )
    return slug


def check_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``metadata`` as PostgreSQL's jsonb can store it.

    Raises:
        InvalidMetadataError: it is not JSON, holds a NUL character, or is larger than 64 KiB.
    """
    try:
        encoded = json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as exc:
        raise InvalidMetadataError(f"metadata must be a JSON object: {exc}") from exc
    if r"\u0000" in encoded:
        raise InvalidMetadataError("metadata has a NUL character, which jsonb cannot store")
    if len(encoded) > _METADATA_BYTES:
        raise InvalidMetadataError(f"metadata has {len(encoded)} bytes as JSON; at most {_METADATA_BYTES} are allowed")
    try:
        encoded.encode().decode("utf-8")
        loaded: dict[str, Any] = json.loads(encoded)
        json.dumps(loaded, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise InvalidMetadataError("metadata has half of a surrogate pair, which is not text") from exc
    return loaded


def check_timezone(name: str) -> str:
    """Return ``name`` if it is an IANA time zone.

    Raises:
        ConfigurationError: it is not.
    """
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigurationError(f"{name!r} is not an IANA time zone") from None
    return name


def check_aware(name: str, moment: datetime | None) -> datetime | None:
    """Return ``moment`` if it has a time zone, or is None.

    Raises:
        ConfigurationError: it has none; ``name`` is what the message calls it.
    """
    if moment is not None and moment.tzinfo is None:
        raise ConfigurationError(f"{name} must be an aware datetime, such as datetime.now(UTC)")
    return moment


__all__ = ["SLUG", "check_aware", "check_metadata", "check_slug", "check_timezone"]
