"""Whether the files of a base backup are those that the server has sent: its manifest has a checksum of each."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...cancellation import run_to_completion
from ...errors import RecoveryError
from ...postgres.programs import Programs, environment_of

_MANIFEST = "backup_manifest"
# what a server writes into its directory, and what is of a recovery: as pg_verifybackup
_IGNORED = ("backup_manifest", "pg_wal", "postgresql.auto.conf", "standby.signal", "recovery.signal")
_SHOWN = 300


async def verify_files(programs: Programs, data: Path) -> None:
    """Compare the files of a base backup with its manifest, and read the WAL that it needs.

    Raises:
        RecoveryError: a file was changed, is missing or is in the way.
    """
    process = await asyncio.create_subprocess_exec(
        programs.path("pg_verifybackup"),
        "--quiet",
        str(data),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        # it starts pg_waldump
        env=environment_of({}),
    )
    try:
        _, printed = await process.communicate()
    except BaseException:
        process.kill()
        await run_to_completion(process.wait())
        raise
    if process.returncode == 0:
        return
    if process.returncode is not None and process.returncode < 0:
        # some builds of version 18 crash at once, that of the extra "embedded" among them
        problem = await asyncio.to_thread(find_problem, data)
    else:
        lines = printed.decode(errors="replace").strip().splitlines()
        problem = lines[0].partition(": error: ")[2] if lines else f"it ended with status {process.returncode}"
    if problem is not None:
        raise RecoveryError(f"the base backup in {str(data)!r} is damaged: {problem[:_SHOWN]}")


def find_problem(data: Path) -> str | None:
    """Return the first difference between the files and the manifest; None where there is none."""
    raw = (data / _MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)
        end = raw.rindex(b'"Manifest-Checksum"')
    except ValueError:
        return "its manifest is not readable"
    if hashlib.sha256(raw[:end]).hexdigest() != manifest["Manifest-Checksum"]:
        return "its manifest was changed"
    expected = {_path(entry): entry for entry in manifest["Files"]}
    found = set(_files(data))
    for name in sorted(expected.keys() | found):
        if name.split("/", 1)[0] in _IGNORED:
            continue
        if name not in expected:
            return f"{name!r} is in the way"
        if name not in found:
            return f"{name!r} is missing"
        entry = expected[name]
        if (data / name).stat().st_size != entry["Size"]:
            return f"{name!r} has another size"
        algorithm = entry.get("Checksum-Algorithm")
        if algorithm is not None and algorithm.startswith("SHA"):
            with (data / name).open("rb") as file:
                digest = hashlib.file_digest(file, algorithm.lower()).hexdigest()
            if digest != entry["Checksum"]:
                return f"{name!r} was changed"
    return None


def _path(entry: dict[str, Any]) -> str:
    # a name that is no UTF-8 is there in hexadecimal
    return str(entry["Path"]) if "Path" in entry else os.fsdecode(bytes.fromhex(entry["Encoded-Path"]))


def _files(data: Path) -> Iterator[str]:
    for directory, _, names in os.walk(data, followlinks=True):
        for name in names:
            yield str(Path(directory, name).relative_to(data))


__all__ = ["find_problem", "verify_files"]
