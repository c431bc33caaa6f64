"""Where settings are read from, which of them wins, and what an error says of its place."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from tenancy_orm import Limit, TenancyConfig
from tenancy_orm.config import PoolConfig
from tenancy_orm.config.sources import OTHER_VARIABLES, variables_of
from tenancy_orm.errors import ConfigurationError, SettingError

URL = "postgresql://admin:hunter2@db.example/control"
KEY = base64.b64encode(bytes(32)).decode()


def test_variables_are_read() -> None:
    """Each setting has one; kinds are converted."""
    config = TenancyConfig.from_env(
        {
            "TENANCY_CONTROL_URL": URL,
            "TENANCY_CONTROL_POOL_SIZE": "3",
            "TENANCY_SERVERS": f"a={URL} b={URL}",
            "TENANCY_ENCRYPTION_KEYS": f"1:{KEY},2:{KEY}",
            "TENANCY_EXTENSIONS": "vector, citext",
            "TENANCY_POOL_MAX_CONNECTIONS": "7",
            "TENANCY_POOL_CHECKOUT_TIMEOUT": "1.5",
            "TENANCY_POOL_FULL_RESET": "true",
            "TENANCY_PROVISIONING_ROLE_SETTINGS": "work_mem = 8MB; search_path=a, b;temp_file_limit=",
            "TENANCY_METADATA": "tests.support.models:Base.metadata",
            "HOME": "/",
        }
    )
    assert config.control_url == URL
    assert config.control.pool_size == 3
    assert set(config.server_dsns) == {"a", "b"}
    assert list(config.sealing_keys) == ["1", "2"]
    assert config.extensions == ("vector", "citext")
    assert config.pool == PoolConfig(max_connections=7, checkout_timeout=1.5, full_reset=True)
    assert config.provisioning.role_settings == {"work_mem": "8MB", "search_path": "a, b", "temp_file_limit": ""}
    assert config.metadata is not None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TENANCY_POOL_MAX_CONNECTIONS", "many"),
        ("TENANCY_POOL_FULL_RESET", "perhaps"),
        ("TENANCY_METADATA", "nowhere"),
        ("TENANCY_SERVERS", "secret-without-name"),
        ("TENANCY_PROVISIONING_ROLE_SETTINGS", "secret-without-name"),
        ("TENANCY_POOL_MAX_CONECTIONS", "7"),
        ("TENANCY_MAX_CONNECTIONS", "7"),
        ("TENANCY_POOL", "{}"),
        ("TENANCY_CONTROL_URL_", "7"),
    ],
)
def test_a_malformed_variable_is_named_without_its_value(variable: str, value: str) -> None:
    """A misspelt name too."""
    with pytest.raises(ConfigurationError, match=f"\\b{variable}\\b") as caught:
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL, variable: value})
    assert "secret-without-name" not in str(caught.value)


def test_a_setting_without_its_section_is_suggested() -> None:
    """Its name ends the full one."""
    with pytest.raises(SettingError, match=r"did you mean TENANCY_POOL_MAX_CONNECTIONS\?$"):
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL, "TENANCY_MAX_CONNECTIONS": "7"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SERVICE_HOST", "10.0.0.1"),
        ("SERVICE_PORT", "5432"),
        ("SERVICE_PORT_HTTP", "80"),
        ("PORT", "tcp://10.0.0.1:5432"),
        ("PORT_5432_TCP", "tcp://10.0.0.1:5432"),
        ("PORT_5432_TCP_START", "tcp://10.0.0.1:5432"),
        ("PORT_5432_TCP_PROTO", "tcp"),
        ("PORT_5432_TCP_PORT", "5432"),
        ("PORT_5432_TCP_PORT_END", "5440"),
        ("PORT_5432_TCP_ADDR", "10.0.0.1"),
        ("PORT_53_UDP", "udp://10.0.0.1:53"),
        ("POOL_SERVICE_HOST", "10.0.0.1"),
        ("POOL_PORT_6432_TCP_ADDR", "10.0.0.1"),
        ("CONTROL_DB_SERVICE_PORT_POSTGRES", "5432"),
        ("NAME", "/app/tenancy"),
        ("ENV_POSTGRES_VERSION", "18"),
    ],
)
def test_what_an_orchestrator_sets_is_no_error(name: str, value: str) -> None:
    """Kubernetes does so for services named ``tenancy`` and ``tenancy-pool``, Docker for linked containers."""
    environ = {"TENANCY_CONTROL_URL": URL, f"TENANCY_{name}": value}
    TenancyConfig.from_env(environ | ({"TENANCY_NAME": "/app/tenancy"} if name.startswith("ENV_") else {}))
    assert f"TENANCY_{name}" not in variables_of(TenancyConfig).values()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENV_FIL", "prod.env"),
        ("ENV_FILES", "prod.env"),
        ("CONTROL_PORT", "5433"),
        ("KEYS_NAME", "acme"),
        ("NAME", "acme"),
    ],
)
def test_a_misspelt_variable_that_looks_like_an_orchestrators_is_an_error(name: str, value: str) -> None:
    """The values tell them apart."""
    with pytest.raises(SettingError, match=f"TENANCY_{name}: there is no such setting"):
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL, f"TENANCY_{name}": value})


def test_an_orchestrators_variables_in_a_file_are_errors(directory: Path) -> None:
    """No orchestrator writes there."""
    (directory / ".env").write_text("TENANCY_SERVICE_HOST=10.0.0.1\n")
    with pytest.raises(SettingError, match="TENANCY_SERVICE_HOST"):
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL})


def test_a_variable_in_both_cases_is_an_error() -> None:
    """Which of them wins would depend on their order."""
    with pytest.raises(SettingError, match="is there twice, in upper and lower case"):
        TenancyConfig.from_env(
            {"TENANCY_CONTROL_URL": URL, "TENANCY_POOL_MAX_ENGINES": "1", "tenancy_pool_max_engines": "2"}
        )


@pytest.mark.parametrize(
    "line",
    [
        "TENANCY_CONTROL_URL='postgresql://u:it's@prod/db'",
        'TENANCY_CONTROL_URL="postgresql://u:p@prod/db',
        "TENANCY_POOL_MAX_CONNECTIONS",
        "TENANCY_POOL_MAX_CONNECTIONS: 3",
        "TENANCY_APP=app:tenancy",
        "TENANCY_CONFIG=other.toml",
        "TENANCY_SECRETS_DIR=secrets",
    ],
)
def test_a_line_of_an_env_file_that_is_not_read_is_an_error(directory: Path, line: str) -> None:
    """A setting that is dropped without a word may be the address of the database."""
    (directory / ".env").write_text(f"OTHER=it's\n{line}\nMORE=1\n")
    with pytest.raises(ConfigurationError, match=r"\.env") as caught:
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL})
    assert "prod/db" not in str(caught.value)


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_dollar_in_an_env_file_is_a_dollar(directory: Path, monkeypatch: pytest.MonkeyPatch, quote: str) -> None:
    """A password may have one; nothing is expanded from the environment."""
    monkeypatch.setenv("SECRET", "shown")
    url = "postgresql://u:pa${SECRET}$w@h/db"
    (directory / ".env").write_text(f"\ufeffTENANCY_CONTROL_URL={quote}{url}{quote}\n", encoding="utf-8")
    assert TenancyConfig.from_env({}).control_url == url


def test_a_section_as_an_argument_changes_what_it_sets(directory: Path) -> None:
    """The rest of it comes from the other sources."""
    environ = {"TENANCY_CONTROL_URL": URL, "TENANCY_POOL_MAX_ENGINES": "9"}
    config = TenancyConfig.from_env(environ, pool=PoolConfig(max_connections=3))
    assert config.pool == PoolConfig(max_connections=3, max_engines=9)


def test_a_section_that_is_no_table_is_an_error_beside_a_variable(directory: Path) -> None:
    """A variable of the section does not hide it."""
    (directory / "tenancy.toml").write_text("pool = 3\n")
    with pytest.raises(SettingError, match=r"pool \(in tenancy.toml\): must be a table"):
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL, "TENANCY_POOL_MAX_ENGINES": "9"})


@pytest.mark.parametrize("text", ["tool = 3", "[tool]\nother = 3"])
def test_a_strange_pyproject_is_none_of_our_business(directory: Path, text: str) -> None:
    """Other programs will say it."""
    (directory / "pyproject.toml").write_text(text)
    assert TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL}).pool == PoolConfig()


def test_a_settings_file_that_is_a_directory_is_an_error(directory: Path) -> None:
    """It is not an empty one."""
    with pytest.raises(ConfigurationError, match="cannot be read"):
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL, "TENANCY_CONFIG": str(directory)})


@pytest.mark.parametrize(
    ("variable", "suggested"),
    [
        ("TENANCY_SECRET_DIR", "TENANCY_SECRETS_DIR"),
        ("TENANCY_ENVFILE", "TENANCY_ENV_FILE"),
        ("TENANCY_AUDIT_SECONDS", "TENANCY_RETENTION_AUDIT_SECONDS"),
        ("TENANCY_RETENTION_SECONDS", "TENANCY_RETENTION_RUN_SECONDS or TENANCY_RETENTION_AUDIT_SECONDS"),
        ("TENANCY_SERVER", "TENANCY_SERVERS or TENANCY_DEFAULT_SERVER"),
        ("TENANCY_BAR", None),
    ],
)
def test_a_suggestion_is_like_what_was_written(variable: str, suggested: str | None) -> None:
    """What all names begin with does not make them alike."""
    with pytest.raises(SettingError) as caught:
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL, variable: "1"})
    assert str(caught.value).partition("; did you mean ")[2] == (f"{suggested}?" if suggested else "")


def test_every_unknown_variable_is_named_at_once() -> None:
    """Whoever has several need not run as often; a section alone, and an empty value, are named too."""
    with pytest.raises(SettingError) as caught:
        TenancyConfig.from_env(
            {"TENANCY_CONTROL_URL": "", "TENANCY_FOO": "1", "TENANCY_POOL": "1", "TENANCY_POOL_MAX_ENGINES": "1"}
        )
    assert set(caught.value.problems) == {"TENANCY_CONTROL_URL", "TENANCY_FOO", "TENANCY_POOL"}
    assert "pool is a section; set TENANCY_POOL_..." in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("pyproject.toml", "[tool.tenancy_orm]\ndefault_tier = 'pro'"),
        ("pyproject.toml", "[tool.tenancy-orm.pool]\nmax_engines = 1"),
        ("tenancy.toml", "[tool.tenancy.pool]\nmax_engines = 1"),
    ],
)
def test_a_table_of_another_name_is_an_error(directory: Path, file: str, text: str) -> None:
    """The names of the package and of its distribution are the natural mistake."""
    (directory / file).write_text(text)
    with pytest.raises(ConfigurationError, match=r"\[tool\.tenancy\]"):
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL})


def test_no_two_settings_have_one_variable() -> None:
    """Nor one that means something else."""
    variables = list(variables_of(TenancyConfig).values())
    assert len(set(variables)) == len(variables)
    assert not OTHER_VARIABLES & set(variables)


def test_a_program_of_tenancy_each_can_read_its_configuration() -> None:
    """What the command sets for it is not taken for a misspelt setting."""
    own = {"TENANCY_TENANT_ID": "01a22ddc-825d-7272-9eaa-69bc97c44f03", "TENANCY_TENANT_SLUG": "acme"}
    assert TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL, **own}).control_url == URL


def test_each_source_wins_over_the_next(directory: Path) -> None:
    """Setting by setting: arguments, variables, .env, secret files, tenancy.toml, pyproject.toml."""
    (directory / "pyproject.toml").write_text(
        "[project]\nname = 'x'\n[tool.tenancy]\ndefault_tier = 'pro'\n"
        "[tool.tenancy.pool]\nmax_connections = 1\nmax_engines = 1\nconnect_timeout = 1\nidle_timeout = 1\n"
        "checkout_timeout = 1\nmax_connections_per_tenant = 1\n"
    )
    (directory / "tenancy.toml").write_text(
        "[pool]\nmax_connections = 2\nmax_engines = 2\nconnect_timeout = 2\nidle_timeout = 2\ncheckout_timeout = 2\n"
    )
    (directory / "secrets").mkdir()
    (directory / "secrets" / "TENANCY_CONTROL_URL").write_text(f"{URL}\n")
    for name in ("max_connections", "max_engines", "connect_timeout", "idle_timeout"):
        (directory / "secrets" / f"tenancy_pool_{name}").write_text("3")
    (directory / ".env").write_text(
        "TENANCY_POOL_MAX_CONNECTIONS=4\nTENANCY_POOL_MAX_ENGINES=4\nexport TENANCY_POOL_CONNECT_TIMEOUT='4'\nOTHER=1\n"
    )
    environ = {
        "TENANCY_SECRETS_DIR": "secrets",
        "TENANCY_POOL_MAX_CONNECTIONS": "5",
        "TENANCY_POOL_MAX_ENGINES": "5",
    }
    config = TenancyConfig.from_env(environ, pool={"max_connections": 6})
    assert config.pool == PoolConfig(
        max_connections=6,
        max_engines=5,
        connect_timeout=4,
        idle_timeout=3,
        checkout_timeout=2,
        max_connections_per_tenant=1,
    )
    assert (config.control_url, config.default_tier) == (URL, "pro")


def test_tenancy_env_file_names_another_file(directory: Path) -> None:
    """One that is named has to be there."""
    (directory / ".env").write_text("TENANCY_DEFAULT_TIER=pro\n")
    (directory / "prod.env").write_text(f"TENANCY_CONTROL_URL={URL}\n")
    config = TenancyConfig.from_env({"TENANCY_ENV_FILE": "prod.env"})
    assert (config.control_url, config.default_tier) == (URL, "free")
    with pytest.raises(ConfigurationError, match=r"'gone\.env' \(TENANCY_ENV_FILE\) cannot be read: No such"):
        TenancyConfig.from_env({"TENANCY_ENV_FILE": "gone.env"})


def test_secrets_are_read_as_kubernetes_mounts_them(directory: Path) -> None:
    """As links into a directory that is replaced as a whole; from several directories, other files left alone."""
    for name, text in {"one": f"1:{KEY}", "two": URL}.items():
        mounted = directory / name / "..2026"
        mounted.mkdir(parents=True)
        variable = {"one": "TENANCY_ENCRYPTION_KEYS", "two": "tenancy_control_url"}[name]
        (mounted / variable).write_text(text + "\n")
        (directory / name / "..data").symlink_to("..2026")
        (directory / name / variable).symlink_to(f"..data/{variable}")
        (directory / name / "unrelated").write_bytes(b"\xff")
    config = TenancyConfig.from_env({"TENANCY_SECRETS_DIR": f"{directory / 'one'}:{directory / 'two'}"})
    assert (config.control_url, list(config.sealing_keys)) == (URL, ["1"])
    with pytest.raises(ConfigurationError, match=r"'gone' \(TENANCY_SECRETS_DIR\) cannot be read: No such"):
        TenancyConfig.from_env({"TENANCY_SECRETS_DIR": "gone"})


@pytest.mark.parametrize(
    ("file", "text", "place"),
    [
        ("tenancy.toml", "[pool]\nmax_connections = 'x'\n", "in tenancy.toml"),
        ("pyproject.toml", "[tool.tenancy.pool]\nmax_connections = 'x'\n", "in pyproject.toml"),
        (".env", "TENANCY_POOL_MAX_CONNECTIONS=x\n", "TENANCY_POOL_MAX_CONNECTIONS in .env"),
        ("TENANCY_POOL_MAX_CONNECTIONS", "x", "file ./TENANCY_POOL_MAX_CONNECTIONS"),
    ],
)
def test_an_error_says_where_the_setting_is(directory: Path, file: str, text: str, place: str) -> None:
    """The variable, or the file and the key in it."""
    (directory / file).write_text(text)
    environ = {"TENANCY_CONTROL_URL": URL} | ({"TENANCY_SECRETS_DIR": "."} if file.startswith("TENANCY") else {})
    with pytest.raises(SettingError) as caught:
        TenancyConfig.from_env(environ)
    assert caught.value.problems == {"pool.max_connections": "must be a whole number"}
    assert caught.value.origins["pool.max_connections"].replace(str(directory), ".").replace("./", "") == (
        place.replace("./", "")
    )
    assert str(caught.value).startswith("pool.max_connections (")


@pytest.mark.parametrize("file", [".env", "TENANCY_POOL_MAX_CONECTIONS"])
def test_an_unknown_variable_in_a_file_is_an_error(directory: Path, file: str) -> None:
    """As it is in the environment."""
    (directory / file).write_text("TENANCY_POOL_MAX_CONECTIONS=3\n")
    with pytest.raises(
        SettingError, match=f"{file}.*there is no such setting; did you mean TENANCY_POOL_MAX_CONNECTIO"
    ):
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL, "TENANCY_SECRETS_DIR": "."})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not toml", "'tenancy.toml' is not TOML"),
        ("unknown_key = 1", r"unknown_key \(in tenancy.toml\): there is no such setting"),
        ("max_connections = 1", r"did you mean pool.max_connections\?"),
        ("[pool]\nunknown = 1", r"pool.unknown \(in tenancy.toml\): there is no such setting"),
        ("pool = 3", r"pool \(in tenancy.toml\): must be a table"),
        ("tiers = 3", r"tiers \(in tenancy.toml\): must be a table"),
        ("[tiers.x]\nlimits = {a = {size = 1}}", r"tiers.x.limits.a.size \(in tenancy.toml\): there is no such"),
        ("[tiers.x]\nlimits = {a = {period = 'day'}}", r"tiers.x.limits.a.amount \(in tenancy.toml\): is missing"),
        (
            "[[metering.tier_policies]]\nfraction = 1",
            r"metering.tier_policies.0.resource \(in tenancy.toml\): is missing",
        ),
    ],
)
def test_a_bad_settings_file_is_named(directory: Path, text: str, message: str) -> None:
    """And what in it is wrong."""
    (directory / "tenancy.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL})


def test_a_settings_file_that_is_no_text_is_named(directory: Path) -> None:
    """Whatever it is then."""
    (directory / "tenancy.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"'tenancy\.toml' is not UTF-8"):
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL})


def test_a_pyproject_without_the_table_says_nothing(directory: Path) -> None:
    """Most projects have one."""
    (directory / "pyproject.toml").write_text("[tool.other]\npool = 3\n")
    assert TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL}).pool == PoolConfig()


def test_a_named_file_is_the_only_one(directory: Path) -> None:
    """And it has to be there."""
    (directory / "tenancy.toml").write_text("default_tier = 'pro'\n")
    (directory / "other.toml").write_text(f"control_url = '{URL}'\n[tiers.free.limits]\nusers = 1\n")
    config = TenancyConfig.from_env({"TENANCY_CONFIG": "other.toml"})
    assert config.default_tier == "free"
    assert config.tiers["free"].limits == {"users": Limit(1)}
    with pytest.raises(ConfigurationError, match=r"'gone\.toml' \(TENANCY_CONFIG\) cannot be read: No such"):
        TenancyConfig.from_env({"TENANCY_CONFIG": "gone.toml"})


def test_paths_in_a_settings_file_are_beside_it(directory: Path) -> None:
    """Wherever the program runs: a timer's working directory is not the project's."""
    project = directory / "project"
    project.mkdir()
    (project / "tenancy.toml").write_text("control_url = 'embedded:.tenancy'\nmigrations = 'migrations'\n")
    config = TenancyConfig.from_env({"TENANCY_CONFIG": str(project / "tenancy.toml")})
    assert config.migrations == str(project / "migrations")
    assert config.control_url == f"embedded:{project / '.tenancy'}"


def test_a_missing_configuration_says_what_to_do() -> None:
    """The first thing a newcomer may see."""
    with pytest.raises(ConfigurationError, match=r"control_url: is not set: run tenancy init"):
        TenancyConfig.from_env({})
