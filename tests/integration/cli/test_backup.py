"""``tenancy backup``."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.integration.cli.test_cli import Cli, cli

__all__ = ["cli"]


async def test_backups_are_made_listed_verified_kept_extracted_and_pruned(cli: Cli, tmp_path: Path) -> None:
    """Tables for people, JSON for programs."""
    await cli("init")
    await cli("create", "acme")
    missing = await cli("backup", "verify", "control")
    assert (missing.status, missing.err.strip().endswith("tenancy backup run --control")) == (1, True), missing.err
    with (tmp_path / "tenancy.toml").open("a") as settings:
        settings.write(f'\n[backup]\nstore = "file:{tmp_path / "store"}"\n')
    made = await cli("backup", "run", "--all")
    assert made.status == 0, made.err
    lines = [line.split() for line in made.out.splitlines()]
    assert lines[0] == ["TENANT", "BACKUP", "SIZE", "SECONDS", "RESULT"]
    assert [line[0] for line in lines[1:]] == ["acme"]
    control = (await cli("backup", "run", "--control", "--json")).json["done"][0]
    assert (control["slug"], control["state"]) == (None, "done")
    due = (await cli("backup", "run", "--due", "--json")).json
    assert due == {"done": [], "failed": {}, "skipped": ["control"]}
    acme = (await cli("backup", "list", "acme", "--json")).json[0]
    assert control["id"] in (await cli("backup", "list", "--control")).out
    assert control["id"] in (await cli("backup", "list", "control")).out
    verified = await cli("backup", "verify", "acme", "control", "--json")
    assert verified.status == 0, verified.err
    assert [(one["good"], one["restored"]) for one in verified.json] == [(True, True), (True, True)]
    quick = await cli("backup", "verify", "acme", "--quick")
    assert quick.out.splitlines()[1].split()[-1] == "good"
    directory = tmp_path / "acme"
    assert (await cli("backup", "extract", "acme", str(directory))).out.strip() == str(directory)
    assert (directory / "toc.dat").is_file()
    # nothing but the store and the settings is needed
    lost = await cli(
        "backup", "extract", "control", "lost", "--from-store", TENANCY_CONTROL_URL="postgresql://x@127.0.0.1:1/x"
    )
    assert (lost.status, lost.out.strip()) == (0, "lost"), lost.err
    assert (tmp_path / "lost" / "toc.dat").is_file()
    wrong = await cli(
        "backup", "extract", "control", "other", "--from-store", TENANCY_ENCRYPTION_KEYS="1:" + "A" * 43 + "="
    )
    assert (wrong.status, "signature" in wrong.err, (tmp_path / "other").exists()) == (1, True, False)
    late = await cli("backup", "extract", "control", "other", "--from-store", "--not-before", "2999-01-01T00:00+00:00")
    assert (late.status, "the newest is of" in late.err, (tmp_path / "other").exists()) == (1, True, False)
    copied = tmp_path / "store" / control["path"]
    shutil.copytree(copied, copied.with_name("ffffffff-ffff-7fff-bfff-ffffffffffff"))
    doubtful = await cli("backup", "extract", "control", "other", "--from-store")
    assert (doubtful.status, "--accept-older" in doubtful.err, (tmp_path / "other").exists()) == (1, True, False)
    accepted = await cli("backup", "extract", "control", "other", "--from-store", "--accept-older", "--json")
    assert accepted.status == 0, accepted.err
    assert (accepted.json["id"], len(accepted.json["passed_over"])) == (control["id"], 1)
    shutil.rmtree(copied.with_name("ffffffff-ffff-7fff-bfff-ffffffffffff"))
    for no_id in (f"{{{acme['id']}}}", f"urn:uuid:{acme['id']}"):
        assert "is not the id of a backup" in (await cli("backup", "keep", no_id, "--for", "90d")).err
    kept = await cli("backup", "keep", acme["id"], "--for", "90d", "--json")
    assert kept.json["kept_until"] is not None
    archive = tmp_path / "store" / acme["path"] / "dump.tar.age"
    archive.write_bytes(archive.read_bytes()[:-1])
    bad = await cli("backup", "verify", "acme")
    assert (bad.status, "checksum" in bad.out or "decrypted" in bad.out) == (1, True)
    assert (await cli("backup", "prune", "--yes", "--json")).json["pruned"] == []
    assert (await cli("backup", "scan", "--json")).json == {"found": [], "errors": []}
