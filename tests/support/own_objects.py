"""What a tenant's role makes itself, in a schema that a grant hook opens to it."""

from __future__ import annotations

from tenancy_orm.protocols import GrantTarget

MAKE = (
    "CREATE TABLE sandbox.drafts (id int GENERATED ALWAYS AS IDENTITY, body text)",
    "INSERT INTO sandbox.drafts (body) VALUES ('one')",
    "CREATE FUNCTION sandbox.shout(text) RETURNS text LANGUAGE sql IMMUTABLE SECURITY DEFINER AS 'SELECT upper($1)'",
    "CREATE INDEX loud ON sandbox.drafts (sandbox.shout(body))",
    "CREATE STATISTICS sandbox.many ON id, body FROM sandbox.drafts",
    "CREATE VIEW sandbox.shouted AS SELECT sandbox.shout(body) AS body FROM sandbox.drafts",
    "CREATE FUNCTION sandbox.fire() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
)
"""Statements of the tenant's: but for the last one, they make code that runs with the rights of its owner."""

OWNERS = """
SELECT relname::text AS name, pg_get_userbyid(relowner)::text AS owner FROM pg_class
 WHERE relnamespace = 'sandbox'::regnamespace AND relkind <> 'S'
UNION ALL SELECT proname::text, pg_get_userbyid(proowner)::text FROM pg_proc
 WHERE pronamespace = 'sandbox'::regnamespace
UNION ALL SELECT stxname::text, pg_get_userbyid(stxowner)::text FROM pg_statistic_ext
 WHERE stxnamespace = 'sandbox'::regnamespace
"""
NAMES = ("drafts", "fire", "loud", "many", "shout", "shouted")


def sandbox(target: GrantTarget) -> list[str]:
    """Let the tenant's role make objects in a schema of its own use."""
    return [
        f"CREATE SCHEMA IF NOT EXISTS sandbox AUTHORIZATION {target.owner}",
        f"GRANT USAGE, CREATE ON SCHEMA sandbox TO {target.role}",
    ]


def watched_sandbox(target: GrantTarget) -> list[str]:
    """... and fail where an object in it is the owner's: in a new database, before the role has what it made."""
    return [
        *sandbox(target),
        f"""
        DO $$ BEGIN
            IF EXISTS (SELECT FROM pg_proc WHERE pronamespace = 'sandbox'::regnamespace
                                             AND proowner = '{target.owner}'::regrole)
            THEN RAISE 'the code is the owner''s'; END IF;
        END $$
        """,
    ]
