"""The project is found from its sub-directories, and its paths are relative to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenancy_orm import TenancyConfig
from tenancy_orm.config import project, sources
from tenancy_orm.errors import ConfigurationError, SettingError
from tenancy_orm.postgres.dsn import Dsn


@pytest.fixture
def below(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is two levels below the project."""
    place = directory / "src" / "app"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    return place


TOML = 'control_url = "embedded:.tenancy"\nmigrations = "db"\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tenancy.toml", TOML),
        ("pyproject.toml", '[tool.tenancy]\ncontrol_url = "embedded:.tenancy"\nmigrations = "db"\n'),
        (".env", "TENANCY_CONTROL_URL=embedded:.tenancy\nexport TENANCY_MIGRATIONS=db\n"),
    ],
)
def test_a_file_above_is_found_and_its_paths_are_beside_it(below: Path, directory: Path, name: str, text: str) -> None:
    """The embedded server is the project's, and not a second one in the sub-directory."""
    (directory / name).write_text(text)
    config = TenancyConfig.from_env()
    assert config.control_url == f"embedded:{directory}/.tenancy"
    assert config.migrations == f"{directory}/db"
    found = sources.read(TenancyConfig, None, {})
    assert found.files == [directory / name]
    assert found.origins["migrations"].endswith(f"../../{name}")


def test_the_env_file_beside_the_settings_is_read_and_no_other(below: Path, directory: Path) -> None:
    (directory / "tenancy.toml").write_text(TOML)
    (directory / ".env").write_text("TENANCY_DEFAULT_TIER=pro\n")
    (below / ".env").write_text("DEBUG=1\n")
    assert TenancyConfig.from_env().default_tier == "pro"


def test_the_nearest_project_is_the_only_one(below: Path, directory: Path) -> None:
    """Settings of the outer one are not mixed in, whichever files the two have."""
    (directory / "tenancy.toml").write_text(TOML + 'default_tier = "pro"\n')
    (directory / ".env").write_text("TENANCY_NAME_PREFIX=outer\n")
    (below.parent / ".env").write_text("TENANCY_CONTROL_URL=postgresql://h/inner\n")
    config = TenancyConfig.from_env()
    assert (config.control_url, config.default_tier, config.name_prefix, config.migrations) == (
        "postgresql://h/inner",
        "free",
        "tenancy",
        None,
    )


def test_a_named_file_is_read_with_the_env_file_beside_it(below: Path, directory: Path) -> None:
    """The working directory may be another project."""
    (below / "tenancy.toml").write_text('control_url = "postgresql://h/other"\ndefault_tier = "pro"\n')
    (below / ".env").write_text("TENANCY_CONTROL_URL=postgresql://h/other\n")
    (directory / "tenancy.toml").write_text(TOML)
    (directory / ".env").write_text("TENANCY_NAME_PREFIX=named\n")
    config = TenancyConfig.from_env({"TENANCY_CONFIG": "../../tenancy.toml"})
    assert Path(config.control_url.removeprefix("embedded:")).resolve() == directory / ".tenancy"
    assert (config.default_tier, config.name_prefix) == ("free", "named")


@pytest.mark.parametrize("stop", ["repository", "worktree", "home", "open to all"])
def test_the_search_ends(below: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    """At a repository's root, at the home directory, and before a directory that anyone can write to."""
    (directory / "tenancy.toml").write_text(TOML)
    assert project.find() == directory
    if stop == "repository":
        (below.parent / ".git").mkdir()
    elif stop == "worktree":
        (below.parent / ".git").write_text("gitdir: elsewhere\n")
    elif stop == "home":
        monkeypatch.setenv("HOME", str(below.parent))
    else:
        directory.chmod(0o777)
    assert project.find() is None
    with pytest.raises(
        SettingError, match=rf"control_url: is not set: .* no settings file in {below} nor above it"
    ) as raised:
        TenancyConfig.from_env()
    assert (f"those in {directory} are not read, since everyone may write there" in str(raised.value)) is (
        stop == "open to all"
    )


def test_the_root_of_a_repository_is_searched(below: Path, directory: Path) -> None:
    (directory / "tenancy.toml").write_text(TOML)
    (directory / ".git").mkdir()
    assert project.find() == directory


def test_a_pyproject_toml_without_our_table_is_passed(below: Path, directory: Path) -> None:
    (directory / "tenancy.toml").write_text(TOML)
    (below.parent / "pyproject.toml").write_text('[project]\nname = "tenancy-shop"\n')
    assert project.find() == directory


def test_a_file_that_cannot_be_read_is_an_error(below: Path, directory: Path) -> None:
    """It is not passed over in favour of another project's."""
    (directory / "tenancy.toml").write_text(TOML)
    (below.parent / "pyproject.toml").write_text("[tool.tenancy\n")
    with pytest.raises(ConfigurationError, match=r"'\.\./pyproject\.toml' is not TOML"):
        TenancyConfig.from_env()


def test_the_search_can_begin_elsewhere(below: Path, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (below / "tenancy.toml").write_text(TOML)
    other = tmp_path_factory.mktemp("other")
    (other / "tenancy.toml").write_text('control_url = "postgresql://h/other"\n')
    with project.looking_from(other):
        assert TenancyConfig.from_env().control_url == "postgresql://h/other"
    assert TenancyConfig.from_env().is_embedded


def test_without_a_project_paths_are_in_the_working_directory(
    below: Path, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """So an application and ``alembic -c`` have one embedded server. No file of the working directory is read."""
    environ = {"TENANCY_CONTROL_URL": "embedded:.tenancy"}
    (below / ".env").write_text("TENANCY_DEFAULT_TIER=pro\n")
    with project.looking_from(tmp_path_factory.mktemp("other")):
        config = TenancyConfig.from_env(environ)
    assert (config.control_url, config.default_tier) == (f"embedded:{below}/.tenancy", "free")


@pytest.mark.parametrize("place", ["tenancy.toml", ".env", "variable"])
def test_every_path_is_relative_to_the_project(below: Path, directory: Path, place: str) -> None:
    """Also the certificates and keys that URLs name; absolute ones and ``system`` stay as they are."""
    url = "postgresql://h/d?sslmode=verify-full&sslrootcert=certs/root%20ca.pem&sslkey=/abs.key"
    pair = "host=h dbname=d sslrootcert='certs/a b.pem' sslcert=own.pem"
    values = {"control_url": url, "control_listen_url": pair, "servers": f"a={url} b=postgresql://h/d"}
    variables = {f"TENANCY_{name.upper()}": value for name, value in values.items()}
    (directory / "tenancy.toml").write_text('migrations = "db"\n')
    environ: dict[str, str] = {}
    if place == "tenancy.toml":
        (directory / place).write_text(
            f'migrations = "db"\ncontrol_url = "{url}"\n[control]\nlisten_url = "{pair}"\n'
            f'[servers]\na = "{url}"\nb = "postgresql://h/d"\n'
        )
    elif place == ".env":
        (directory / place).write_text("".join(f'{name}="{value}"\n' for name, value in variables.items()))
    else:
        environ = variables
    config = TenancyConfig.from_env(environ)
    listening = config.control.listen_url
    assert listening is not None
    assert config.migrations == str(directory / "db")
    for dsn in (Dsn.parse(config.control_url), config.server_dsns["a"]):
        assert dsn.parameters["sslrootcert"] == f"{directory}/certs/root ca.pem"
        assert dsn.parameters["sslkey"] == "/abs.key"
    parsed = Dsn.parse(listening)
    assert (parsed.parameters["sslrootcert"], parsed.parameters["sslcert"]) == (
        f"{directory}/certs/a b.pem",
        f"{directory}/own.pem",
    )


def test_the_systems_certificates_are_no_file(directory: Path) -> None:
    (directory / "tenancy.toml").write_text('control_url = "postgresql://h/d?sslrootcert=system"\n')
    assert TenancyConfig.from_env().control_url == "postgresql://h/d?sslrootcert=system"


@pytest.mark.parametrize("text", ["embedded", "embedded:"])
def test_the_default_directory_of_an_embedded_server_is_the_projects(below: Path, directory: Path, text: str) -> None:
    (directory / "tenancy.toml").write_text(f'control_url = "{text}"\n')
    assert TenancyConfig.from_env().control_url == f"embedded:{directory}/.tenancy"
