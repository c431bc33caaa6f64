"""Stores: a directory, and S3 as moto's server emulates it; what is written is there whole or not at all."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tenancy_orm.backups import Store, Stores, open_store
from tenancy_orm.backups.encryption import decrypt, encrypt, new_identity
from tenancy_orm.config import BackupConfig
from tenancy_orm.errors import BackupDamagedError, BackupError, BackupNotFoundError, ConfigurationError, SettingError


@pytest.fixture(scope="module")
def options() -> Iterator[dict[str, str]]:
    """Obstore's options for a bucket named "bucket"."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    given = {"region": "us-east-1", "access_key_id": "key", "secret_access_key": "not-shown"}
    boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="not-shown",
    ).create_bucket(Bucket="bucket")
    yield {**given, "endpoint": endpoint, "virtual_hosted_style_request": "false"}
    server.stop()


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, options: dict[str, str], tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(f"file:{tmp_path / 'store'}", {})
    return open_store(f"s3://bucket/{tmp_path.name}", options)


async def test_what_is_written_is_read_listed_and_removed(store: Store) -> None:
    large = [bytes([n]) * 1024 * 1024 for n in range(40)]  # several parts
    store.write("i/acme/b/dump.tar.age", iter(large), size=40 * 1024 * 1024)
    await store.put("i/acme/b/manifest.json", b"{}")
    await store.put("i/globex/b/manifest.json", b"")
    assert b"".join(store.read("i/acme/b/dump.tar.age")) == b"".join(large)
    assert await store.get("i/globex/b/manifest.json") == b""
    found = await store.list("i/acme")
    assert [(one.path, one.size) for one in found] == [
        ("i/acme/b/dump.tar.age", 40 * 1024 * 1024),
        ("i/acme/b/manifest.json", 2),
    ]
    with pytest.raises(BackupError, match="larger than any valid file"):
        await store.get("i/acme/b/dump.tar.age")
    await store.put("i/acme/b/manifest.json", b"[]")
    assert await store.get("i/acme/b/manifest.json") == b"[]"
    await store.delete("i/acme/b/manifest.json", "i/acme/b/dump.tar.age", "i/acme/b/none")
    assert await store.list("i/acme") == [] == await store.list("nothing")
    with pytest.raises(BackupNotFoundError, match=r"manifest\.json"):
        await store.get("i/acme/b/manifest.json")


async def test_an_error_on_the_way_leaves_nothing(store: Store) -> None:
    def failing() -> Iterator[bytes]:
        for _ in range(30):
            yield bytes(1024 * 1024)
        raise BackupDamagedError("halfway")

    with pytest.raises(BackupDamagedError, match="halfway"):
        store.write("a/b", failing())
    assert await store.list("a") == []


def test_a_directory_is_its_users_alone(tmp_path: Path) -> None:
    store = open_store(f"file:{tmp_path / 'store'}", {})
    store.write("a/b", [b"x"])
    store.write("a/c/d/e", [b"x"])
    assert stat.S_IMODE((tmp_path / "store" / "a" / "b").stat().st_mode) == 0o600
    for directory in ("store", "store/a", "store/a/c", "store/a/c/d"):
        assert stat.S_IMODE((tmp_path / directory).stat().st_mode) == 0o700, directory
    for path in ("../x", "a/../../x", "/x", "a//b", ""):
        with pytest.raises(BackupError, match="not a path"):
            store.write(path, [b"x"])


async def test_a_directory_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    """Whoever destroys keys, or prunes, would believe that nothing is left in it."""
    store = open_store(f"file:{tmp_path / 'store'}", {})
    assert await store.list("i/keys") == []
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "i").symlink_to("i")
    with pytest.raises(BackupError, match="symbolic links"):
        await store.list("i/keys")


def test_what_no_store_is_is_refused(options: dict[str, str], tmp_path: Path) -> None:
    """And no message has a secret in it."""
    for url in ("s3://key:secret@bucket", "http://bucket", "relative", "file:store", "s3://bucket?x=y", ""):
        with pytest.raises(SettingError) as refused:
            BackupConfig(store=url)
        assert "secret@" not in str(refused.value)
        assert "file: and an absolute path" in str(refused.value)
    with pytest.raises(ConfigurationError, match="store_options"):
        open_store(f"file:{tmp_path}", {"region": "x"})
    with pytest.raises(ConfigurationError, match="cannot be opened") as wrong:
        open_store("s3://bucket", {**options, "no_such_name": "not-shown"})
    assert "not-shown" not in str(wrong.value) and wrong.value.__cause__ is None
    lost = open_store("s3://missing", options)
    with pytest.raises(BackupError) as refused_by_s3:
        lost.write("a", [b"x"])
    assert "not-shown" not in str(refused_by_s3.value)
    assert "not-shown" not in repr(lost) + repr(BackupConfig(store="s3://b", store_options=options))


def test_stores_are_opened_with_the_options_of_their_kind(options: dict[str, str], tmp_path: Path) -> None:
    stores = Stores(BackupConfig(store="s3://bucket/x", store_options=options))
    assert stores.current is stores.at("s3://bucket/x")
    stores.current.write("a", [b"1"])
    assert stores.at(f"file:{tmp_path}").url == f"file:{tmp_path}"
    with pytest.raises(ConfigurationError, match=r"backup\.store is not set"):
        _ = Stores(BackupConfig()).current


def test_a_stream_is_encrypted_for_its_recipients() -> None:
    identity, recipient = new_identity()
    other, _ = new_identity()
    chunks = [bytes([n % 251]) * 70_000 for n in range(50)]
    sealed = list(encrypt(iter(chunks), [recipient]))
    assert b"".join(decrypt(sealed, identity)) == b"".join(chunks)
    with pytest.raises(BackupDamagedError):
        list(decrypt(sealed, other))
    cut = [*sealed[:-1], sealed[-1][:-20]]
    with pytest.raises(BackupDamagedError):
        list(decrypt(cut, identity))

    def failing() -> Iterator[bytes]:
        yield b"x"
        raise BackupError("the source failed")

    with pytest.raises(BackupError, match="the source failed"):
        list(encrypt(failing(), [recipient]))
    # who stops reading ends the thread
    reading = encrypt(iter(chunks * 20), [recipient])
    next(reading)
    reading.close()  # type: ignore[attr-defined]
