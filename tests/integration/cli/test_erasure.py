"""``tenancy purge`` and ``tenancy erasure``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.cli.test_cli import Cli, cli

__all__ = ["cli"]


async def test_an_operator_purges_and_hands_the_certificate_on(cli: Cli, tmp_path: Path) -> None:
    await cli("init")
    await cli("create", "acme")
    await cli("delete", "acme")
    purged = await cli("purge", "acme", "--yes", "--json")
    assert (purged.status, purged.json["backup_keys"]) == (0, 0), purged.err
    keys = await cli("audit", "public-keys")
    (tmp_path / "keys.json").write_text(keys.out)
    written = await cli("erasure", "certificate", "acme", "--out", "acme.json")
    assert (written.status, written.err) == (0, "wrote the certificate of acme to acme.json\n")
    printed = await cli("erasure", "certificate", purged.json["id"])
    assert printed.out == (tmp_path / "acme.json").read_text()
    assert (await cli("erasure", "certificate", "acme", "--out", "acme.json")).status == 1
    # with the public keys alone: there is no database at that address
    nowhere = {"TENANCY_CONTROL_URL": "postgresql://nobody@127.0.0.1:1/none"}
    verified = await cli("erasure", "verify", "acme.json", "--public-keys", "keys.json", **nowhere)
    assert (verified.status, "Certificate of erasure: acme" in verified.out) == (0, True), verified.err
    assert (await cli("erasure", "verify", "acme.json", "--json")).json["slug"] == "acme"
    (tmp_path / "keys.json").write_text(json.dumps(dict.fromkeys(json.loads(keys.out), "A" * 43 + "=")))
    refused = await cli("erasure", "verify", "acme.json", "--public-keys", "keys.json")
    assert (refused.status, "signature is not valid" in refused.err) == (1, True)
