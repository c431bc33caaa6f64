"""Object stores and file systems: a tenant's reaches that tenant's objects alone, by every path and every method."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import fsspec
import obstore
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.spec import AbstractFileSystem
from obstore.store import LocalStore, MemoryStore, ObjectStore, ObjectStoreMethods

from tenancy_orm import Status, Tenant
from tenancy_orm.context import bind
from tenancy_orm.errors import (
    AdmissionEndedError,
    ConfigurationError,
    CrossTenantError,
    InvalidNameError,
    NoTenantError,
)
from tenancy_orm.integrations import obstore as module
from tenancy_orm.integrations.fsspec import TenantFileSystem
from tenancy_orm.integrations.obstore import TenantStore

ACME = Tenant(id=UUID(int=1), slug="acme", status=Status.ACTIVE, tier="free")
GLOBEX = Tenant(id=UUID(int=2), slug="globex", status=Status.ACTIVE, tier="free")
A, G = f"t/{ACME.id}/", f"t/{GLOBEX.id}/"

BAD = [
    *("../x", f"../{GLOBEX.id}/who", "a/../../x", "a/..", "..", ".", "./a", "a//b", "/a", "/", "//a", f"/{G}who"),
    *("a/%2e%2e/b", "%2E%2E/x", "a\\..\\b", "a\x00b", "a\nb", "\u202ea", "\ud800", "a\u2028b", ""),
    # decoded once, or twice, on the way to the store
    *(
        f"..%2f{GLOBEX.id}/who",
        f"a%2F..%2f..%2F{GLOBEX.id}%2fwho",
        "%252e%252e/x",
        "..%5cx",
        "a%00b",
        "%25252e%25252e/x",
    ),
]
# what files are called: a screenshot of macOS, a family, and a price with a percent sign
GOOD = [
    "Screenshot 3.00\u202fPM.png",
    "\u3000",
    "\U0001f468\u200d\U0001f469",
    "50% off",
    "a%20b/...",
    "..a",
    "caf\u0065\u0301",
]
STORE_KINDS = ("memory", "local")
FILE_KINDS = ("memory", "local", "working directory")


# --- what goes wrong without it -------------------------------------------------------------------------------------


def test_a_prefix_by_hand_leads_elsewhere(tmp_path: Path) -> None:
    """On local files by ``..``, which other file systems take as a name; by a slug that another one begins with."""
    local = fsspec.filesystem("file", auto_mkdir=True)
    for slug in ("acme", "globex"):
        local.pipe_file(f"{tmp_path}/{slug}/who", slug.encode())
    assert local.cat_file(f"{tmp_path}/acme/../globex/who") == b"globex"
    store = MemoryStore()
    store.put("acme/x", b"")
    store.put("acme-corp/x", b"")
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.pipe_file("/slugs/acme-corp/x", b"of acme-corp")
    assert memory.glob("/slugs/acme*/x") == ["/slugs/acme-corp/x"]


# --- obstore --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=STORE_KINDS)
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """A store of each kind, which no tenant should have."""
    if request.param == "memory":
        return MemoryStore()
    return LocalStore(tmp_path)


@pytest.fixture
def store(raw: ObjectStore) -> TenantStore:
    """The wrapped one, with an object of each tenant's."""
    made = TenantStore(raw)
    for tenant in (ACME, GLOBEX):
        with bind(tenant):
            made.put("who", tenant.slug.encode())
    return made


def names(raw: Any) -> set[str]:
    """Everything that is there."""
    return {meta["path"] for meta in obstore.list(raw).collect()}


async def test_each_tenant_has_its_own_objects(store: TenantStore, raw: ObjectStore) -> None:
    """By every method, sync and async; results have the tenant's own paths."""
    with bind(ACME):
        await store.put_async("a/b.txt", b"hello")
        read = store.get("a/b.txt")
        assert (bytes(read.bytes()), read.meta["path"]) == (b"hello", "a/b.txt")
        again = await store.get_async("a/b.txt")
        assert b"".join([bytes(part) async for part in again]) == b"hello"
        assert b"".join(bytes(part) for part in store.get("a/b.txt")) == b"hello"
        assert bytes(store.get_range("a/b.txt", start=1, end=3)) == b"el"
        assert bytes(await store.get_range_async("a/b.txt", start=1, end=3)) == b"el"
        assert [bytes(x) for x in store.get_ranges("a/b.txt", starts=[0], ends=[1])] == [b"h"]
        assert [bytes(x) for x in await store.get_ranges_async("a/b.txt", starts=[0], ends=[1])] == [b"h"]
        assert store.head("a/b.txt")["path"] == (await store.head_async("a/b.txt"))["path"] == "a/b.txt"
        store.copy("a/b.txt", "c")
        await store.copy_async("c", "d")
        store.rename("c", "e")
        await store.rename_async("d", "f")
        everything = {"who", "a/b.txt", "e", "f"}
        assert {meta["path"] for meta in store.list().collect()} == everything
        assert {meta["path"] for chunk in store.list(chunk_size=1) for meta in chunk} == everything
        assert {meta["path"] async for chunk in store.list_async("") for meta in chunk} == everything
        assert [meta["path"] for meta in await store.list_async("a/").collect_async()] == ["a/b.txt"]
        assert {meta["path"] for meta in store.list(offset="e").collect()} == {"f", "who"}
        listed = store.list_with_delimiter()
        assert listed == await store.list_with_delimiter_async("")
        assert listed["common_prefixes"] == ["a"] and {o["path"] for o in listed["objects"]} == everything - {"a/b.txt"}
        assert store.list_with_delimiter("a")["objects"][0]["path"] == "a/b.txt"
        store.delete("e")
        await store.delete_async(["f", "a/b.txt"])
    assert names(raw) == {f"{A}who", f"{G}who"}


@pytest.mark.parametrize("path", BAD)
async def test_no_path_of_an_object_leads_elsewhere(path: str) -> None:
    """Whichever method is given it: it is refused before the store sees it."""
    store, good = TenantStore(MemoryStore()), "good"
    calls: list[Callable[[], Any]] = [
        *(partial(store.put, path, b""), partial(store.put_async, path, b"")),
        *(partial(getattr(store, name), path) for name in ("get", "get_async", "head", "head_async")),
        *(partial(getattr(store, name), path, start=0) for name in ("get_range", "get_range_async")),
        *(partial(getattr(store, name), path, starts=[0]) for name in ("get_ranges", "get_ranges_async")),
        *(partial(getattr(store, name), [good, path]) for name in ("delete", "delete_async")),
        *(
            partial(getattr(store, name), *pair)
            for name in ("copy", "copy_async", "rename", "rename_async")
            for pair in ((path, good), (good, path))
        ),
        *(partial(getattr(store, name), "GET", path, timedelta(1)) for name in ("sign", "sign_async")),
        partial(store.list, offset=path),
    ]
    if path not in ("", "/"):
        listings = ("list", "list_async", "list_with_delimiter", "list_with_delimiter_async")
        calls += [partial(getattr(store, name), path) for name in listings]
    for tenant in (ACME, None):
        for call in calls:
            with pytest.raises(InvalidNameError if tenant else (NoTenantError, InvalidNameError)):
                await carry_out(call, tenant)


async def carry_out(call: Callable[[], Any], tenant: Tenant | None) -> None:
    """Call it, with a tenant or without, and wait for it."""
    if tenant is None:
        outcome = call()
        await outcome
        return
    with bind(tenant):
        outcome = call()
        if inspect.isawaitable(outcome):
            await outcome


async def test_a_signed_url_is_for_one_object_of_the_tenant_s() -> None:
    """One or several, on S3; a signature needs no server."""
    options = {"access_key_id": "x", "secret_access_key": "x", "region": "us-east-1"}
    store = TenantStore.from_url("s3://files/signed", **options)
    with bind(ACME):
        url = store.sign("GET", "a b", timedelta(minutes=1))
        assert f"/files/signed/{A}a%20b?" in url
        several = await store.sign_async("PUT", ["x", "y"], timedelta(minutes=1))
        assert [f"/files/signed/{A}" in one for one in several] == [True, True]


async def test_every_object_of_a_tenant_is_deleted(
    store: TenantStore, raw: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an operator, by id, in batches, and none of another's."""
    monkeypatch.setattr(module, "_BATCH", 2)
    with bind(ACME):
        for number in range(5):
            store.put(f"{number}/x", b"")
        with pytest.raises(CrossTenantError):
            store.delete_all(GLOBEX)
        with pytest.raises(CrossTenantError):
            await store.delete_all_async(GLOBEX.id)
    assert store.delete_all(ACME) == 6
    assert await store.delete_all_async(ACME) == 0
    assert names(raw) == {f"{G}who"}
    assert await store.delete_all_async(GLOBEX.id) == 1
    assert names(raw) == set()


async def test_what_was_kept_gives_nothing_to_another_tenant() -> None:
    """An object that was read, its parts, a listing, a walk: made for one tenant, used while another is bound."""
    raw = MemoryStore()
    store = TenantStore(raw)
    files = TenantFileSystem(fsspec.filesystem("memory", skip_instance_cache=True), "kept")
    with bind(ACME):
        store.put("who", b"acme")
        files.write_text("who", "acme")
        read, walk = store.get("who"), files.walk()
        uses: list[Callable[[], Any]] = [
            *(partial(getattr, read, name) for name in ("bytes", "bytes_async", "meta")),
            read.stream,
            *(partial(next, iter(store.get("who"))), partial(anext, aiter(store.get("who")))),
            *(store.list().collect, store.list().collect_async),
            *(partial(next, iter(store.list())), partial(anext, aiter(store.list()))),
            partial(next, walk),
        ]
    assert bytes(raw.get(f"{A}who").bytes()) == b"acme"  # what a raw one gives to everyone
    for tenant, error in ((GLOBEX, CrossTenantError), (None, NoTenantError)):
        for use in uses if tenant else uses[:4]:  # an iterator has ended by then
            with pytest.raises(error):
                await carry_out(use, tenant)


class Ended:
    """An admission that has ended."""

    def check(self) -> None:
        """Refuse."""
        raise AdmissionEndedError("revoked", credential_id="key")


def test_a_tenant_s_store_is_the_only_way_in(tmp_path: Path) -> None:
    """Every method needs a tenant, the library's functions take none of it, and nothing else is wrapped."""
    store = TenantStore(MemoryStore())
    files = TenantFileSystem(fsspec.filesystem("memory", skip_instance_cache=True), "wrapped")
    for use in (partial(store.get, "who"), store.list, partial(files.cat_file, "who"), files.ls):
        with pytest.raises(NoTenantError):
            use()
        with bind(replace(ACME, admission=Ended())), pytest.raises(AdmissionEndedError):
            use()
    taking: Any = store
    for function in (obstore.list, partial(obstore.get, path="who"), partial(obstore.delete, paths="who")):
        with pytest.raises(ValueError, match="Expected an object store"):
            function(taking)
    for wrong in (object(), str(tmp_path), store, LocalStore):
        with pytest.raises(ConfigurationError):
            TenantStore(wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError):
            TenantFileSystem(wrong)
    with pytest.raises(ConfigurationError, match="pattern"):
        TenantFileSystem(fsspec.filesystem("memory"), "tenants-*")
    with pytest.raises(ConfigurationError, match="asynchronous"):
        TenantFileSystem(AsyncFileSystemWrapper(fsspec.filesystem("memory"), asynchronous=True))
    assert "/" not in repr(TenantStore(LocalStore(tmp_path))) and "/" not in repr(files)


def test_what_a_library_has_is_there_with_a_prefix_or_not_at_all() -> None:
    """Whoever updates a library sees here what it has added; it does not pass by itself."""
    own = {"delete_all", "delete_all_async", "from_url", "sign", "sign_async"}
    offered = public(TenantStore) - own
    assert offered == public(ObjectStoreMethods)
    assert public(TenantFileSystem) - {"delete_all"} <= public(AbstractFileSystem)
    assert not any(name in vars(kind) for kind in (TenantStore, TenantFileSystem) for name in ("__getattr__",))


def public(kind: type) -> set[str]:
    """The public methods of a class."""
    return {name for name in dir(kind) if not name.startswith("_")}


# --- fsspec ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=FILE_KINDS)
def files(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TenantFileSystem:
    """A file system of each kind, with a file of each tenant's."""
    monkeypatch.chdir(tmp_path)
    if request.param == "working directory":
        made = TenantFileSystem(fsspec.filesystem("file", auto_mkdir=True))
    elif request.param == "local":
        made = TenantFileSystem(fsspec.filesystem("file", auto_mkdir=True), str(tmp_path))
    else:
        made = TenantFileSystem(fsspec.filesystem("memory", skip_instance_cache=True), f"memory://{tmp_path.name}")
    for tenant in (ACME, GLOBEX):
        with bind(tenant):
            made.write_text("who", tenant.slug)
    return made


def test_each_tenant_has_its_own_files(files: TenantFileSystem, tmp_path: Path) -> None:
    """By every method; results have the tenant's own paths."""
    with bind(ACME):
        with files.open("a/b.txt", "wb") as written:
            written.write(b"hello")
        with files.open("a/b.txt") as read:
            assert read.read() == b"hello"
        assert files.cat_file("a/b.txt", 1, 3) == b"el" and files.read_text("who") == "acme"
        files.cp_file("a/b.txt", "c.txt")
        files.mv("c.txt", "d.txt")
        assert files.exists("d.txt") and not files.exists("c.txt")
        assert files.isfile("a/b.txt") and files.isdir("a") and files.isdir("") and files.size("a/b.txt") == 5
        assert files.info("a/b.txt")["name"] == "a/b.txt"
        assert set(files.ls("", detail=False)) == {"who", "a", "d.txt"}
        assert [found["name"] for found in files.ls("a/")] == ["a/b.txt"]
        assert set(files.find()) == {"who", "a/b.txt", "d.txt"} and files.find("a") == ["a/b.txt"]
        assert files.glob("**/*.txt") == ["a/b.txt", "d.txt"] or set(files.glob("**/*.txt")) == {"a/b.txt", "d.txt"}
        assert [(top, inner, sorted(names)) for top, inner, names in files.walk()] == [
            ("", ["a"], ["d.txt", "who"]),
            ("a", [], ["b.txt"]),
        ]
        files.get_file("a/b.txt", str(tmp_path / "out"))
        files.put_file(str(tmp_path / "out"), "in.txt")
        assert files.read_bytes("in.txt") == b"hello"
        files.touch("empty")
        files.makedirs("dir/inner", exist_ok=True)
        files.rmdir("dir/inner")
        files.rm_file("empty")
        files.rm("a", recursive=True)
        files.rm("in.txt")
        with pytest.raises(InvalidNameError, match="pattern"):
            files.rm("*")
        assert set(files.find()) == {"who", "d.txt"}
        with pytest.raises(FileNotFoundError):
            files.ls("nowhere")
    with bind(GLOBEX):
        assert files.find() == ["who"] and files.read_text("who") == "globex"
    with bind(replace(ACME, id=UUID(int=9))):
        assert files.ls() == [] and files.find() == []


def test_the_root_directory_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a directory with a slash at its end another one."""
    monkeypatch.chdir(tmp_path)
    local = fsspec.filesystem("file", auto_mkdir=True)
    monkeypatch.setattr(local, "pipe_file", lambda path, value: written.append(path))
    written: list[str] = []
    with bind(ACME):
        for root in ("/", f"{tmp_path}/", ""):
            TenantFileSystem(local, root).write_bytes("who", b"acme")
    assert written == [f"/{A}who", f"{tmp_path}/{A}who", f"{tmp_path}/{A}who"]


@pytest.mark.parametrize("path", BAD)
def test_no_path_of_a_file_leads_elsewhere(files: TenantFileSystem, path: str, tmp_path: Path) -> None:
    """Whichever method is given it."""
    one = ["open", "cat_file", "read_text", "touch", "rm_file", "rm", "sign", "exists", "isfile", "info", "size"]
    calls: list[Callable[[], Any]] = [
        *(partial(getattr(files, name), path) for name in (*one, "glob", "makedirs", "rmdir")),
        *(partial(files.pipe_file, path, b""), partial(files.write_text, path, "")),
        *(partial(files.get_file, path, str(tmp_path / "x")), partial(files.put_file, __file__, path)),
        *(partial(method, *pair) for method in (files.cp_file, files.mv) for pair in ((path, "x"), ("who", path))),
    ]
    if path not in ("", "/"):
        calls += [partial(getattr(files, name), path) for name in ("ls", "find", "walk", "isdir")]
    for call in calls:
        with bind(ACME), pytest.raises(InvalidNameError):
            call()
    with bind(GLOBEX):
        assert files.find() == ["who"]


@pytest.mark.parametrize("pattern", ["*", "**", "**/who", "[!x]*", f"{G}*", "*/*", "?*"])
def test_no_pattern_finds_another_tenant_s_files(files: TenantFileSystem, pattern: str) -> None:
    """They are the tenant's own."""
    with bind(ACME):
        assert set(files.glob(pattern)) <= {"who", ""}


@pytest.mark.parametrize("path", GOOD)
def test_names_of_people_s_files_are_kept(files: TenantFileSystem, store: TenantStore, path: str) -> None:
    """None of them leads anywhere."""
    with bind(ACME):
        store.put(path, b"x")
        files.write_text(path, "x")
        assert store.head(path)["path"] == path
        assert {meta["path"] for meta in store.list().collect()} == set(files.find()) == {"who", path}


def test_every_file_of_a_tenant_is_deleted(files: TenantFileSystem) -> None:
    """By an operator, and again without an error."""
    with bind(ACME), pytest.raises(CrossTenantError):
        files.delete_all(GLOBEX)
    files.delete_all(ACME.id)
    files.delete_all(ACME)
    with bind(ACME):
        assert files.find() == []
    with bind(GLOBEX):
        assert files.find() == ["who"]
