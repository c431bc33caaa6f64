"""A real PgBouncer in front of the test server, in transaction mode."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.engine import make_url

from tests.support.postgres import Postgres

_MISSING = (
    "pgbouncer is not installed, which these tests put in front of PostgreSQL; "
    "install it, on Debian and Ubuntu with: apt-get install pgbouncer"
)
# auth_query is asked in the database that a client connects to; every tenant's database refuses all but its own roles
# and superusers. From 1.19 on it can be asked in one database (auth_dbname), as a role without rights.
_CONFIGURATION = """
[databases]
* = host={host} port={port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
pidfile =
logfile = {directory}/pgbouncer.log
pool_mode = transaction
{sizes}auth_type = scram-sha-256
auth_file = {directory}/users.txt
auth_user = {user}
auth_query = SELECT usename, passwd FROM pg_shadow WHERE usename = $1
server_login_retry = 1
query_wait_timeout = 20
{further}
"""


class PgBouncer:
    """A running PgBouncer.

    Args:
        port: Where it listens.
        directory: Its files.
    """

    def __init__(self, port: int, directory: Path) -> None:
        self.port = port
        self.log_path = directory / "pgbouncer.log"

    @property
    def address(self) -> str:
        """A URL without user, password and database."""
        return f"postgresql://127.0.0.1:{self.port}"

    def url(self, url: str) -> str:
        """``url``, by way of this PgBouncer."""
        return make_url(url).set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)


@contextmanager
def pgbouncer(postgres: Postgres, **options: str) -> Iterator[PgBouncer]:
    """Run PgBouncer in front of the server of this run, with further ``options`` of its configuration.

    Raises:
        RuntimeError: it is not installed, or does not start.
    """
    target = make_url(postgres.admin_url)
    directory = Path(tempfile.mkdtemp(prefix="tenancy-pgbouncer-"))
    try:
        (directory / "users.txt").write_text(f'"{target.username}" "{target.password}"\n')
        listen = free_port()
        (directory / "pgbouncer.ini").write_text(
            _CONFIGURATION.format(
                host=target.host,
                port=target.port or 5432,
                listen=listen,
                directory=directory,
                user=target.username,
                sizes="" if "default_pool_size" in options else "default_pool_size = 3\n",
                further="\n".join(f"{name} = {value}" for name, value in options.items()),
            )
        )
        with running(directory, listen) as started:
            yield started
    finally:
        shutil.rmtree(directory)


@contextmanager
def running(directory: Path, listen: int) -> Iterator[PgBouncer]:
    """Run PgBouncer by the ``pgbouncer.ini`` of a directory, which has all its files.

    Raises:
        RuntimeError: it is not installed, or does not start.
    """
    command = [program(), "-q", str(directory / "pgbouncer.ini")]
    if os.geteuid() == 0:
        # it refuses to run as root
        nobody = pwd.getpwnam("nobody")
        for path in (directory, *directory.iterdir()):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        command[1:1] = ["-u", "nobody"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _wait_until_listening(process, listen)
        yield PgBouncer(listen, directory)
    finally:
        process.kill()
        process.communicate()


def program() -> str:
    """The path of PgBouncer.

    Raises:
        RuntimeError: it is not installed.
    """
    # Debian installs it where a user's PATH has nothing
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise RuntimeError(_MISSING)
    return found


def installed_version() -> str:
    """The version of PgBouncer that is installed, such as 1.18."""
    printed = subprocess.run([program(), "--version"], capture_output=True, text=True, check=True).stdout
    return ".".join(printed.split()[1].split(".")[:2])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_listening(process: subprocess.Popen[str], port: int) -> None:
    while process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(0.05)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
    _, reason = process.communicate()
    raise RuntimeError(f"pgbouncer does not start: {reason}")
