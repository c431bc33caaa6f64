"""Names outside PostgreSQL that are a tenant's own: keys of caches, paths of objects and files, channels.

Every such name begins with ``t/<id>/``. All ids are equally long, so no tenant's prefix begins with another's. An id is
never used again, and stays the same when the slug changes. It has no character that a pattern or a protocol treats
specially.
"""

from __future__ import annotations

import re
from typing import overload
from urllib.parse import unquote
from uuid import UUID

from .context import as_reference, current_tenant, refuse_other_tenant
from .errors import ConfigurationError, CrossTenantError, InvalidNameError
from .tenant import Tenant

_SEPARATORS = "/:."
_STEPS = frozenset({".", ".."})
_DECODINGS = 3  # a name that is still encoded after so many is none that anyone gives a file

# control characters, backslash, ends of lines, what turns the direction of text around, halves of characters. Not all
# that is not printable: the names of macOS's screenshots have a U+202F, and emoji a U+200D
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def tenant_prefix(tenant: Tenant | UUID | str | None = None, *, separator: str = "/") -> str:
    """Return what all names of a tenant begin with: ``t/<id>/``, 39 characters of a-z, 0-9, hyphen and separator.

    Where a client is wrapped, as in ``tenancy_orm.integrations``, nothing needs to call this. With another client,
    write it in front of the name; names that end up in paths need ``checked_path`` as well.

    Args:
        tenant: A ``Tenant`` or an id; the bound tenant where None.
        separator: ``"/"``, ``":"`` or ``"."``: NATS separates the parts of a subject by ``"."``.

    Raises:
        NoTenantError: none is given and none is bound.
        CrossTenantError: another one is bound.
        AdmissionEndedError, TenantUnavailableError: the request's admission is no longer valid.
        ConfigurationError: the separator is another one, or ``tenant`` is a slug, which can change.
    """
    if len(separator) != 1 or separator not in _SEPARATORS:
        raise ConfigurationError(f"a tenant's names are separated by one of {' '.join(_SEPARATORS)}, not {separator!r}")
    return f"t{separator}{_id_of(tenant)}{separator}"


def _id_of(tenant: Tenant | UUID | str | None) -> UUID:
    if tenant is None:
        bound = current_tenant()
        if bound.admission is not None:
            bound.admission.check()
        return bound.id
    found = as_reference(tenant)
    if not isinstance(found, UUID):
        raise ConfigurationError(f"names are of a tenant's id, since a slug can change: pass the Tenant, not {found!r}")
    refuse_other_tenant(found)
    return found


def check_prefix(prefix: str, using: str) -> None:
    """Refuse to go on with what was made for a tenant, where that one is not bound any more.

    A listing, an iterator or an object that was read can be kept, and used by code that runs for another tenant.

    Args:
        prefix: The ``tenant_prefix`` that it was made with.
        using: What it is, for the error: "a listing".

    Raises:
        CrossTenantError: another tenant is bound by now.
        NoTenantError: none is.
        AdmissionEndedError, TenantUnavailableError: the request's admission is no longer valid.
    """
    if tenant_prefix() != prefix:
        raise CrossTenantError(f"using {using}", bound=current_tenant().slug, requested=prefix[2:-1])


def checked_path(path: str, *, directory: bool = False) -> str:
    """Return a path below a tenant's prefix, once it is certain that nothing can make it lead elsewhere.

    Args:
        path: Names with ``/`` between them.
        directory: Whether it may be empty, for the whole of a tenant's names, and end with ``/``, which is removed.

    Raises:
        InvalidNameError: it is absolute or empty, a part of it is empty, ``.`` or ``..``, also once it is decoded
            (``%2e%2e%2f``), or it has a backslash or a control character.
    """
    if not isinstance(path, str):
        raise InvalidNameError(repr(path), "is not a string")
    if directory:
        path = path.removesuffix("/")
        if not path:
            return path
    if path.startswith("/"):
        raise InvalidNameError(path, "is absolute")
    if "" in path.split("/"):
        raise InvalidNameError(path, "has the part ''")
    decoded = path
    # decoded too: a store is reached by URLs, and not everything in between decodes them once
    for _ in range(_DECODINGS):
        _check_parts(path, decoded)
        encoded, decoded = decoded, unquote(decoded)
        if decoded == encoded:
            return path
    raise InvalidNameError(path, "is encoded several times")


def _check_parts(path: str, decoded: str) -> None:
    if _FORBIDDEN.search(decoded):
        raise InvalidNameError(path, "has a backslash or a control character")
    for part in decoded.split("/"):
        if part in _STEPS:
            raise InvalidNameError(path, f"has the part {part!r}")


@overload
def without_prefix(name: str, prefix: str) -> str: ...


@overload
def without_prefix(name: bytes, prefix: str) -> bytes: ...


def without_prefix(name: str | bytes, prefix: str) -> str | bytes:
    """Return a name as its tenant knows it.

    Raises:
        InvalidNameError: it does not begin with ``prefix``: a client answers for another one's names.
    """
    if isinstance(name, str):
        rest: str | bytes = name.removeprefix(prefix)
    else:
        rest = name.removeprefix(prefix.encode())
    if len(rest) == len(name):
        raise InvalidNameError("a name", f"that was answered does not begin with {prefix}")
    return rest


__all__ = ["check_prefix", "checked_path", "tenant_prefix", "without_prefix"]
