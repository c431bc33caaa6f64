"""Stops an embedded server when the last process that uses it has ended, in whatever way.

It is run by path as a program, so it imports only the standard library. ``atexit`` does not run after SIGKILL or an
unhandled SIGTERM, but the kernel always releases a dead process's locks. Every process that uses a server holds a
shared lock on one file, and this program waits for the exclusive one.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

FAST_STOP_SECONDS = 30
IMMEDIATE_STOP_SECONDS = 15


def server_environment() -> dict[str, str]:
    """Return the environment for PostgreSQL's programs, without the PG* variables, which would redirect them."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def find_postmaster(pgdata: Path) -> int | None:
    """Return the pid of the server that runs on ``pgdata`` (an absolute, resolved path), or None.

    A pid in ``postmaster.pid`` proves nothing: it may have been reused, or be a zombie that is not reaped. So the
    process must be a ``postgres`` with this directory in its command line.
    """
    try:
        pid = int((pgdata / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])
    except (OSError, ValueError):
        return None
    # a negative pid is a single-user backend's; os.kill and ps would take it for a process group
    return pid if pid > 0 and _is_postmaster(pid, pgdata) else None


def _is_postmaster(pid: int, pgdata: Path) -> bool:
    if Path("/proc/self/cmdline").exists():
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return False
        program, rest = arguments[0], arguments[1:]
        return Path(program).name == "postgres" and any(
            option == "-D" and value == str(pgdata) for option, value in itertools.pairwise(rest)
        )
    # no /proc (macOS): ps joins the arguments by spaces
    listing = subprocess.run(  # noqa: S603 - no shell, and only a number varies
        ["/bin/ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return listing.split(" ", 1)[0].endswith("postgres") and f"-D {pgdata}" in listing


class _RunAs(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


def run_as(account: tuple[int, int] | None) -> _RunAs:
    """Return the ``subprocess`` options that run a program as ``account`` (uid, gid) instead of root."""
    if account is None:
        return {}
    return {"user": account[0], "group": account[1], "extra_groups": []}


def stop_postmaster(pg_ctl: Path, pgdata: Path, account: tuple[int, int] | None, *, keep: bool = True) -> None:
    """Stop the server on ``pgdata``, if one runs: sessions are ended, data is flushed; after 30 seconds by force.

    Without ``keep`` the data will be deleted, so the checkpoint that would flush it is left out.

    Raises:
        TimeoutError: the server did not end, even by an immediate shutdown.
    """
    modes = (("fast", FAST_STOP_SECONDS), ("immediate", IMMEDIATE_STOP_SECONDS))
    for mode, seconds in modes if keep else modes[1:]:
        if find_postmaster(pgdata) is None:
            return
        subprocess.run(  # noqa: S603 - no shell, a path of ours
            [str(pg_ctl), "stop", "-D", str(pgdata), "-m", mode, "-w", "-t", str(seconds), "-s"],
            cwd="/",
            env=server_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            **run_as(account),
        )
    # pg_ctl returns when postmaster.pid is deleted, a moment before the process ends
    deadline = time.monotonic() + IMMEDIATE_STOP_SECONDS
    while find_postmaster(pgdata) is not None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server on {pgdata} does not stop")
        time.sleep(0.05)


def delete_files(home: Path, pgdata: Path) -> None:
    """Delete a server's directory, and that of its cluster if it is another one."""
    if pgdata.parent != home and pgdata.name == "pgdata":
        shutil.rmtree(pgdata.parent, ignore_errors=True)
    shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, operation: int) -> Iterator[int]:
    """Hold ``flock(operation)`` on ``path``; yields the descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, operation)
        yield descriptor
    finally:
        os.close(descriptor)


def watch(home: Path, pgdata: Path, pg_ctl: Path, account: tuple[int, int] | None, *, remove: bool) -> None:
    """Wait until no process uses the server of ``home`` any more; then stop it, and with ``remove`` delete its files.

    The order of locks is ``lock`` before ``users``, as in ``EmbeddedServer``; so no lock is held while waiting for
    ``users``.
    """
    while True:
        with locked(home / "users", fcntl.LOCK_EX):
            pass
        with locked(home / "lock", fcntl.LOCK_EX):
            try:
                with locked(home / "users", fcntl.LOCK_EX | fcntl.LOCK_NB):
                    stop_postmaster(pg_ctl, pgdata, account, keep=not remove)
                    if remove:
                        delete_files(home, pgdata)
                    return
            except BlockingIOError:
                continue  # a process has joined between the two


def main(arguments: list[str]) -> None:
    """Detach from the caller, then watch: ``home pgdata pg_ctl uid gid remove``; uid 0 changes no account."""
    home, pgdata, pg_ctl, uid, gid, remove = arguments
    # the caller waits for the first process only, so it never has an unreaped child
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    account = (int(uid), int(gid)) if int(uid) else None
    with contextlib.suppress(FileNotFoundError):  # the directory was deleted, and no server is left to stop
        watch(Path(home), Path(pgdata), Path(pg_ctl), account, remove=remove == "1")


if __name__ == "__main__":
    main(sys.argv[1:])
