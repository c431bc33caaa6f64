"""Temporary directories: bounded, locked while they are in use, and removed when their process has died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tenancy_orm.backups.spool import Spool, used_bytes
from tenancy_orm.errors import BackupError

_HOLD = """
import sys, time
from tenancy_orm.backups.spool import Spool
with Spool(sys.argv[1], 1000).open() as directory:
    (directory / "rows").write_text("secret")
    print(directory, flush=True)
    time.sleep(600)
"""


def test_it_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "new", 1_000)
    with spool.open(1_000) as directory:
        assert directory.stat().st_mode & 0o077 == 0
        (directory / "a").write_bytes(bytes(10))
        (directory / "b").write_bytes(bytes(5))
        assert used_bytes(directory) == 15
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(BackupError, match=r"backup\.max_temporary_bytes is 1,000; raise it"), spool.open(1_001):
        pass
    with pytest.raises(BackupError, match="make room"), Spool(tmp_path, 10**18).open(10**17):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(BackupError, match="no temporary directory"), Spool(tmp_path / "file", 1).open():
        pass


def test_what_a_killed_process_leaves_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().strip())
        with Spool(tmp_path, 1_000).open():
            assert (held / "rows").exists()
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    assert (held / "rows").exists()
    with Spool(tmp_path, 1_000).open():
        assert not held.exists()
