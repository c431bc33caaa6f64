"""Which files of a dump are complete, when ``pg_dump`` has to wait, and how it compresses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tenancy_orm.backups.dump import Dump, _complete, _Feed, _level
from tenancy_orm.backups.spool import Spool
from tenancy_orm.errors import BackupError


class Program:
    """What was asked of the program."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def pause(self) -> None:
        self.asked.append("pause")

    def resume(self) -> None:
        self.asked.append("resume")


def files(directory: Path, *names: str, size: int = 10) -> list[Path]:
    """Files that were written one after the other."""
    made = []
    for number, name in enumerate(names):
        file = directory / name
        file.write_bytes(bytes(size))
        os.utime(file, ns=(number, number))
        made.append(file)
    return made


def test_all_but_the_newest_are_complete(tmp_path: Path) -> None:
    """Tables of contents are not, before the end; nor are those of the same time as the newest."""
    assert _complete(tmp_path / "none") == []
    first, second, third, _ = files(tmp_path, "3.dat", "2.dat", "9.dat", "blobs.toc")
    assert _complete(tmp_path) == [first, second]
    os.utime(second, ns=(2, 2))
    assert _complete(tmp_path) == [first]
    files(tmp_path, "toc.dat")
    os.utime(third, ns=(9, 9))
    assert _complete(tmp_path) == [first, second]


def test_it_waits_while_files_wait_and_fails_where_one_file_is_too_large(tmp_path: Path) -> None:
    dump, program, feed = Dump.__new__(Dump), Program(), _Feed()
    dump._spool = Spool(tmp_path, 100)
    directory = tmp_path / "x" / "dump"
    directory.mkdir(parents=True)
    first, second = files(directory, "1.dat", "2.dat", size=40)
    feed.add([first])
    dump._bound(program, directory, feed)
    first.unlink()
    dump._bound(program, directory, feed)
    second.write_bytes(bytes(90))
    dump._bound(program, directory, feed)
    assert program.asked == ["pause", "resume", "resume"]
    second.write_bytes(bytes(101))
    with pytest.raises(BackupError, match="a table takes more than the 100 bytes"):
        dump._bound(program, directory, feed)


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
    with pytest.raises(BackupError, match="knows gzip alone"):
        _level("zstd", 15)
