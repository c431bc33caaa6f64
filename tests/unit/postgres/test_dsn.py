"""A DSN is read as libpq reads it; psycopg's libpq says how that is."""

from __future__ import annotations

import pytest
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.engine import make_url

from tenancy_orm.errors import ConfigurationError
from tenancy_orm.postgres import parameters
from tenancy_orm.postgres.dsn import Dsn

AS_LIBPQ = [
    "postgresql://db.example/control",
    "postgres://db.example/control",
    "postgresql://app@db.example/control",
    "postgresql://app:secret@db.example:5433/control",
    "postgresql://app:p%40ss%2Fw%3Ard%25@db.example/control",
    "postgresql://app:p?ss#w@db.example/control",
    "postgresql://app:a:b@db.example/control",
    "postgresql://app:@db.example/control",
    "postgresql://:secret@db.example/control",
    "postgresql:///control",
    "postgresql://",
    "postgresql://db.example",
    "postgresql://db.example:/control",
    "postgresql://db1,db2/control",
    "postgresql://db1:5433,db2:5434/control",
    "postgresql://db1,db2:5434/control",
    "postgresql://[::1]/control",
    "postgresql://[2001:db8::1]:5433,db2/control",
    "postgresql://%2Fvar%2Frun%2Fpostgresql/control",
    "postgresql:///control?host=/var/run/postgresql&port=5433",
    "postgresql:///control?host=db1,db2&port=5433,5434",
    "postgresql:///control?host=db1,db2&port=5433",
    "postgresql://db.example/con%20trol",
    "postgresql://db.example/a@b",
    "postgresql://db.example:5432/a@b",
    "postgresql://db1:1,db2:2/a@b",
    "postgresql://[::1]:5432/a@b",
    "postgresql://db.example/?dbname=control&user=app&password=secret",
    "postgresql://db.example?dbname=control",
    "postgresql://db.example/control?sslmode=require",
    "postgresql://db.example/control?ssl=true",
    "postgresql://db.example/control?sslmode=verify-full&sslrootcert=/etc/ssl/ca.pem&sslcert=a&sslkey=b&sslcrl=c",
    "postgresql://db.example/control?sslmode=require&sslmode=prefer",
    "postgresql://db.example/control?connect_timeout=5&application_name=my%20app",
    "postgresql://db.example/control?application_name=my+app",
    "postgresql://db.example/control?channel_binding=prefer&gssencmode=disable&sslcompression=0&sslsni=1",
    "postgresql://db.example/control?options=-c%20search_path%3Da%2Cb%20-c%20jit%3Doff",
    "postgresql://db1,db2/control?target_session_attrs=read-write&load_balance_hosts=random",
    "postgresql://db.example/control?keepalives=1&keepalives_idle=10&keepalives_count=3&tcp_user_timeout=5000",
    "postgresql://db.example/control?passfile=/run/pgpass&krbsrvname=postgres&gsslib=gssapi",
    "host=db.example dbname=control",
    "host=db.example port=5433 user=app password='it''s' dbname=control".replace("''", "\\'"),
    "host = 'db.example'   dbname='my control' application_name=a\\ b",
    "host=db1,db2 port=5433,5434 dbname=control sslmode=verify-full",
    "service=billing",
]


def as_dict(dsn: Dsn) -> dict[str, str]:
    """What libpq calls its parameters."""
    found = {
        "host": ",".join(host for host, _ in dsn.hosts),
        "port": ",".join(str(port) for _, port in dsn.hosts),
        "user": dsn.user,
        "password": dsn.password,
        "dbname": dsn.database,
        **dsn.parameters,
    }
    return {name: value for name, value in found.items() if value}


def expected(text: str) -> dict[str, str]:
    """What libpq reads, with its default ports written out."""
    found = {name: str(value) for name, value in conninfo_to_dict(text).items() if value not in ("", None)}
    if hosts := found.get("host"):
        ports = found.get("port", "").split(",")
        ports *= len(hosts.split(",")) if len(ports) == 1 else 1
        found["port"] = ",".join(port or "5432" for port in ports)
    return found


@pytest.mark.parametrize("text", AS_LIBPQ)
def test_it_is_read_as_libpq_reads_it(text: str) -> None:
    """Every part has the value that libpq gives it."""
    assert as_dict(Dsn.parse(text)) == expected(text)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://[::1/control",
        "postgresql://[]/control",
        "postgresql://[::1]x/control",
        "postgresql://db/control?sslmode",
        "postgresql://db/control?sslmode=a=b",
        "postgresql://db/con%2trol",
        "postgresql://db/con%00trol",
        "host=db dbname",
        "host='db dbname=x",
        "hunter2",
    ],
)
def test_what_libpq_refuses_is_refused(text: str) -> None:
    """Malformed text is refused by both."""
    with pytest.raises(Exception):  # noqa: B017, PT011 - psycopg's own
        conninfo_to_dict(text)
    with pytest.raises(ConfigurationError) as caught:
        Dsn.parse(text)
    assert "hunter2" not in str(caught.value)


def test_every_parameter_of_libpq_is_known() -> None:
    """None of them is taken for a setting of the server."""
    names = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    assert names <= parameters.KNOWN


def test_the_variables_are_those_of_libpq() -> None:
    """A program that uses libpq finds each parameter that has a variable."""
    variables = {o.keyword.decode(): o.envvar.decode() for o in pq.Conninfo.get_defaults() if o.envvar}
    known = {name: variable for name, variable in parameters.ENVIRONMENT.items() if name in variables}
    assert known == {name: variables[name] for name in known}
    assert set(parameters.ENVIRONMENT) == set(known)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg", "PostgreSQL"])
def test_a_drivers_name_in_the_scheme_is_stripped(scheme: str) -> None:
    """SQLAlchemy's URLs are taken as well."""
    assert Dsn.parse(f"{scheme}://db/control") == Dsn((("db", 5432),), database="control")


def test_a_password_with_a_slash_is_taken_as_sqlalchemy_takes_it() -> None:
    """Only libpq refuses it, and it can mean nothing else."""
    dsn = Dsn.parse("postgresql://app:hunter2/x?y@db:5433/control?sslmode=require")
    assert (dsn.password, dsn.hosts, dsn.database) == ("hunter2/x?y", (("db", 5433),), "control")
    assert dsn.parameters == {"sslmode": "require"}


def test_sqlalchemys_form_of_several_hosts_is_taken() -> None:
    """Each host is a parameter of its own, with its port."""
    dsn = Dsn.parse("postgresql+asyncpg://app@/control?host=db1:5433&host=db2")
    assert dsn.hosts == (("db1", 5433), ("db2", 5432))


def test_a_space_that_sqlalchemy_writes_as_a_plus_sign_is_one() -> None:
    """Where a plus sign would make no sense; elsewhere it is one, as in libpq."""
    query = {"options": "-c lock_timeout=7s -c jit=off", "search_path": "a, b", "timezone": "Etc/GMT+5"}
    text = make_url("postgresql://db/control").update_query_dict(query).render_as_string(hide_password=False)
    assert "+" in text
    dsn = Dsn.parse(text)
    assert {"options": dsn.parameters["options"], **dsn.settings} == query
    assert Dsn.parse("postgresql://db/control?timezone=Etc/GMT+5").settings == {"timezone": "Etc/GMT+5"}


@pytest.mark.parametrize(
    ("query", "sslmode"), [("ssl=require", "require"), ("ssl=true", "require"), ("ssl=false", "disable")]
)
def test_ssl_is_taken_as_sslmode(query: str, sslmode: str) -> None:
    """Other drivers write it so."""
    assert Dsn.parse(f"postgresql://db/control?{query}").parameters == {"sslmode": sslmode}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("sslmod=hunter2", "there is no parameter sslmod; did you mean sslmode?"),
        ("conect_timeout=5", "did you mean connect_timeout?"),
        ("aplication_name=x", "did you mean application_name?"),
        ("SSLMODE=require", "did you mean sslmode?"),
        ("sslmode=hunter2", "the parameter sslmode must be one of disable, allow"),
        ("target_session_attrs=hunter2", "the parameter target_session_attrs must be one of any"),
        ("connect_timeout=hunter2", "the parameter connect_timeout must be a whole number"),
        ("statement_cache_size=-1", "the parameter statement_cache_size must be at least 0"),
        ("channel_binding=require", "channel_binding other than prefer or disable is not supported: asyncpg has no"),
        ("gssencmode=require", "the parameter gssencmode other than disable or prefer is not supported"),
        ("require_auth=scram-sha-256", "the parameter require_auth is not supported"),
        ("requirepeer=postgres", "the parameter requirepeer is not supported"),
        ("sslcrldir=/crl", "use sslcrl"),
        ("client_encoding=latin1", "asyncpg reads and writes UTF-8 alone"),
        ("timeout=5", "write connect_timeout"),
        ("sslrootcert=system&sslmode=require", "sslrootcert=system needs sslmode=verify-full"),
        ("hostaddr=10.0.0.1", "hostaddr beside host is not supported"),
        ("a%20b=hunter2", "a parameter's name is malformed"),
        ("port=hunter2", "a port is not a number from 1 to 65535"),
        ("port=0", "a port is not a number from 1 to 65535"),
        ("port=1,2,3", "there are 3 ports for 1 hosts"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(query: str, message: str) -> None:
    """The error names the parameter and says why; it repeats no value."""
    with pytest.raises(ConfigurationError) as caught:
        Dsn.parse(f"postgresql://app:secret@db/control?{query}")
    assert message in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["postgresql://app:hunter2/@db/control:x/y", "postgresql://app:hunter2,x", "hunter2"])
def test_a_malformed_url_is_not_repeated(text: str) -> None:
    """Whatever is in the wrong place may be a password."""
    try:
        dsn = Dsn.parse(text)
    except ConfigurationError as error:
        assert "hunter2" not in str(error)  # noqa: PT017 - either outcome keeps the secret
    else:
        assert "hunter2" not in f"{dsn} {dsn!r}"


def test_other_names_are_settings_of_the_server() -> None:
    """A connection starts with them."""
    dsn = Dsn.parse("postgresql://db/control?timezone=UTC&app.user=x&lock_timeout=5s&search_path=&options=-cjit%3Doff")
    assert dsn.settings == {"timezone": "UTC", "app.user": "x", "lock_timeout": "5s", "search_path": ""}
    assert dsn.server_settings(timezone="CET") == {
        "options": "-cjit=off",
        "timezone": "CET",
        "app.user": "x",
        "lock_timeout": "5s",
        "search_path": "",
    }


def test_messages_have_the_address_and_no_secret() -> None:
    """Neither the text nor the representation contains the user or a password."""
    dsn = Dsn.parse("postgresql://app:secret@[::1]:5433,db2/control?sslpassword=hunter2")
    assert str(dsn) == "[::1]:5433,db2:5432/control"
    assert repr(dsn) == "Dsn('[::1]:5433,db2:5432/control')"
    assert dsn.address("acme") == "[::1]:5433,db2:5432/acme"
    assert dsn.has_secret


def test_a_timeout_of_zero_is_none() -> None:
    """The configured time counts, where libpq would wait for ever."""
    assert Dsn.parse("postgresql://db/c?connect_timeout=5").connect_timeout == 5.0
    assert Dsn.parse("postgresql://db/c?connect_timeout=0").connect_timeout is None
    assert Dsn.parse("postgresql://db/c").connect_timeout is None


def test_the_own_application_name_comes_first() -> None:
    """What the connection is for is still to be seen."""
    assert Dsn.parse("postgresql://db/c?application_name=shop").application_name("tenancy") == "shop/tenancy"
    assert Dsn.parse("postgresql://db/c").application_name("tenancy") == "tenancy"


def test_arguments_of_asyncpg() -> None:
    """TLS is passed in a DSN, where asyncpg takes it alone; the rest as arguments."""
    dsn = Dsn.parse(
        "postgresql://app:secret@db1,db2:5433/control?sslmode=verify-full&sslrootcert=/a%20b&timezone=UTC"
        "&target_session_attrs=primary&statement_cache_size=0&connect_timeout=3&channel_binding=prefer"
    )
    assert dsn.arguments() == {
        "dsn": "postgresql://?sslrootcert=%2Fa%20b",
        "host": ["db1", "db2"],
        "port": [5432, 5433],
        "user": "app",
        "database": "control",
        "ssl": "verify-full",
        "target_session_attrs": "primary",
        "statement_cache_size": 0,
    }


def test_the_systems_certificates_verify_the_host() -> None:
    """As with libpq, sslrootcert=system means verify-full."""
    dsn = Dsn.parse("postgresql://db/control?sslrootcert=system")
    assert dsn.parameters["sslmode"] == "verify-full"
    assert dsn.arguments()["ssl"] is True


def test_the_environment_of_psql() -> None:
    """It has everything but the password; settings are within PGOPTIONS."""
    dsn = Dsn.parse(
        "postgresql://app:secret@db1,db2:5433/control?sslmode=require&search_path=a,%20b&options=-cjit%3Doff&keepalives=1"
    )
    assert dsn.environment(user="t_acme", database="acme", purpose="tenancy-psql") == {
        "PGHOST": "db1,db2",
        "PGPORT": "5432,5433",
        "PGUSER": "t_acme",
        "PGDATABASE": "acme",
        "PGAPPNAME": "tenancy-psql",
        "PGSSLMODE": "require",
        "PGOPTIONS": "-cjit=off -c search_path=a,\\ b",
    }


def test_servers_are_compared_by_their_hosts() -> None:
    """One of several hosts is enough."""
    one, both = Dsn.parse("postgresql://db2/a"), Dsn.parse("postgresql://db1,db2/b")
    assert one.shares_host(both)
    assert not one.shares_host(Dsn.parse("postgresql://db2:5433/a"))
    assert Dsn().shares_host(Dsn.parse("postgresql://localhost/a"))
