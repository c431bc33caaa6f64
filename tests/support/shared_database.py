"""A shared database of two customers, and the tables that one tenant has of its own."""

from __future__ import annotations

from typing import Any

_COMMON = """
CREATE TABLE countries (code text PRIMARY KEY, name text NOT NULL);
CREATE TABLE {orgs} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, {name} text NOT NULL{plan});
CREATE TABLE users (id bigserial PRIMARY KEY, {org}name text NOT NULL, country text REFERENCES countries (code));
CREATE TABLE projects (id bigserial PRIMARY KEY, {org}name text NOT NULL, owner_id bigint REFERENCES users (id));
CREATE TABLE memberships (user_id bigint REFERENCES users (id), project_id bigint REFERENCES projects (id),
    role text NOT NULL DEFAULT 'member', PRIMARY KEY (user_id, project_id));
ALTER TABLE users ADD favourite_id bigint REFERENCES projects (id);
CREATE TABLE tasks (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, {org}project_id bigint NOT NULL
    REFERENCES projects (id), parent_id bigint CONSTRAINT tasks_parent_fkey REFERENCES tasks (id), title text NOT NULL,
    title_length int GENERATED ALWAYS AS (length(title)) STORED);
CREATE TABLE tags (id bigserial PRIMARY KEY, {org}name text NOT NULL);
CREATE TABLE task_tags (task_id bigint REFERENCES tasks (id), tag_id bigint REFERENCES tags (id),
    PRIMARY KEY (task_id, tag_id));
CREATE TABLE comments (id bigserial PRIMARY KEY, task_id bigint REFERENCES tasks (id),
    parent_id bigint REFERENCES comments (id), body text NOT NULL, data bytea, at timestamptz NOT NULL DEFAULT now());
CREATE TABLE audit (id bigint PRIMARY KEY, {nullable}user_id bigint REFERENCES users (id), event text NOT NULL);
"""
TABLES = (
    _COMMON.format(orgs="organisation", name="title", plan=", plan text NOT NULL", org="", nullable="")
    + """
CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN NEW.title = upper(NEW.title); RETURN NEW; END $$;
CREATE TRIGGER shouting BEFORE INSERT ON tasks FOR EACH ROW WHEN (NEW.title LIKE '!%') EXECUTE FUNCTION shout();
INSERT INTO countries VALUES ('xx', 'of a revision');
"""
)
"""The tables of one tenant: without the customer's column, and with another name for one of them."""

SHARED = (
    _COMMON.format(
        orgs="orgs",
        name="name",
        plan="",
        org="org_id bigint NOT NULL REFERENCES orgs (id), ",
        nullable="org_id bigint REFERENCES orgs (id), ",
    )
    + """
CREATE TABLE sessions (id int PRIMARY KEY, secret text);
CREATE TABLE alembic_version (version_num text);
INSERT INTO countries VALUES ('fr', 'France'), ('de', 'Germany');
INSERT INTO orgs (name) VALUES ('Acme'), ('Globex');
INSERT INTO users (org_id, name, country) VALUES (1, 'alice', 'fr'), (1, 'bob', NULL), (2, 'carol', 'de'),
    (2, 'dave', 'fr');
INSERT INTO projects (org_id, name, owner_id) VALUES (1, 'one', 1), (1, 'two', NULL), (2, 'three', 3);
UPDATE users SET favourite_id = 1 WHERE id = 1;
INSERT INTO memberships VALUES (1, 1), (2, 2), (3, 3), (4, 3);
INSERT INTO tasks (org_id, project_id, parent_id, title) VALUES (1, 1, NULL, 'first'), (1, 2, 1, 'second'),
    (2, 3, NULL, 'third'), (2, 3, 3, 'fourth'), (1, 1, NULL, '!low');
INSERT INTO tags (org_id, name) VALUES (1, 'red'), (2, 'blue');
INSERT INTO task_tags VALUES (1, 1), (2, 1), (3, 2);
INSERT INTO comments (task_id, parent_id, body, data, at) VALUES
    (1, NULL, E'tab\\tand \\\\ and\\nline é', '\\x00ff', '2026-03-01 12:00+02'), (NULL, 1, 'answer', NULL, now()),
    (NULL, 2, 'answer to it', NULL, now()), (3, NULL, 'theirs', NULL, now()), (NULL, 4, 'theirs too', NULL, now()),
    (2, NULL, '\\N', NULL, now());
INSERT INTO audit VALUES (1, 1, 1, 'login'), (2, 1, NULL, 'export'), (3, 2, 3, 'login'), (4, NULL, NULL, 'start'),
    (5, NULL, NULL, 'stop');
INSERT INTO sessions VALUES (1, 'a'), (2, 'b');
"""
)
"""A shared database: every table has the customer's column, or refers to one that has."""

MAPPING: dict[str, Any] = {
    "shared": ["countries"],
    "exclude": ["sessions"],
    "tables": {"orgs": {"rename": "organisation", "columns": {"name": "title"}, "values": {"plan": "pro"}}},
}
"""What the references do not say."""

__all__ = ["MAPPING", "SHARED", "TABLES"]
