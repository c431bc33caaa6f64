"""Which WAL belongs together: of a server that was recovered to an earlier time, and of one that was replaced."""

from __future__ import annotations

import json
import struct
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

from tenancy_orm.restores.recovery.base_backups import BackupDirectory, BaseBackups
from tenancy_orm.restores.recovery.kept_wal import needed_ranges, read_wal
from tenancy_orm.restores.recovery.timelines import WalRange, branches
from tenancy_orm.restores.recovery.wal_files import Segment, list_segments, stretches
from tenancy_orm.servers import Server

SEGMENT = 16 * 1024**2
NOW = datetime.now(UTC)
ONE, OTHER = 4711, 4712


def segment(directory: Path, timeline: int, number: int, *, system: int = ONE) -> Path:
    """A file of WAL with its first page's header."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{timeline:08X}{number // 256:08X}{number % 256:08X}"
    path.write_bytes(struct.pack("=HHIQI4xQII", 0xD118, 2, timeline, number * SEGMENT, 0, system, SEGMENT, 8192))
    return path


def history(directory: Path, timeline: int, *left: tuple[int, int]) -> Path:
    """The file that says where a timeline begins: others, and the bytes of WAL at which they were left."""
    path = directory / f"{timeline:08X}.history"
    lines = (f"{one}\t{end >> 32:X}/{end & 0xFFFFFFFF:X}\tbefore 2026-11-28 14:03:00+00\n\n" for one, end in left)
    path.write_text("".join(lines), "utf-8")
    return path


def base_backup(directory: BackupDirectory, age_days: float, timeline: int, number: int, *, system: int = ONE) -> str:
    """A base backup that needs the WAL of one segment."""
    ended_at = NOW - timedelta(days=age_days)
    name = ended_at.strftime("%Y%m%dT%H%M%SZ")
    data = directory.bases / name / "data"
    (data / "global").mkdir(parents=True)
    (data / "global" / "pg_control").write_bytes(struct.pack("=Q", system))
    begin, end = number * SEGMENT + 0x28, number * SEGMENT + 0x100
    lsn = {"Timeline": timeline, "Start-LSN": f"0/{begin:X}", "End-LSN": f"0/{end:X}"}
    (data / "backup_manifest").write_text(
        f'{{ "Files": [\n],\n"WAL-Ranges": [\n{json.dumps(lsn)}\n],\n"Manifest-Checksum": "00"}}\n', "utf-8"
    )
    first = segment(data / "pg_wal", timeline, number, system=system).name
    values = {"server": "eu", "id": name, "version": 18, "size_bytes": 0, "segment_bytes": SEGMENT}
    times = dict.fromkeys(("started_at", "ended_at"), ended_at.isoformat())
    (data.parent / "backup.json").write_text(json.dumps({**values, **times, "first_segment": first}), "utf-8")
    return name


def prune(directory: BackupDirectory, *, keep_days: float) -> list[str]:
    """Prune, and return the base backups that are left."""
    BaseBackups(cast("Server", None), directory, client_programs=None)._prune(timedelta(days=keep_days))
    return [one.id for one in directory.base_backups()]


def numbers(directory: BackupDirectory) -> dict[str, list[str]]:
    """The files of WAL that are left, by their directories: timeline and number."""
    return {
        path.name: [f"{one.timeline}:{one.number:x}" for one in list_segments([path], SEGMENT)]
        for path in directory.wal_directories()
    }


def test_a_timeline_has_its_own_wal_and_what_it_comes_from(tmp_path: Path) -> None:
    """And nothing that the former one has written since, though its numbers are higher."""
    for number in range(0x30, 0x60):
        segment(tmp_path, 1, number)
    for number in range(0x40, 0x44):
        segment(tmp_path, 2, number)
    (tmp_path / "000000020000000000000044.partial").touch()
    history(tmp_path, 2, (1, 0x40 * SEGMENT + 500))
    segment(tmp_path, 3, 0x42)
    history(tmp_path, 3, (1, 0x40 * SEGMENT + 500), (2, 0x42 * SEGMENT))
    wal = read_wal([tmp_path], SEGMENT, system=None)
    assert [branch.number for branch in wal.branches] == [1, 2, 3]

    def found(place: int) -> list[tuple[int, int]]:
        chosen = wal.branches[place].select(wal.segments, SEGMENT)
        assert len(stretches(chosen)) == 1
        return [(chosen[0].number, chosen[-1].number), *sorted({(one.timeline, 0) for one in chosen})]

    assert found(0) == [(0x30, 0x5F), (1, 0)]
    assert found(1) == [(0x30, 0x44), (1, 0), (2, 0)]
    # exactly between two segments
    assert found(2) == [(0x30, 0x42), (1, 0), (2, 0), (3, 0)]
    own = wal.branches[1].own(wal.segments, SEGMENT)
    assert [one.number for one in own] == [0x40, 0x41, 0x42, 0x43, 0x44]


def test_a_base_backup_of_what_was_left_leads_to_no_later_timeline(tmp_path: Path) -> None:
    """Also one that had begun before the server was left, and ended after that."""
    history(tmp_path, 2, (1, 1000))
    first, second = branches([1, 2], {2: tmp_path / "00000002.history"})
    assert (first.has_history, second.has_history, second.begin) == (False, True, 1000)
    for ranges, expected in {
        (1, 10, 1000): (True, True),
        (1, 10, 1001): (True, False),
        (1, 1001, 1002): (True, False),
        (2, 1000, 1002): (False, True),
    }.items():
        assert tuple(branch.has([WalRange(*ranges)]) for branch in (first, second)) == expected
    (alone,) = branches([7], {})
    assert (alone.number, alone.has_history, alone.has([WalRange(7, 1, 2)])) == (7, False, True)


def test_the_wal_of_another_cluster_is_none_of_a_base_backups(tmp_path: Path) -> None:
    """Its files may have the same names, and its timelines the same numbers."""
    segment(tmp_path / "1", 2, 5, system=OTHER)
    history(tmp_path / "1", 2, (1, 1000))
    segment(tmp_path / "2", 2, 5)
    segment(tmp_path / "2", 2, 6)
    history(tmp_path / "2", 2, (1, 2000))
    wal = read_wal([tmp_path / "1", tmp_path / "2"], SEGMENT, system=ONE)
    assert [one.path.parent.name for one in wal.segments] == ["2", "2"]
    assert [branch.begin for branch in wal.branches] == [2000]


def test_what_a_base_backup_needs_is_in_its_manifest(tmp_path: Path) -> None:
    directory = BackupDirectory(tmp_path, "eu")
    name = base_backup(directory, 1, 3, 0x45)
    (data,) = (tmp_path / "eu" / "base" / name).glob("data")
    assert needed_ranges(data) == [WalRange(3, 0x45 * SEGMENT + 0x28, 0x45 * SEGMENT + 0x100)]
    (data / "backup_manifest").unlink()
    (backup,) = directory.base_backups()
    assert directory.ranges(backup) == [WalRange(3, 0x45 * SEGMENT, 0x45 * SEGMENT)]


def test_the_wal_of_a_cluster_that_replaces_the_server_is_kept(tmp_path: Path) -> None:
    """It begins with low numbers again, before it has a base backup; the former one's goes with its base backups."""
    directory = BackupDirectory(tmp_path, "eu")
    directory.prepare()
    for number in range(0x10, 0x24):
        segment(directory.wal / "000001", 1, number)
    for number in range(2, 6):
        segment(directory.wal / "000002", 1, number, system=OTHER)
    old = [base_backup(directory, 20, 1, 0x11), base_backup(directory, 10, 1, 0x20)]
    assert not directory.leads_on(directory.base_backups()[-1])
    assert prune(directory, keep_days=7) == [old[-1]]
    kept = [f"1:{number:x}" for number in range(2, 6)]
    assert numbers(directory) == {"000001": [f"1:{number:x}" for number in range(0x20, 0x24)], "000002": kept}
    new = base_backup(directory, 5, 1, 4, system=OTHER)
    assert directory.leads_on(directory.base_backups()[-1])
    # a time of the last seven days may be one of the former cluster
    assert prune(directory, keep_days=7) == [old[-1], new]
    assert numbers(directory)["000001"]
    assert prune(directory, keep_days=1) == [new]
    assert numbers(directory) == {"000002": ["1:4", "1:5"]}


def test_what_leads_to_a_later_timeline_is_kept_as_long_as_nothing_else_does(tmp_path: Path) -> None:
    """A server that was recovered to an earlier time left the newest base backup, and higher numbers, behind."""
    directory = BackupDirectory(tmp_path, "eu")
    directory.prepare()
    for number in range(0x30, 0x60):
        segment(directory.wal / "000001", 1, number)
    for number in range(0x40, 0x48):
        segment(directory.wal / "000002", 2, number)
    history(directory.wal / "000002", 2, (1, 0x40 * SEGMENT + 500))
    old, first, left = (base_backup(directory, *one) for one in ((30, 1, 0x31), (20, 1, 0x35), (10, 1, 0x50)))
    assert [directory.leads_on(one) for one in directory.base_backups()] == [True, True, False]
    assert prune(directory, keep_days=7) == [first, left]
    later = [f"2:{number:x}" for number in range(0x40, 0x48)]
    assert numbers(directory) == {"000001": [f"1:{n:x}" for n in range(0x35, 0x60)], "000002": later}
    assert old not in [first, left]
    new = base_backup(directory, 5, 2, 0x45)
    assert prune(directory, keep_days=7) == [first, left, new]
    assert numbers(directory)["000002"] == later
    assert prune(directory, keep_days=1) == [new]
    assert numbers(directory)["000002"] == later[5:]


def test_a_segment_is_one_file_of_its_number() -> None:
    """Whatever order they come in."""
    (branch,) = branches([1], {})
    files = [Segment(number, 1, Path(f"{number:024X}")) for number in (3, 1, 2)]
    assert [one.number for one in branch.select(files, SEGMENT)] == [1, 2, 3]
