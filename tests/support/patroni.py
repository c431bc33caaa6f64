"""Two nodes of Patroni and an etcd, as processes of one test: real fail-overs."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from tenancy_orm.testing import embedded
from tenancy_orm.testing._programs import Account, installations, system_account

SECONDS = 60.0


class Node:
    """One PostgreSQL with the Patroni that looks after it."""

    def __init__(self, name: str, home: Path, account: Account | None) -> None:
        self.name = name
        self.port, self.rest_port = _free_port(), _free_port()
        self._home = home
        self._account = account

    def run(self, etcd_port: int, password: str, bin_dir: Path) -> subprocess.Popen[bytes]:
        """Start it."""
        login = {"username": "postgres", "password": password}
        configuration = {
            "scope": "tenancy",
            "name": self.name,
            "restapi": _address(self.rest_port),
            "etcd3": {"host": f"127.0.0.1:{etcd_port}"},
            "bootstrap": {
                "dcs": {
                    "ttl": 20,
                    "loop_wait": 1,
                    "retry_timeout": 3,
                    "primary_start_timeout": 0,  # a crashed primary is not started again as long as there is another
                    "synchronous_mode": True,
                },
                "initdb": [{"encoding": "UTF8"}, {"auth": "scram-sha-256"}, "no-sync"],
            },
            "postgresql": {
                **_address(self.port),
                "data_dir": str(self._home / self.name),
                "bin_dir": str(bin_dir),
                "pgpass": str(self._home / f"{self.name}.pgpass"),
                "authentication": {"superuser": login, "replication": {**login, "username": "replication"}},
                "pg_hba": [f"host {what} all 127.0.0.1/32 scram-sha-256" for what in ("all", "replication")],
                "parameters": {"unix_socket_directories": "", "shared_buffers": "32MB", "fsync": "off"},
            },
        }
        path = self._home / f"{self.name}.json"  # which is YAML too
        path.write_text(json.dumps(configuration))
        command = [sys.executable, "-m", "patroni", str(path)]
        if self._account is not None:
            # PostgreSQL refuses to run as root; the capability is for programs below /root
            command = [
                *("setpriv", f"--reuid={self._account.uid}", f"--regid={self._account.gid}", "--clear-groups"),
                *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
                *command,
            ]
            os.chown(path, *self._account.ids)
        return _start(command, self._home / f"{self.name}.log")

    def members(self) -> dict[str, tuple[str, str]]:
        """The role and the state of each node, as this one's Patroni knows them; none where it does not answer."""
        with (
            suppress(OSError, ValueError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.rest_port}/cluster", timeout=2) as answer,
        ):
            return {one["name"]: (one["role"], one["state"]) for one in json.load(answer)["members"]}
        return {}

    def crash(self) -> None:
        """Kill PostgreSQL (SIGKILL), and not its Patroni."""
        os.kill(int((self._home / self.name / "postmaster.pid").read_text().split("\n", 1)[0]), signal.SIGKILL)


class Cluster:
    """The two nodes."""

    def __init__(self, nodes: list[Node], password: str, logs: Callable[[], str]) -> None:
        self.nodes = nodes
        self._password = password
        self._logs = logs

    @property
    def url(self) -> str:
        """The superuser's URL of both nodes, for the one that takes writes."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"postgresql://postgres:{self._password}@{hosts}/postgres?target_session_attrs=read-write"

    def leader(self) -> Node | None:
        """The node that takes writes, once the other one is a synchronous standby of it."""
        for asked in self.nodes:
            found = asked.members()
            if {role for role, _ in found.values()} == {"leader", "sync_standby"}:
                return next(node for node in self.nodes if found[node.name][0] == "leader")
        return None

    def wait_for_leader(self) -> Node:
        """Wait for it."""
        deadline = time.monotonic() + SECONDS
        while (leader := self.leader()) is None:
            assert time.monotonic() < deadline, self._logs()
            time.sleep(0.1)
        return leader


@contextmanager
def patroni() -> Iterator[Cluster]:
    """Run two nodes for the body; nothing is left of them."""
    account = system_account() if os.geteuid() == 0 else None
    home = Path(tempfile.mkdtemp(prefix="tenancy-patroni-", dir=embedded.fast_directory()))
    etcd_port, peer_port = _free_port(), _free_port()
    client, peer = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
    nodes = [Node(name, home, account) for name in ("one", "two")]

    def logs() -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(home.glob("*.log")))

    try:
        if account is not None:
            os.chown(home, *account.ids)
        with ExitStack() as stack:
            etcd = [
                *("etcd", "--name=default", f"--data-dir={home / 'etcd'}"),
                *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
                *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
                f"--initial-cluster=default={peer}",
            ]
            stack.callback(_end, _start(etcd, home / "etcd.log"))
            password = secrets.token_hex(16)
            for node in nodes:
                stack.callback(_end, node.run(etcd_port, password, installations()[18].bin_dir))
            yield Cluster(nodes, password, logs)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "PATRONI", "ETCD"))}
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", env=environment
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it has started."""
    children: list[Any] = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    process.kill()
    process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=10)


def _address(port: int) -> dict[str, str]:
    return {"listen": f"127.0.0.1:{port}", "connect_address": f"127.0.0.1:{port}"}


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
