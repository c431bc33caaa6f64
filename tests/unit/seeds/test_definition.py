"""What can be a seed, and where seeds are found."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import ProvisioningConfig, ReferenceTable
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.seeds import Seed, seed
from tenancy_orm.seeds.loading import SeedSet


async def plain(session: Any) -> str:
    """A seed."""
    return f"called with {session}"


async def asking(session: Any, *, tenant: Any, previous: int | None = None, **more: Any) -> None:
    """Takes all that there is."""


def another(session: Any) -> None:
    """Another text."""


SEVERAL = [plain, seed(name="named", version=4)(asking)]


def seeds_of(*given: Any, **options: Any) -> SeedSet:
    """The seeds of a configuration."""
    provisioning = ProvisioningConfig(seeds=given)
    return SeedSet(TenancyConfig(control_url="embedded", provisioning=provisioning, **options))


def write(path: Path, content: str) -> Path:
    """Write a file."""
    path.write_text(content, "utf-8")
    return path


async def test_a_seed_is_the_function_as_well() -> None:
    """It can be called in a test of its own."""
    made = seed(plain)
    assert (made.name, made.version, made.template, made.asks) == ("plain", 1, False, ())
    assert await made("it") == "called with it"
    assert seed(version=2)(asking).asks == ("tenant", "previous")
    assert seed(name="partial")(functools.partial(asking, more=1)).asks == ("tenant", "previous")


def test_its_digest_changes_with_its_text_and_version() -> None:
    """The template's key is made of it."""
    made = seed(name="x", template=True)
    others = (made(plain), made(another), seed(name="x", template=True, version=2)(plain))
    assert len({other.digest for other in others}) == 3
    assert made(plain).digest == made(plain).digest
    # functions without a source
    one, other = (made(eval(f"lambda session: session.{name}()")) for name in ("commit", "close"))  # noqa: S307
    assert one.digest != other.digest


def no_session() -> None:
    """Takes nothing."""


def demanding(session: Any, request: Any) -> None:
    """Takes what there is not."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: seed(no_session), "must take a session as its first argument"),
        (lambda: seed(demanding), "takes 'request'; it can have a session, tenant and previous"),
        (lambda: seed(template=True)(asking), "where there is no tenant; leave that out"),
        (lambda: seed(version=0)(plain), "must be a whole number from 1, not 0"),
        (lambda: seed(version=True)(plain), "must be a whole number from 1, not True"),
        (lambda: seed(name=" x")(plain), "a name is 1 to 128 letters"),
        (lambda: seed(seed(plain)), "is made of a function, not of"),
        (lambda: Tenancy(TenancyConfig(control_url="embedded")).on_create(demanding), "takes 'request'"),
    ],
)
def test_what_is_no_seed_is_refused(make: Any, reason: str) -> None:
    """Where it is written, with the reason."""
    with pytest.raises(ConfigurationError, match=reason):
        make()


def test_seeds_are_found_in_order(tmp_path: Path) -> None:
    """Functions, lists of them, files and directories; a file that has changed is read again."""
    second = write(tmp_path / "2.sql", "-- a comment\n-- seed: version=3 template=false\nSELECT 1; SELECT 2")
    write(tmp_path / "1.sql", "SELECT 1")
    write(tmp_path / "ignored.txt", "")
    found = seeds_of(f"{__name__}:SEVERAL", tmp_path, str(write(tmp_path / "other", "").with_name("1.sql")))
    with pytest.raises(ConfigurationError, match=r"two seeds are named '1': .*1\.sql and .*1\.sql"):
        found.all()
    found = seeds_of(f"{__name__}:SEVERAL", tmp_path)
    assert [(x.name, x.version, x.template, x.statements) for x in found.all()] == [
        ("plain", 1, False, ()),
        ("named", 4, False, ()),
        ("1", 1, True, ("SELECT 1",)),
        ("2", 3, False, ("SELECT 1", "SELECT 2")),
    ]
    write(second, "SELECT 3333")
    assert found.all()[-1].statements == ("SELECT 3333",)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("missing/", "'missing' is neither a directory nor a file; a function is written module:function"),
        (f"{__name__}:missing", "cannot be loaded"),
        (f"{__name__}:__doc__", "is neither a function nor a list of functions"),
    ],
)
def test_what_cannot_be_found_is_refused(given: str, reason: str) -> None:
    """With the name that was written."""
    with pytest.raises(ConfigurationError, match=reason):
        seeds_of(given).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "-- seed: version=x\nSELECT 1",
            "'version=x' is not an option; write -- seed: version=2 template=false",
        ),
        ("BEGIN; SELECT 1; COMMIT", "one transaction: leave BEGIN out"),
        ("COPY t FROM STDIN", "is for psql; write INSERT"),
        ("\\i other.sql", r"\\i is for psql"),
        ("-- seed: version=0\nSELECT 1", "must be a whole number from 1"),
    ],
)
def test_a_file_that_cannot_run_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    """Before any database is touched."""
    with pytest.raises(ConfigurationError, match=reason):
        seeds_of(write(tmp_path / "x.sql", content)).check()


def test_a_reference_table_has_a_name_of_its_own(tmp_path: Path) -> None:
    """``--only`` names either."""
    table = ReferenceTable(table="t", key=("id",), source=write(tmp_path / "t.csv", "id\n1\n"))
    with pytest.raises(ConfigurationError, match=r"two seeds are named 'plain': .*plain and the reference table"):
        seeds_of(plain, reference={"plain": table}).check()
    with pytest.raises(ConfigurationError, match=r"reference.t: .*t.txt' must end in .csv"):
        seeds_of(reference={"t": table.replace(source=tmp_path / "t.txt")}).check()
    with pytest.raises(ConfigurationError, match=r"reference.t: .*u.csv' cannot be read: No such file"):
        seeds_of(reference={"t": table.replace(source=tmp_path / "u.csv")}).check()
    assert isinstance(seed(plain), Seed)
