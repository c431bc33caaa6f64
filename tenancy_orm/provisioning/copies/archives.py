"""What of an archive of ``pg_dump`` is restored, and what is not.

Left out is what only an administrator may create, what reaches other servers, and what exists before the restore.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from ...postgres.programs import Programs, run_program
from ..rights import event_trigger

LEFT_OUT = (
    "EVENT TRIGGER",
    "EXTENSION",
    "FOREIGN DATA WRAPPER",
    "FOREIGN TABLE",
    "PROCEDURAL LANGUAGE",
    "PUBLICATION TABLE",
    "PUBLICATION TABLES IN SCHEMA",
    "PUBLICATION",
    "SERVER",
    "SUBSCRIPTION TABLE",
    "SUBSCRIPTION",
    "TRANSFORM",
    "USER MAPPING",
)
"""Kinds of entries, as ``pg_restore --list`` prints them."""

_ENTRY = re.compile(r"\d+; \d+ \d+ (?P<what>.*)")
# in the restored database all the same, or of no use there
_UNNOTED = ("EXTENSION ", f"EVENT TRIGGER - {event_trigger.NAME} ")
_GUARD = (f"SCHEMA - {event_trigger.NAME} ", f"FUNCTION {event_trigger.NAME} ")


def select(entries: str, schemas: set[str]) -> tuple[str, tuple[str, ...]]:
    """Return the entries of an archive's list that are restored, and what the others are.

    Args:
        entries: What ``pg_restore --list`` printed: ``3; 3079 16385 EXTENSION - vector``.
        schemas: The schemas of extensions, which exist already.
    """
    kept, left_out = [], []
    already = ("SCHEMA public ", *_GUARD, *(f"SCHEMA - {name} " for name in schemas))
    for line in entries.splitlines():
        match = _ENTRY.fullmatch(line)
        if match is None:
            continue
        what = match["what"].rstrip()
        about = what.removeprefix("COMMENT - ") if what.startswith("COMMENT - ") else what
        if about.startswith(tuple(f"{kind} " for kind in LEFT_OUT)):
            if about == what and not about.startswith(_UNNOTED):
                left_out.append(what)
        elif about.startswith(already):
            continue
        else:
            kept.append(line)
    return "".join(f"{line}\n" for line in kept), tuple(left_out)


async def write_list(programs: Programs, archive: str, listing: Path, schemas: set[str]) -> tuple[str, ...]:
    """Write the list of what is restored of an archive, for ``pg_restore --use-list``; returns what is left out.

    Args:
        programs: Those that can read it.
        archive: The archive.
        listing: The file that is written.
        schemas: As for ``select``.

    Raises:
        ProvisioningError: ``pg_restore`` failed.
    """
    entries = await run_program([programs.path("pg_restore"), "--list", archive], {})
    kept, left_out = select(entries, schemas)
    await asyncio.to_thread(listing.write_text, kept, "utf-8")
    return left_out


__all__ = ["LEFT_OUT", "select", "write_list"]
