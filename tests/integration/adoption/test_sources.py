"""Sources on other servers, over TLS, of older versions; and what they can do to the installation: nothing."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url

from tenancy_orm import TenancyConfig
from tenancy_orm.adoption.source import Source, open_source
from tenancy_orm.errors import AdoptionError, ConfigurationError, TenancyError, TenantNotFoundError
from tests.integration.adoption.test_databases import OLD, state_of
from tests.integration.adoption.test_in_place import RIGHTS
from tests.support.fleet import Fleet, fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.provisioning import VERSIONS, plain_administrator, running_server
from tests.support.sources import foreign_database
from tests.support.tls import tls_proxy, write_certificate


async def test_a_database_of_an_older_server(fleet: Fleet, postgres: Postgres, tmp_path: Path) -> None:
    """With the ``sslmode`` of its URL, for ``pg_dump`` too."""
    certificate = tmp_path / "server.pem"
    write_certificate(certificate)
    with running_server(VERSIONS[0], postgres.worker) as older:
        async with foreign_database(older, OLD) as source:
            before = await state_of(source)
            report = await fleet.tenancy.adoption.adopt("acme", f"{source.url}?sslmode=prefer")
            assert report.version == VERSIONS[0]
            assert await state_of(source) == before
            async with tls_proxy(make_url(source.url).port or 5432, certificate) as proxy:
                url = make_url(source.url).set(host="localhost", port=proxy.port)
                url = url.update_query_dict({"sslmode": "verify-full", "sslrootcert": str(certificate)})
                async with open_source(Source.parse(url.render_as_string(False)), timeout=30) as opened:
                    assert proxy.encrypted["tenancy-adopt"]
                    assert opened.environment()["PGSSLMODE"] == "verify-full"
    assert await fleet.fetch("acme", "SELECT count(*) FROM notes") == [(50,)]
    assert await fleet.revision("acme") == "0002"


async def test_a_source_is_only_read(fleet: Fleet, postgres: Postgres) -> None:
    """By a session and a transaction that refuse to write, whatever its URL asks for; by the dump too."""
    async with foreign_database(postgres, OLD) as source:
        own = Source.parse(f"{source.url}?options=-c%20default_transaction_read_only%3Doff")
        async with open_source(own, timeout=30) as opened:
            assert opened.environment()["PGOPTIONS"].rindex("read_only=on") > opened.environment()["PGOPTIONS"].rindex(
                "read_only=off"
            )
            assert source.password not in repr(opened) + repr(own) + str(own)
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await opened.connection.execute("DELETE FROM public.notes")
        async with open_source(own, timeout=30) as opened:
            await opened.connection.execute("COMMIT")
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await opened.connection.execute("DELETE FROM public.notes")


async def test_a_password_file_is_used_for_the_dump_too(
    fleet: Fleet, postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with foreign_database(postgres, OLD) as source:
        file = tmp_path / "passwords"
        file.write_text(f"*:*:*:{source.name}:{source.password}\n")
        file.chmod(0o600)
        monkeypatch.setenv("PGPASSFILE", str(file))
        url = make_url(source.url)._replace(password=None).render_as_string(hide_password=False)
        assert (await fleet.tenancy.adoption.check("acme", url)).differences == ()


async def test_what_a_login_may_not_see_is_refused_and_not_left_out(fleet: Fleet, postgres: Postgres) -> None:
    """A table without SELECT, and rows that row security hides."""
    async with (
        foreign_database(postgres) as other,
        foreign_database(postgres, OLD) as source,
    ):
        reader = make_url(source.url).set(username=other.name, password=other.password)
        url = reader.render_as_string(hide_password=False)
        await source.execute(f'GRANT SELECT ON notes, alembic_version TO "{other.name}"')
        with pytest.raises(AdoptionError, match=r"may not read public\.authors.*grant it SELECT"):
            await fleet.tenancy.adoption.adopt("acme", url)
        await source.execute(
            f'GRANT SELECT ON ALL TABLES IN SCHEMA public TO "{other.name}"; '
            "ALTER TABLE notes ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON notes USING (id < 5)"
        )
        with pytest.raises(AdoptionError, match=r"table public\.notes .* cannot be read: .*row-level security"):
            await fleet.tenancy.adoption.adopt("acme", url)
        with pytest.raises(AdoptionError, match="cannot be read: password authentication failed"):
            await fleet.tenancy.adoption.adopt("acme", url.replace(other.password, "wrong"))
        with pytest.raises(ConfigurationError, match="source's URL must begin with postgresql://"):
            await fleet.tenancy.adoption.adopt("acme", "mysql://u:secret@h/d")
    with pytest.raises(TenantNotFoundError):
        await fleet.tenancy.tenants.get("acme")


async def test_rows_that_refer_to_nothing_are_refused(fleet: Fleet, postgres: Postgres) -> None:
    """Where the source has its foreign key as NOT VALID; a valid one is validated, and told."""
    loose = (
        OLD.replace(" CONSTRAINT notes_author_id_fkey REFERENCES authors (id)", "")
        + "ALTER TABLE notes ADD CONSTRAINT notes_author_id_fkey FOREIGN KEY (author_id) REFERENCES authors NOT VALID;"
    )
    async with foreign_database(postgres, loose) as source:
        report = await fleet.tenancy.adoption.adopt("acme", source.url, accept_differences=True)
        assert any("was NOT VALID, and holds for all rows" in note for note in report.notes)
        await source.execute(
            "ALTER TABLE notes DROP CONSTRAINT notes_author_id_fkey; DELETE FROM authors WHERE id = 1; "
            "ALTER TABLE notes ADD CONSTRAINT notes_author_id_fkey FOREIGN KEY (author_id) REFERENCES authors NOT VALID"
        )
        with pytest.raises(AdoptionError, match=r"rows of table public\.notes refer to rows that do not exist"):
            await fleet.tenancy.adoption.adopt("globex", source.url, accept_differences=True)
    with pytest.raises(TenantNotFoundError):
        await fleet.tenancy.tenants.get("globex")
    assert (await fleet.migrations.drift()).ok
    assert (await fleet.provisioner.reconcile(check=True)).clean


async def test_an_administrator_who_is_no_superuser(
    postgres: Postgres, control_url: str, name_prefix: str, project: Project
) -> None:
    """Copies, and takes over what belongs to a role that it has made; what does not is refused and left as it was."""
    with running_server(VERSIONS[-1], postgres.worker) as managed:
        async with plain_administrator(managed) as administrator, foreign_database(managed, OLD) as strange:
            config = fleet_config(postgres, control_url, name_prefix, project)
            config = config.replace(servers={"default": administrator})
            connection = await asyncpg.connect(administrator)
            try:
                await connection.execute("CREATE ROLE own LOGIN PASSWORD 'of-own'; GRANT own TO CURRENT_USER")
                await connection.execute("CREATE DATABASE own OWNER own")
            finally:
                await connection.close()
            url = managed.url("own", user="own", password="of-own")
            inside = await asyncpg.connect(url)
            try:
                await inside.execute(OLD)
            finally:
                await inside.close()
            async with open_fleet(config, initialise=True) as fleet:
                adopt = fleet.tenancy.adoption.adopt
                await adopt("copied", url)
                before = await strange.fetch(RIGHTS)
                with pytest.raises(TenancyError, match=r"may not act for role old_.*WITH ADMIN OPTION"):
                    await adopt("strange", strange.url, in_place=True, revoke=True)
                assert await strange.fetch(RIGHTS) == before
                await adopt("own", url, in_place=True)
                for slug in ("copied", "own"):
                    assert await fleet.fetch(slug, "SELECT count(*) FROM notes") == [(50,)]
                    assert await fleet.revision(slug) == "0002"
                assert (await fleet.migrations.drift()).ok


async def test_extensions_are_configured_ones_and_move_to_where_new_tenants_have_them(
    config: TenancyConfig, project: Project, postgres: Postgres
) -> None:
    """One that nobody has configured is refused where it is used; no source decides what an administrator installs."""
    project.add("0003", 'op.execute("ALTER TABLE notes ADD COLUMN meaning vector(3)")', down="0002")
    used = OLD.replace("VALUES ('0001')", "VALUES ('0003')").replace(
        "created_at timestamptz NOT NULL DEFAULT now()\n",
        "created_at timestamptz NOT NULL DEFAULT now(), pinned boolean NOT NULL DEFAULT false, "
        "meaning extensions.vector(3)\n",
    )
    async with foreign_database(postgres) as source:
        async with postgres.connect(source.name) as connection:
            await connection.execute("CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
            await connection.execute("GRANT USAGE ON SCHEMA extensions TO PUBLIC")
        await source.execute(used)
        await source.execute("UPDATE notes SET meaning = '[1,2,3]'")
        with_vector = config.replace(extensions=("vector",))
        async with open_fleet(with_vector, initialise=True) as fleet:
            report = await fleet.tenancy.adoption.adopt("acme", source.url)
            assert report.differences == ()
            assert await fleet.fetch("acme", "SELECT count(*) FROM notes WHERE meaning = '[1,2,3]'") == [(50,)]
            spaces = "SELECT nspname FROM pg_namespace JOIN pg_extension ON extnamespace = pg_namespace.oid"
            assert ("public",) in await fleet.fetch("acme", f"{spaces} WHERE extname = 'vector'")
            assert (await fleet.migrations.drift()).ok
        async with open_fleet(config) as fleet:
            with pytest.raises(AdoptionError, match="uses the extension vector, which is not in the setting"):
                await fleet.tenancy.adoption.adopt("globex", source.url)
