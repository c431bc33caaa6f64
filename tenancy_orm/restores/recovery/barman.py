"""``BarmanRecovery``: recovers servers from the backups of Barman, by its program.

The program runs as this process does. It has to be the account that Barman's files belong to, or the command says how
to become that: ``sudo -u barman barman``.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...cancellation import run_to_completion
from ...errors import ConfigurationError, RecoveryError, RecoveryTargetError
from ...postgres.programs import Programs, end_process, environment_of, find_server_programs
from .keeper import Keeper
from .providers import RecoveryRequest, RecoveryWindow, ScratchOptions
from .scratch import RecoveredDatabase
from .wal_files import Segment, last_time, read_header, segment_number, stretches

_DONE = "DONE"
_SEGMENT = re.compile(r"[0-9A-F]{24}")
_SHOWN = 300
_ARCHIVE_SECONDS = 30.0
_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 300.0  # what lists and shows takes a second or two
_END_SECONDS = 10.0
_SEGMENT_BYTES = 16 * 1024**2  # where Barman does not say it: what initdb uses
_CREDENTIALS = re.compile(r"://[^@\s]*@")


@dataclass(frozen=True, slots=True)
class _Backup:
    id: str
    ended_at: datetime
    size_bytes: int


class BarmanRecovery:
    """Recovers servers from Barman's base backups and WAL.

    Args:
        options: How and where recovered servers run.
        name: Barman's name of a server; ``{server}`` stands for this package's.
        command: The program, and arguments that come first: ``"sudo -u barman barman"``, ``"barman -c FILE"``.
    """

    def __init__(self, options: ScratchOptions, *, name: str = "{server}", command: str = "barman") -> None:
        self._options = options
        self._name = name
        self._command = tuple(shlex.split(command))

    async def window(self, server: str) -> RecoveryWindow:
        """Return the times that a server can be recovered at."""
        name = self._name.format(server=server)
        backups = await self._backups(name)
        if not backups:
            return RecoveryWindow(server=server, oldest=None, newest=None)
        programs = await self._programs(name, backups[0])
        parts = stretches(await self._segments(name, backups[0]))
        readable = await asyncio.to_thread(_are_readable, [segment for part in parts for segment in part])
        ends = [await last_time(programs, part[-3:]) if readable else None for part in parts]
        newest = next((end for end in reversed(ends) if end is not None), None)
        gaps = tuple((end, None) for end in ends[:-1])
        return RecoveryWindow(server=server, oldest=backups[0].ended_at, newest=newest, gaps=gaps)

    @asynccontextmanager
    async def recover(self, request: RecoveryRequest) -> AsyncIterator[RecoveredDatabase]:
        """Recover a server for the body, see ``Recovery``."""
        name = self._name.format(server=request.server)
        backup, segments = await self._choose(name, request)
        programs = await self._programs(name, backup)
        details = await self._show(name, backup.id)
        size = backup.size_bytes + len(segments) * _SEGMENT_BYTES
        async with self._options.open(size) as keeper:
            await self._recover(keeper, name, backup, request.time, details)
            wal = keeper.home / "data" / "barman_wal"
            if not wal.is_dir():
                raise RecoveryError("barman has copied no WAL; the option get-wal must not be in recovery_options")
            run = self._options.run(keeper, programs, request, wal=wal, restore_command='cp "barman_wal/%f" "%p"')
            async with run as recovered:
                yield recovered

    async def check(self, request: RecoveryRequest) -> None:
        """Make sure that Barman's backups reach the time."""
        await self._choose(self._name.format(server=request.server), request)

    async def _choose(self, name: str, request: RecoveryRequest) -> tuple[_Backup, list[Segment]]:
        target = request.time
        backups = await self._backups(name)
        if not backups:
            raise RecoveryTargetError(f"barman has no backup of server {name!r}")
        able = [backup for backup in backups if backup.ended_at <= target]
        if not able:
            raise RecoveryTargetError(
                f"{target.isoformat()} is before barman's oldest backup of server {name!r}, which ended at "
                f"{backups[0].ended_at.isoformat()}"
            )
        backup = able[-1]
        programs = await self._programs(name, backup)
        deadline: float | None = None
        while True:
            segments = await self._segments(name, backup)
            parts = stretches(segments)
            if not await asyncio.to_thread(_are_readable, segments):
                # PostgreSQL finds out, at the end of the WAL
                return backup, segments
            newest = await last_time(programs, parts[0]) if parts else None
            if newest is not None and newest > target:
                return backup, parts[0]
            if len(parts) > 1:
                raise RecoveryTargetError(
                    f"WAL of server {name!r} is missing after file {parts[0][-1].name}: {target.isoformat()} cannot be "
                    f"reached from barman's backup {backup.id}"
                )
            now = asyncio.get_running_loop().time()
            if deadline is None:
                deadline = now + _ARCHIVE_SECONDS
                # what is in the file that is still written is not archived; where this fails, it stays so
                await self._run("switch-wal", "--force", name, may_fail=True)
            elif now > deadline:
                break
            else:
                await asyncio.sleep(_LOOK_SECONDS)
            await self._run("archive-wal", name, may_fail=True)
        ended = "" if newest is None else f", which ended at {newest.isoformat()}"
        raise RecoveryTargetError(
            f"{target.isoformat()} is after the last transaction in barman's WAL of server {name!r}{ended}"
        )

    async def _recover(
        self, keeper: Keeper, name: str, backup: _Backup, target: datetime, details: Mapping[str, Any]
    ) -> None:
        moved: list[str] = []
        for one in (
            (details.get("base_backup_information") or {}).get("tablespaces") or details.get("tablespaces") or ()
        ):
            # a name may be anything that is no option
            moved += ["--tablespace", f"{one['name']}:{keeper.home / 'tablespaces' / str(one['oid'])}"]
        found = await keeper.run(
            *self._command,
            "recover",
            "--target-time",
            target.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f+00:00"),
            *moved,
            name,
            backup.id,
            str(keeper.home / "data"),
            as_account=False,
        )
        if found.status != 0:
            raise RecoveryError(f"barman did not recover server {name!r}: {_reason(found.output, found.errors)}")

    async def _programs(self, name: str, backup: _Backup) -> Programs:
        information = await self._show(name, backup.id)
        version = int(str(_found(information, "postgresql_version")).split(".")[0])
        if version > 10_000:  # as PostgreSQL's server_version_num
            version //= 10_000
        return await asyncio.to_thread(find_server_programs, version, self._options.client_programs)

    async def _backups(self, name: str) -> list[_Backup]:
        listed = (await self._json("list-backup", name)).get(name) or ()
        found = []
        for one in listed:
            if one.get("status") not in (_DONE, "WAITING_FOR_WALS"):
                continue
            # it is in whole seconds
            ended_at = datetime.fromtimestamp(int(one["end_time_timestamp"]) + 1, UTC)
            found.append(_Backup(one["backup_id"], ended_at, int(one["size_bytes"])))
        return sorted(found, key=lambda backup: backup.ended_at)

    async def _show(self, name: str, backup: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self._json("show-backup", name, backup))[name]
        return found

    async def _segments(self, name: str, backup: _Backup) -> list[Segment]:
        """The WAL from a backup on, as far as it is archived."""
        listed = await self._run("list-files", "--target", "wal", name, backup.id)
        information = await self._show(name, backup.id)
        size = int(_found(information, "xlog_segment_size") or _SEGMENT_BYTES)
        found = [Path(line.strip()) for line in listed.splitlines()]
        return sorted(
            Segment(segment_number(path.name, size), int(path.name[:8], 16), path)
            for path in found
            # Barman lists what it has archived, also where the file was lost since
            if _SEGMENT.fullmatch(path.name) and not _is_lost(path)
        )

    async def _json(self, *arguments: str) -> dict[str, Any]:
        printed = await self._run("-f", "json", *arguments)
        try:
            found: dict[str, Any] = json.loads(printed)
        except ValueError:
            raise RecoveryError(f"barman {arguments[0]} has printed no JSON") from None
        return found

    async def _run(self, *arguments: str, may_fail: bool = False) -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment_of({}),
            )
        except OSError as exc:
            raise ConfigurationError(
                f"{self._command[0]!r} cannot be run ({exc.strerror}): install the package barman, or correct "
                "recovery.barman_command"
            ) from exc
        bound = asyncio.timeout(_ANSWER_SECONDS)
        try:
            async with bound:
                output, errors = (one.decode(errors="replace") for one in await process.communicate())
        except BaseException as exc:
            # gently at first: only that reaches what it runs as another account, by sudo
            await run_to_completion(end_process(process, seconds=_END_SECONDS))
            if not bound.expired():
                raise
            if may_fail:
                return ""
            raise RecoveryError(
                f"barman {' '.join(arguments)} did not end within {_ANSWER_SECONDS:g} s: another command of Barman may "
                "have its lock, or the server may not answer; run it by hand"
            ) from exc
        if process.returncode != 0 and not may_fail:
            raise RecoveryError(f"barman {' '.join(arguments)} failed: {_reason(output, errors)}")
        return output


def _is_lost(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _are_readable(segments: Sequence[Segment]) -> bool:
    """Whether the files are WAL as PostgreSQL writes it: not compressed, and this account may read them."""
    try:
        return all(read_header(segment.path) is not None for segment in segments)
    except OSError:
        return False


def _reason(output: str, errors: str) -> str:
    with suppress(ValueError, TypeError, AttributeError):
        output = "\n".join(f"ERROR: {one}" for one in json.loads(output).get("_ERROR", ()))
    lines = [line for line in (*errors.splitlines(), *output.splitlines()) if line.startswith(("ERROR", "CRITICAL"))]
    reason = (lines or errors.strip().splitlines()[-1:] or ["no reason was given"])[0]
    # with JSON, Barman shows the password of a URL that it cannot read
    return _CREDENTIALS.sub("://...@", reason)[:_SHOWN]


def _found(value: Any, key: str) -> Any:
    """The first value of this key in nested objects: its place differs between Barman's versions."""
    if isinstance(value, dict):
        if key in value:
            return value[key]
        for inner in value.values():
            if (found := _found(inner, key)) is not None:
                return found
    return None


__all__ = ["BarmanRecovery"]
