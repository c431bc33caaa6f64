"""Checks of a tenant's slug, metadata and times."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ..errors import ConfigurationError, InvalidMetadataError, InvalidSlugError
from ..tenant import parse_id

_SLUG = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_PATTERN = re.compile(r"[a-z0-9*?-]{1,200}")
_METADATA_BYTES = 64 * 1024


def is_slug(text: str) -> bool:
    """Whether a tenant can have this slug. What reads as an id is none: it would be looked up as one."""
    return _SLUG.fullmatch(text) is not None and parse_id(text) is None


def check_slug(slug: str) -> str:
    """Return ``slug`` if it is valid: 1 to 63 of a-z, 0-9 and inner hyphens, a letter first, and not a UUID.

    The rule is that of a DNS label, since a slug may be a sub-domain.

    Raises:
        InvalidSlugError: it is not valid.
    """
    if not is_slug(slug):
        raise InvalidSlugError(
            f"slug {slug!r} must be 1 to 63 of a-z, 0-9 and inner hyphens, start with a letter, and not be a UUID",
            tenant=slug,
        )
    return slug


def check_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``metadata`` as PostgreSQL's jsonb can store it.

    Raises:
        InvalidMetadataError: it is not a JSON object, holds a NUL character, or is larger than 64 KiB.
    """
    if not isinstance(metadata, Mapping):
        raise InvalidMetadataError(f"metadata must be a JSON object, not {type(metadata).__name__}")
    try:
        _check_names(metadata)
        encoded = json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as exc:
        raise InvalidMetadataError(f"metadata must be a JSON object: {exc}") from exc
    except RecursionError:
        raise InvalidMetadataError("metadata is nested too deeply") from None
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


def _check_names(value: Any) -> None:
    """Refuse names that are not text: ``json`` would turn 1, True and None into text without a word."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise InvalidMetadataError(f"metadata has the name {name!r}, which is not text")
            _check_names(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_names(inner)


def merged(current: Mapping[str, Any], *, patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``current`` changed by ``patch`` as RFC 7396 says: objects are merged, null removes, the rest replaces.

    Raises:
        InvalidMetadataError: the result is larger than metadata may be.
    """
    return check_metadata(_patched(current, patch))


def _patched(current: Any, patch: Any) -> Any:
    if not isinstance(patch, Mapping):
        return patch
    result = dict(current) if isinstance(current, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _patched(result.get(name), value)
    return result


def check_lookup(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``metadata`` if it can tell one tenant from others: it has names, and each has a value.

    PostgreSQL's containment finds everybody by ``{}``, and by null those with a null: what a caller looks for who has
    read an id that is not there.

    Raises:
        InvalidMetadataError: it is malformed, or something in it is empty or null.
    """
    checked = check_metadata(metadata)
    if _is_vacant(checked):
        raise InvalidMetadataError(
            f"the metadata {checked!r} can belong to any tenant: something in it is empty or null"
        )
    return checked


def _is_vacant(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return not value or any(map(_is_vacant, value.values() if isinstance(value, dict) else value))
    return value is None or value == ""


def check_pattern(pattern: str | None) -> str | None:
    """Return a pattern of slugs as LIKE takes it: ``*`` is any text, ``?`` any character.

    Raises:
        ConfigurationError: it holds what no slug has.
    """
    if pattern is None:
        return None
    if type(pattern) is not str or not _PATTERN.fullmatch(pattern):
        raise ConfigurationError(f"slug {pattern!r} must be of a-z, 0-9 and hyphens, with * for any text and ? for one")
    # a slug has none of LIKE's own signs
    return pattern.replace("*", "%").replace("?", "_")


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
    if moment is not None and getattr(moment, "tzinfo", None) is None:
        raise ConfigurationError(f"{name} must be an aware datetime, such as datetime.now(UTC)")
    return moment


__all__ = [
    "check_aware",
    "check_lookup",
    "check_metadata",
    "check_pattern",
    "check_slug",
    "check_timezone",
    "is_slug",
    "merged",
]
