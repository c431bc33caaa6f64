"""How a source's schema differs from that of its revision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..drift.catalogue import Catalogue, Key
from ..drift.compare import Difference, compare
from ..provisioning.copies import archives

# owners and rights are not adopted; versions of extensions are those that the server has
_NOT_COMPARED = frozenset({"privilege", "default privileges"})
_NO_FIELDS: Mapping[str, frozenset[str]] = {
    "schema": frozenset({"owner", "comment"}),
    "extension": frozenset({"version"}),
}


def comparable(catalogue: Catalogue) -> Catalogue:
    """Return a catalogue with what is compared: without owners, rights and versions."""
    objects = {
        key: {
            name: value
            for name, value in fields.items()
            if name != "owner" and name not in _NO_FIELDS.get(key.kind, frozenset())
        }
        for key, fields in catalogue.objects.items()
        if key.kind not in _NOT_COMPARED and not _is_guard(key)
    }
    return Catalogue(objects, catalogue.owner)


def _is_guard(key: Key) -> bool:
    # the administrator's, in databases that a superuser has made
    return key.kind in ("event trigger", "schema", "function") and key.name.startswith("tenancy_guard")


def differences(expected: Catalogue, found: Catalogue, left_out: Iterable[str] = ()) -> list[Difference]:
    """Return how a source differs from its revision.

    Args:
        expected: The schema of the revision.
        found: That of the source, restored on the same server.
        left_out: What was not restored, as ``pg_restore`` lists it: foreign tables are missing then.
    """
    return [*compare(comparable(expected), comparable(found)), *map(_left_out, left_out)]


def _left_out(entry: str) -> Difference:
    kind = next((kind for kind in archives.LEFT_OUT if entry.startswith(f"{kind} ")), entry.partition(" ")[0])
    name = entry[len(kind) :].strip()
    return Difference(
        kind=kind.lower(),
        parent=None,
        name=name,
        change="extra",
        text=f"{kind.lower()} {name} is not copied",
    )


__all__ = ["comparable", "differences"]
