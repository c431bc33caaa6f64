"""Embedded servers that start from a copy of a cluster: initdb takes half a second of processor time each time."""

from __future__ import annotations

import secrets
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tenancy_orm.testing.embedded import EmbeddedServer, fast_directory

_PASSWORD_FILE = "superuser.password"

# by version: what initdb made in this process for the first of them, and its superuser's password
_templates: dict[int, tuple[tempfile.TemporaryDirectory[str], str]] = {}


class CopiedServer(EmbeddedServer):
    """An embedded server; all of a version in one process have the same superuser's password."""

    @classmethod
    def for_tests(
        cls, data_dir: Path | None = None, *, version: int = 18, settings: Mapping[str, str] | None = None
    ) -> EmbeddedServer:
        server = super().for_tests(data_dir, version=version, settings=settings)
        if data_dir is None and version in _templates:
            password = server.data_dir / _PASSWORD_FILE
            password.touch(mode=0o600)
            password.write_text(_templates[version][1])
        return server

    def _initialise(self) -> None:
        known = _templates.get(self.version)
        if known is None or (self.data_dir / _PASSWORD_FILE).read_text() != known[1]:
            super()._initialise()
            self._keep_template()
            return
        target = self._cluster_home() / "pgdata"
        _copy(Path(known[0].name) / "pgdata", target)
        _change_identifier(target / "global" / "pg_control")
        # -f: the checksum of pg_control is that of the other identifier. The log begins again, too.
        self._run([str(self._programs / "pg_resetwal"), "-f", "-D", str(target)], "pg_resetwal")
        if (link := self.data_dir / "pgdata") != target:
            link.symlink_to(target)

    def _keep_template(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="tenancy-cluster-", dir=fast_directory())
        _copy(self._pgdata, Path(directory.name) / "pgdata")
        _templates.setdefault(self.version, (directory, (self.data_dir / _PASSWORD_FILE).read_text()))


def _copy(source: Path, target: Path) -> None:
    """Copy a cluster; its files keep their owner."""
    subprocess.run(["cp", "-a", source, target], check=True)


def _change_identifier(control: Path) -> None:
    """Give a cluster a system identifier of its own, by which this package knows a server under two addresses."""
    with control.open("r+b") as file:
        # a positive number, as those of initdb, which begin with the time
        file.write(secrets.token_bytes(7) + b"\0")
