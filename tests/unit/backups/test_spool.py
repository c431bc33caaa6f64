"""Temporary directories: bounded, locked while they are in use, and removed when their process has died."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


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


def test_what_others_still_need_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backups that run at once, each of which would have room alone; what one has written is counted once."""
    size, reserve = 1_000_000, 64 * 1024**2

    def usage(path: Path) -> _Usage:
        used = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return _Usage(0, used, reserve + 10 * size - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    spool, other = Spool(tmp_path, 100 * size), Spool(tmp_path, 100 * size)
    with spool.open(6 * size) as directory:
        refused = pytest.raises(BackupError, match=r"are free in .*, of which others that run now need 6,000,000; make")
        with refused, other.open(5 * size):
            pass
        (directory / "dump").mkdir()
        (directory / "dump" / "1.dat").write_bytes(bytes(2 * size))
        (directory / "2.dat").write_bytes(bytes(size))
        with (
            other.open(4 * size),
            pytest.raises(BackupError, match="others that run now need 7,000,000"),
            spool.open(1),
        ):
            pass
        assert list(tmp_path.iterdir()) == [directory]
    # a process that was killed at once needs nothing any more
    (tmp_path / "tenancy-backup-9000000-left").mkdir()
    with spool.open(9 * size):
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
