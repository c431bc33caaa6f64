"""Which files of a dump are complete, when ``pg_dump`` has to wait, and how it compresses."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from tenancy_orm.backups import dump
from tenancy_orm.backups.dump import Dump, _Feed, _level, _Written, in_thread
from tenancy_orm.backups.spool import Spool
from tenancy_orm.errors import BackupError
from tests.support.waiting import HANGS


class Program:
    """What was asked of the program."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def pause(self) -> None:
        self.asked.append("pause")

    def resume(self) -> None:
        self.asked.append("resume")


def files(directory: Path, *names: str, size: int = 10) -> list[Path]:
    """Files in a directory."""
    made = [directory / name for name in names]
    for file in made:
        file.write_bytes(bytes(size))
    return made


def test_all_but_the_file_that_appeared_last_are_complete(tmp_path: Path) -> None:
    """Whatever their times say: the clock may have been set back. Tables of contents are not, before the end."""
    written = _Written(tmp_path / "dump")
    assert written.complete() == []
    (tmp_path / "dump").mkdir()
    first, second, _ = files(tmp_path / "dump", "3.dat", "9.dat", "blobs.toc")
    assert [written.complete() for _ in range(3)] == [[], [], []]
    (third,) = files(tmp_path / "dump", "2.dat")
    os.utime(third, ns=(1, 1))
    assert written.complete() == [first, second]
    first.unlink()
    assert [written.complete() for _ in range(3)] == [[], [], []]
    files(tmp_path / "dump", "toc.dat")
    assert written.complete() == []
    (fourth,) = files(tmp_path / "dump", "4.dat")
    assert written.complete() == [third]
    # while the directory was read, this one was made, and the fourth after it
    files(tmp_path / "dump", "5.dat")
    assert written.complete() == []
    files(tmp_path / "dump", "6.dat")
    assert written.complete() == [fourth]


def test_it_waits_while_files_wait_and_fails_where_one_file_is_too_large(tmp_path: Path) -> None:
    one, program, feed = Dump.__new__(Dump), Program(), _Feed()
    one._spool = Spool(tmp_path, 100)
    directory = tmp_path / "x" / "dump"
    directory.mkdir(parents=True)
    first, second = files(directory, "1.dat", "2.dat", size=40)
    feed.add([first])
    one._bound(program, directory, feed)
    first.unlink()
    one._bound(program, directory, feed)
    second.write_bytes(bytes(90))
    one._bound(program, directory, feed)
    assert program.asked == ["pause", "resume", "resume"]
    second.write_bytes(bytes(101))
    with pytest.raises(BackupError, match="a table takes more than the 100 bytes"):
        one._bound(program, directory, feed)


def test_a_feed_that_is_stopped_fails_whoever_reads_it(tmp_path: Path) -> None:
    feed = _Feed()
    (one,) = files(tmp_path, "1.dat")
    feed.add([one, one])
    feed.stop()
    reading = iter(feed)
    assert next(reading) == one
    with pytest.raises(BackupError, match="was stopped"):
        next(reading)
    whole = _Feed()
    whole.add([one])
    whole.finish()
    whole.stop()
    assert list(whole) == [one]


def test_older_programs_know_levels_alone() -> None:
    assert (_level("gzip:6", 18), _level("zstd:3", 16), _level("none", 18)) == ("gzip:6", "zstd:3", "0")
    assert (_level("gzip:9", 15), _level("gzip", 14)) == ("9", "6")
    with pytest.raises(BackupError, match="supports only gzip"):
        _level("zstd", 15)


async def test_a_thread_that_hangs_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that writes to a file system over a network which is gone; the cancellation is not lost."""
    monkeypatch.setattr(dump, "_STOP_SECONDS", 0.05)
    hangs, stopped = threading.Event(), threading.Event()
    working = asyncio.create_task(in_thread(lambda: hangs.wait(HANGS), stopped.set))
    await asyncio.sleep(0)
    working.cancel()
    try:
        with pytest.raises(asyncio.CancelledError):
            await working
        assert stopped.is_set() and not hangs.is_set()
    finally:
        hangs.set()
