"""The SELECT that reads a database's schema from PostgreSQL's catalogue.

It runs as an administrator or as the owner in a database with contents that are a tenant's, so it only prints: no
default, view or function of the database is evaluated. Only a superuser can create a type with an output function of
its own. Tables and functions are named with their schema, and operators are found in ``pg_catalog``, since that is the
``search_path`` while it runs; with it PostgreSQL prints all other names with their schemas as well.

A row is one object: its kind, the object it belongs to ("table public.notes") if it does, its name, and the values of
``FIELDS`` of its kind. What an extension has made is not read, nor is what PostgreSQL makes along with another object,
nor the checkpoints of data migrations: a database has them only while some are unfinished, and nobody may drop them.
"""

# ruff: noqa: S608 - what is inserted are constants of this file
from __future__ import annotations

from functools import lru_cache

from ..provisioning.rights.grants import CHECKPOINTS_SCHEMA

OWNER = "<tenancy:owner>"
TENANT = "<tenancy:tenant>"
"""Names that stand for the owner of all tenants' schemas and for the tenant's role; no quoted name is like them."""

FIELDS: dict[str, tuple[str, ...]] = {
    "schema": ("owner", "comment"),
    "table": (
        "owner",
        "persistence",
        "partition key",
        "parent",
        "bound",
        "row security",
        "replica identity",
        "options",
        "access method",
        "foreign server",
        "comment",
    ),
    "column": (
        "type",
        "not null",
        "default",
        "identity",
        "generated",
        "collation",
        "storage",
        "compression",
        "comment",
    ),
    "constraint": ("definition", "state", "comment"),
    "index": ("definition", "state", "comment"),
    "view": ("owner", "options", "definition", "comment"),
    "rule": ("definition", "state"),
    "function": ("owner", "definition", "comment"),
    "trigger": ("definition", "state", "comment"),
    "sequence": (
        "owner",
        "type",
        "start",
        "increment",
        "minimum",
        "maximum",
        "cache",
        "cycle",
        "persistence",
        "owned by",
        "comment",
    ),
    "type": ("owner", "definition", "default", "not null", "comment"),
    "policy": ("command", "mode", "roles", "using", "check"),
    "extension": ("version", "schema"),
    "event trigger": ("event", "function", "tags", "state"),
    "publication": ("owner", "operations", "via root", "tables"),
    "statistics": ("owner", "definition"),
    "foreign server": ("owner", "wrapper", "type", "version"),
    "privilege": ("privileges",),
    "default privileges": ("privileges",),
}
"""The fields of an object, by kind. Kinds that are not here have those of ``KIND_OF``, or none."""

KIND_OF = {
    "foreign table": "table",
    "materialized view": "view",
    "procedure": "function",
    "aggregate": "function",
    "window function": "function",
    "enum": "type",
    "domain": "type",
    "composite type": "type",
    "range type": "type",
    "base type": "type",
}


def _role(oid: str) -> str:
    """A role's name, quoted; or what stands for the owner or the tenant."""
    name = f"pg_catalog.pg_get_userbyid({oid})"
    return (
        f"CASE WHEN {oid} = 0 THEN 'PUBLIC' WHEN {name} IN ($1::name, 'pg_database_owner') THEN '{OWNER}' "
        f"WHEN {name} = $2::name THEN '{TENANT}' ELSE pg_catalog.quote_ident({name}::text) END"
    )


def _comment(oid: str, table: str) -> str:
    return f"pg_catalog.obj_description({oid}, '{table}')"


def _not_of_extension(oid: str, table: str) -> str:
    return (
        "NOT EXISTS (SELECT FROM member WHERE "
        f"member.classid = 'pg_catalog.{table}'::regclass AND member.objid = {oid})"
    )


_STATE = (
    "CASE {} WHEN 'D' THEN 'disabled' WHEN 'R' THEN 'enabled on replicas' WHEN 'A' THEN 'enabled always' ELSE NULL END"
)

_CTES = f"""
WITH member AS MATERIALIZED (SELECT classid, objid FROM pg_catalog.pg_depend WHERE deptype = 'e'),
space AS MATERIALIZED (
  SELECT oid, pg_catalog.quote_ident(nspname) AS name, nspowner, nspacl FROM pg_catalog.pg_namespace
   WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'tenancy_orm')
     AND NOT (nspname = '{CHECKPOINTS_SCHEMA}' AND pg_catalog.pg_get_userbyid(nspowner) = $1::name)),
relation AS MATERIALIZED (
  SELECT c.oid, relkind, relowner, relacl, relpersistence, relpartbound, relrowsecurity, relforcerowsecurity,
         relreplident, reloptions, relam, space.name || '.' || pg_catalog.quote_ident(relname) AS name,
         CASE relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'S' THEN 'sequence'
         WHEN 'f' THEN 'foreign table' ELSE 'table' END AS kind
    FROM pg_catalog.pg_class c JOIN space ON space.oid = relnamespace
   WHERE relkind IN ('r', 'p', 'f', 'v', 'm', 'S') AND {_not_of_extension("c.oid", "pg_class")})
"""
_ROUTINES = f""", routine AS MATERIALIZED (
  SELECT p.oid, prokind, proowner, proacl,
         CASE prokind WHEN 'p' THEN 'procedure' WHEN 'a' THEN 'aggregate' WHEN 'w' THEN 'window function'
         ELSE 'function' END AS kind,
         space.name || '.' || pg_catalog.quote_ident(proname) || '('
         || CASE prokind WHEN 'a' THEN pg_catalog.pg_get_function_identity_arguments(p.oid)
            ELSE pg_catalog.oidvectortypes(proargtypes) END || ')' AS name
    FROM pg_catalog.pg_proc p JOIN space ON space.oid = pronamespace
   WHERE {_not_of_extension("p.oid", "pg_proc")}
     AND p.oid NOT IN (SELECT objid FROM pg_catalog.pg_depend
                        WHERE deptype = 'i' AND classid = 'pg_catalog.pg_proc'::regclass))
"""
_KINDS_OF_TYPES = f""", kind_of_type AS MATERIALIZED (
  SELECT t.oid, typtype, typowner, typacl, typbasetype, typtypmod, typdefault, typnotnull, typrelid, typinput,
         typcollation, space.name || '.' || pg_catalog.quote_ident(typname) AS name,
         CASE typtype WHEN 'e' THEN 'enum' WHEN 'd' THEN 'domain' WHEN 'c' THEN 'composite type'
         WHEN 'r' THEN 'range type' ELSE 'base type' END AS kind
    FROM pg_catalog.pg_type t JOIN space ON space.oid = typnamespace
   WHERE (typtype IN ('e', 'd', 'r', 'b')
          OR typtype = 'c' AND EXISTS (SELECT FROM pg_catalog.pg_class WHERE oid = typrelid AND relkind = 'c'))
     AND t.oid NOT IN (SELECT typarray FROM pg_catalog.pg_type WHERE typarray <> 0)
     AND {_not_of_extension("t.oid", "pg_type")})
"""

_SCHEMAS = f"""
SELECT 'schema' AS kind, NULL AS parent, space.name AS name,
       ARRAY[{_role("nspowner")}, {_comment("space.oid", "pg_namespace")}] AS fields
  FROM space WHERE {_not_of_extension("space.oid", "pg_namespace")}
"""

_TABLES = f"""
SELECT kind, NULL, name, ARRAY[
  {_role("relowner")},
  CASE relpersistence WHEN 'u' THEN 'unlogged' END,
  CASE relkind WHEN 'p' THEN pg_catalog.pg_get_partkeydef(oid) END,
  (SELECT pg_catalog.string_agg(inhparent::regclass::text, ', ' ORDER BY inhseqno)
     FROM pg_catalog.pg_inherits WHERE inhrelid = oid),
  pg_catalog.pg_get_expr(relpartbound, oid),
  NULLIF(pg_catalog.concat_ws(', ', CASE WHEN relrowsecurity THEN 'enabled' END,
                              CASE WHEN relforcerowsecurity THEN 'forced' END), ''),
  CASE relreplident WHEN 'n' THEN 'nothing' WHEN 'f' THEN 'full' WHEN 'i' THEN
    (SELECT 'index ' || indexrelid::regclass::text FROM pg_catalog.pg_index WHERE indrelid = oid AND indisreplident)
  END,
  (SELECT pg_catalog.string_agg(one, ', ' ORDER BY one) FROM pg_catalog.unnest(reloptions) one
    WHERE one !~ '^(log_)?autovacuum_'),
  (SELECT amname FROM pg_catalog.pg_am a WHERE a.oid = relam AND amname <> 'heap'),
  (SELECT srvname FROM pg_catalog.pg_foreign_table JOIN pg_catalog.pg_foreign_server s ON s.oid = ftserver
    WHERE ftrelid = relation.oid),
  {_comment("oid", "pg_class")}]
  FROM relation WHERE relkind IN ('r', 'p', 'f')
"""

_COLUMNS = """
SELECT 'column', r.kind || ' ' || r.name, pg_catalog.quote_ident(attname), ARRAY[
  pg_catalog.format_type(atttypid, atttypmod),
  CASE WHEN attnotnull THEN {not_null} END,
  CASE WHEN attgenerated = '' THEN pg_catalog.pg_get_expr(adbin, adrelid) END,
  CASE attidentity WHEN 'a' THEN 'always' WHEN 'd' THEN 'by default' END,
  CASE attgenerated WHEN '' THEN NULL WHEN 'v' THEN pg_catalog.pg_get_expr(adbin, adrelid) || ' virtual'
  ELSE pg_catalog.pg_get_expr(adbin, adrelid) || ' stored' END,
  CASE WHEN attcollation <> 0 AND attcollation <> typcollation THEN attcollation::regcollation::text END,
  CASE WHEN attstorage <> typstorage THEN
    CASE attstorage WHEN 'p' THEN 'plain' WHEN 'e' THEN 'external' WHEN 'm' THEN 'main' ELSE 'extended' END END,
  NULLIF(attcompression::text, ''),
  d.description]
  FROM relation r JOIN pg_catalog.pg_attribute a ON attrelid = r.oid
  JOIN pg_catalog.pg_type t ON t.oid = atttypid
  LEFT JOIN pg_catalog.pg_attrdef ON adrelid = r.oid AND adnum = attnum
  LEFT JOIN pg_catalog.pg_description d
         ON d.classoid = 'pg_catalog.pg_class'::regclass AND d.objoid = r.oid AND d.objsubid = attnum
 WHERE relkind IN ('r', 'p', 'f') AND attnum > 0 AND NOT attisdropped
"""
# PostgreSQL 18 has constraints for it, with names that do not matter
_NOT_NULL_OR_NOT_VALID = (
    "CASE WHEN EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE conrelid = r.oid AND contype = 'n' "
    "AND conkey = ARRAY[attnum] AND NOT convalidated) THEN 'not valid' ELSE 'yes' END"
)

# What a partition inherits has a name that PostgreSQL chose, and belongs to its parent's. DISABLE TRIGGER ALL also
# disables the triggers that enforce a foreign key; their names are different in each database.
_CONSTRAINTS = f"""
SELECT 'constraint', r.kind || ' ' || r.name, pg_catalog.quote_ident(conname),
       ARRAY[pg_catalog.pg_get_constraintdef(k.oid),
             CASE WHEN EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgconstraint = k.oid AND tgisinternal
                                  AND tgenabled IN ('D', 'R')) THEN 'disabled' END,
             {_comment("k.oid", "pg_constraint")}]
  FROM pg_catalog.pg_constraint k JOIN relation r ON r.oid = conrelid
 WHERE contype IN ('c', 'p', 'u', 'x', 'f') AND conparentid = 0 AND (coninhcount = 0 OR conislocal)
"""
_CONSTRAINTS_OF_TYPES = f"""
SELECT 'constraint', t.kind || ' ' || t.name, pg_catalog.quote_ident(conname),
       ARRAY[pg_catalog.pg_get_constraintdef(k.oid), NULL, {_comment("k.oid", "pg_constraint")}]
  FROM pg_catalog.pg_constraint k JOIN kind_of_type t ON t.oid = contypid WHERE contype = 'c'
"""

_INDEXES = f"""
SELECT 'index', r.kind || ' ' || r.name, pg_catalog.quote_ident(c.relname), ARRAY[
       pg_catalog.pg_get_indexdef(indexrelid), CASE WHEN NOT (indisvalid AND indisready) THEN 'invalid' END,
       {_comment("indexrelid", "pg_class")}]
  FROM pg_catalog.pg_index i JOIN relation r ON r.oid = indrelid JOIN pg_catalog.pg_class c ON c.oid = indexrelid
 WHERE NOT c.relispartition AND indexrelid NOT IN (
         SELECT conindid FROM pg_catalog.pg_constraint WHERE contype IN ('p', 'u', 'x'))
"""

_VIEWS = f"""
SELECT kind, NULL, name, ARRAY[
       {_role("relowner")},
       (SELECT pg_catalog.string_agg(one, ', ' ORDER BY one) FROM pg_catalog.unnest(reloptions) one),
       pg_catalog.pg_get_viewdef(oid), {_comment("oid", "pg_class")}]
  FROM relation WHERE relkind IN ('v', 'm')
"""

_RULES = f"""
SELECT 'rule', r.kind || ' ' || r.name, pg_catalog.quote_ident(rulename),
       ARRAY[pg_catalog.pg_get_ruledef(w.oid), {_STATE.format("ev_enabled")}]
  FROM pg_catalog.pg_rewrite w JOIN relation r ON r.oid = ev_class WHERE rulename <> '_RETURN'
"""

_FUNCTIONS = f"""
SELECT kind, NULL, name, ARRAY[
       {_role("proowner")},
       CASE WHEN prokind <> 'a' THEN pg_catalog.pg_get_functiondef(oid) ELSE (
         SELECT pg_catalog.concat_ws(', ', 'SFUNC = ' || aggtransfn::regprocedure::text,
           'STYPE = ' || pg_catalog.format_type(aggtranstype, NULL),
           'FINALFUNC = ' || NULLIF(aggfinalfn::oid, 0)::regprocedure::text,
           'COMBINEFUNC = ' || NULLIF(aggcombinefn::oid, 0)::regprocedure::text,
           'INITCOND = ' || pg_catalog.quote_literal(agginitval),
           'SORTOP = ' || NULLIF(aggsortop, 0)::regoperator::text)
           FROM pg_catalog.pg_aggregate WHERE aggfnoid = routine.oid) END,
       {_comment("oid", "pg_proc")}]
  FROM routine
"""

_TRIGGERS = f"""
SELECT 'trigger', r.kind || ' ' || r.name, pg_catalog.quote_ident(tgname),
       ARRAY[pg_catalog.pg_get_triggerdef(t.oid), {_STATE.format("tgenabled")}, {_comment("t.oid", "pg_trigger")}]
  FROM pg_catalog.pg_trigger t JOIN relation r ON r.oid = tgrelid WHERE NOT tgisinternal AND tgparentid = 0
"""

_SEQUENCES = f"""
SELECT 'sequence', NULL, name, ARRAY[
       {_role("relowner")}, pg_catalog.format_type(seqtypid, NULL), seqstart::text, seqincrement::text, seqmin::text,
       seqmax::text, seqcache::text, CASE WHEN seqcycle THEN 'yes' END,
       CASE relpersistence WHEN 'u' THEN 'unlogged' END,
       (SELECT refobjid::regclass::text || '.' || pg_catalog.quote_ident(attname) FROM pg_catalog.pg_depend d
          JOIN pg_catalog.pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
         WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = relation.oid AND d.objsubid = 0
           AND d.refclassid = d.classid AND d.deptype IN ('a', 'i') LIMIT 1),
       {_comment("oid", "pg_class")}]
  FROM relation JOIN pg_catalog.pg_sequence ON seqrelid = oid
"""

_TYPES = f"""
SELECT kind, NULL, name, ARRAY[
       {_role("typowner")},
       CASE typtype
       WHEN 'e' THEN (SELECT pg_catalog.string_agg(pg_catalog.quote_literal(enumlabel), ', ' ORDER BY enumsortorder)
                        FROM pg_catalog.pg_enum WHERE enumtypid = t.oid)
       WHEN 'd' THEN pg_catalog.format_type(typbasetype, typtypmod) || coalesce(
              (SELECT ' COLLATE ' || t.typcollation::regcollation::text FROM pg_catalog.pg_type base
                WHERE base.oid = t.typbasetype AND base.typcollation <> t.typcollation), '')
       WHEN 'c' THEN (SELECT pg_catalog.string_agg(pg_catalog.quote_ident(attname) || ' '
                             || pg_catalog.format_type(atttypid, atttypmod), ', ' ORDER BY attnum)
                        FROM pg_catalog.pg_attribute WHERE attrelid = typrelid AND attnum > 0 AND NOT attisdropped)
       WHEN 'r' THEN (SELECT pg_catalog.concat_ws(', ', 'SUBTYPE = ' || pg_catalog.format_type(rngsubtype, NULL),
                             'CANONICAL = ' || NULLIF(rngcanonical::oid, 0)::regprocedure::text,
                             'SUBTYPE_DIFF = ' || NULLIF(rngsubdiff::oid, 0)::regprocedure::text,
                             'COLLATION = ' || NULLIF(rngcollation, 0)::regcollation::text)
                        FROM pg_catalog.pg_range WHERE rngtypid = t.oid)
       ELSE 'INPUT = ' || typinput::regprocedure::text END,
       typdefault, CASE WHEN typnotnull THEN 'yes' END, {_comment("oid", "pg_type")}]
  FROM kind_of_type t
"""

_POLICIES = f"""
SELECT 'policy', r.kind || ' ' || r.name, pg_catalog.quote_ident(polname), ARRAY[
       CASE polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE'
       ELSE 'ALL' END,
       CASE WHEN NOT polpermissive THEN 'restrictive' END,
       (SELECT pg_catalog.string_agg({_role("one")}, ', ' ORDER BY {_role("one")})
          FROM pg_catalog.unnest(polroles) one),
       pg_catalog.pg_get_expr(polqual, polrelid), pg_catalog.pg_get_expr(polwithcheck, polrelid)]
  FROM pg_catalog.pg_policy p JOIN relation r ON r.oid = polrelid
"""

_EXTENSIONS = """
SELECT 'extension', NULL, pg_catalog.quote_ident(extname), ARRAY[extversion, extnamespace::regnamespace::text]
  FROM pg_catalog.pg_extension
"""

_EVENT_TRIGGERS = f"""
SELECT 'event trigger', NULL, pg_catalog.quote_ident(evtname), ARRAY[
       evtevent::text, evtfoid::regproc::text, pg_catalog.array_to_string(evttags, ', '),
       {_STATE.format("evtenabled")}]
  FROM pg_catalog.pg_event_trigger e WHERE {_not_of_extension("e.oid", "pg_event_trigger")}
"""

_PUBLICATIONS = f"""
SELECT 'publication', NULL, pg_catalog.quote_ident(pubname), ARRAY[
       {_role("pubowner")},
       pg_catalog.concat_ws(', ', CASE WHEN pubinsert THEN 'insert' END, CASE WHEN pubupdate THEN 'update' END,
                 CASE WHEN pubdelete THEN 'delete' END, CASE WHEN pubtruncate THEN 'truncate' END),
       CASE WHEN pubviaroot THEN 'yes' END,
       CASE WHEN puballtables THEN 'all' ELSE pg_catalog.concat_ws(', ',
         (SELECT pg_catalog.string_agg(prrelid::regclass::text{{parts}}, ', ' ORDER BY prrelid::regclass::text)
            FROM pg_catalog.pg_publication_rel WHERE prpubid = p.oid){{schemas}}) END]
  FROM pg_catalog.pg_publication p WHERE {_not_of_extension("p.oid", "pg_publication")}
"""
_PARTS = """
 || coalesce(' (' || (SELECT pg_catalog.string_agg(pg_catalog.quote_ident(attname), ', ' ORDER BY attname)
                        FROM pg_catalog.pg_attribute WHERE attrelid = prrelid AND attnum = ANY (prattrs)) || ')', '')
 || coalesce(' WHERE ' || pg_catalog.pg_get_expr(prqual, prrelid), '')"""
_PUBLISHED_SCHEMAS = """,
 (SELECT 'all of ' || pg_catalog.string_agg(pnnspid::regnamespace::text, ', ' ORDER BY pnnspid::regnamespace::text)
    FROM pg_catalog.pg_publication_namespace WHERE pnpubid = p.oid)"""

_STATISTICS = f"""
SELECT 'statistics', r.kind || ' ' || r.name, space.name || '.' || pg_catalog.quote_ident(stxname),
       ARRAY[{_role("stxowner")}, pg_catalog.pg_get_statisticsobjdef(s.oid)]
  FROM pg_catalog.pg_statistic_ext s JOIN space ON space.oid = stxnamespace JOIN relation r ON r.oid = stxrelid
"""

_FOREIGN_SERVERS = f"""
SELECT 'foreign server', NULL, pg_catalog.quote_ident(srvname),
       ARRAY[{_role("srvowner")}, (SELECT fdwname FROM pg_catalog.pg_foreign_data_wrapper w WHERE w.oid = srvfdw),
             srvtype, srvversion]
  FROM pg_catalog.pg_foreign_server s WHERE {_not_of_extension("s.oid", "pg_foreign_server")}
"""

# of these, whether they exist
_IN_SCHEMAS = (
    ("pg_collation", "collnamespace"),
    ("pg_conversion", "connamespace"),
    ("pg_operator", "oprnamespace"),
    ("pg_opclass", "opcnamespace"),
    ("pg_opfamily", "opfnamespace"),
    ("pg_ts_config", "cfgnamespace"),
    ("pg_ts_dict", "dictnamespace"),
)
# those of initdb have lower numbers than 16384
_NUMBERED = ("pg_cast", "pg_language", "pg_am", "pg_foreign_data_wrapper")
_OTHERS = """
SELECT i.type, NULL, i.identity, ARRAY[]::text[] FROM (
{}
) listed CROSS JOIN LATERAL pg_catalog.pg_identify_object(class, oid, 0) i
 WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = class AND m.objid = listed.oid)
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                    WHERE d.classid = class AND d.objid = listed.oid AND deptype = 'i')
""".format(
    "UNION ALL ".join(
        [
            f"SELECT 'pg_catalog.{table}'::regclass AS class, o.oid FROM pg_catalog.{table} o "
            f"JOIN space ON space.oid = {column}\n"
            for table, column in _IN_SCHEMAS
        ]
        + [
            f"SELECT 'pg_catalog.{table}'::regclass, o.oid FROM pg_catalog.{table} o WHERE o.oid >= 16384\n"
            for table in _NUMBERED
        ]
    )
)

# the owner's own rights are not listed: PostgreSQL 17 has added one
_PRIVILEGES = f"""
SELECT 'privilege', target, part || grantee, ARRAY[
       pg_catalog.string_agg(privilege || CASE WHEN grantable THEN ' WITH GRANT OPTION' ELSE '' END, ', '
                             ORDER BY privilege)]
  FROM (
    SELECT target, part, {_role("a.grantee")} AS grantee, a.privilege_type AS privilege,
           pg_catalog.bool_or(a.is_grantable) AS grantable
      FROM (
        SELECT 'schema ' || name AS target, '' AS part, nspowner AS owner, nspacl AS acl FROM space
        UNION ALL SELECT kind || ' ' || name, '', relowner, relacl FROM relation
        UNION ALL SELECT kind || ' ' || name, pg_catalog.quote_ident(attname) || ' ', relowner, attacl
                    FROM relation r JOIN pg_catalog.pg_attribute ON attrelid = r.oid
                   WHERE attacl IS NOT NULL AND NOT attisdropped
        {{others}}
      ) listed CROSS JOIN LATERAL pg_catalog.aclexplode(acl) a
     WHERE a.grantee <> owner GROUP BY 1, 2, 3, 4) granted
 GROUP BY target, part, grantee
"""
_PRIVILEGES_ON_ROUTINES = """
        UNION ALL SELECT kind || ' ' || name, '', proowner, coalesce(proacl, pg_catalog.acldefault('f', proowner))
                    FROM routine"""
_PRIVILEGES_ON_TYPES = """
        UNION ALL SELECT kind || ' ' || name, '', typowner, coalesce(typacl, pg_catalog.acldefault('T', typowner))
                    FROM kind_of_type"""
_DEFAULT_PRIVILEGES = f"""
SELECT 'default privileges', NULL,
       CASE defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'n' THEN 'SCHEMAS'
       WHEN 'f' THEN 'FUNCTIONS' WHEN 'T' THEN 'TYPES' ELSE 'LARGE OBJECTS' END
       || coalesce(' IN SCHEMA ' || pg_catalog.quote_ident(nspname), '') || ' FOR ROLE ' || {_role("defaclrole")},
       ARRAY[(SELECT pg_catalog.string_agg(one, '; ' ORDER BY one) FROM (
         SELECT {_role("a.grantee")} || ': ' || pg_catalog.string_agg(a.privilege_type
                || CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END, ', ' ORDER BY a.privilege_type)
           FROM pg_catalog.aclexplode(defaclacl) a WHERE a.grantee <> defaclrole GROUP BY a.grantee) given(one))]
  FROM pg_catalog.pg_default_acl LEFT JOIN pg_catalog.pg_namespace n ON n.oid = defaclnamespace
"""

# What most databases have nothing of. To plan a query for it, and to load what PostgreSQL knows of its tables, takes
# longer than to see that there is nothing. A condition may be true for what is not read; never the other way round.
_PRESENT = {
    "views": "EXISTS (SELECT FROM pg_catalog.pg_class WHERE relkind IN ('v', 'm') AND relnamespace IN (TABLE space))",
    "rules": "EXISTS (SELECT FROM pg_catalog.pg_rewrite w JOIN pg_catalog.pg_class c ON c.oid = ev_class "
    "WHERE rulename <> '_RETURN' AND relnamespace IN (TABLE space))",
    "functions": "EXISTS (SELECT FROM pg_catalog.pg_proc WHERE pronamespace IN (TABLE space))",
    "triggers": "EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE NOT tgisinternal)",
    "types": "EXISTS (SELECT FROM pg_catalog.pg_type t WHERE typnamespace IN (TABLE space) AND CASE typtype "
    "WHEN 'b' THEN oid NOT IN (SELECT typarray FROM pg_catalog.pg_type) "
    "WHEN 'c' THEN EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = typrelid AND relkind = 'c') ELSE true END)",
    "policies": "EXISTS (SELECT FROM pg_catalog.pg_policy)",
    "event triggers": "EXISTS (SELECT FROM pg_catalog.pg_event_trigger)",
    "publications": "EXISTS (SELECT FROM pg_catalog.pg_publication)",
    "statistics": "EXISTS (SELECT FROM pg_catalog.pg_statistic_ext)",
    "foreign servers": "EXISTS (SELECT FROM pg_catalog.pg_foreign_server)",
    "default privileges": "EXISTS (SELECT FROM pg_catalog.pg_default_acl)",
    "others": " OR ".join(
        [f"EXISTS (SELECT FROM pg_catalog.{table} WHERE {column} IN (TABLE space))" for table, column in _IN_SCHEMAS]
        + [f"EXISTS (SELECT FROM pg_catalog.{table} WHERE oid >= 16384)" for table in _NUMBERED]
    ),
}
EVERYTHING = frozenset(_PRESENT)
"""All that ``catalogue`` can leave out."""
PRESENT = (
    "WITH space AS MATERIALIZED (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname !~ '^pg_' "
    "AND nspname NOT IN ('information_schema', 'tenancy_orm')) SELECT pg_catalog.array_remove(ARRAY["
    + ", ".join(f"CASE WHEN {condition} THEN '{name}' END" for name, condition in _PRESENT.items())
    + "], NULL)"
)
"""A SELECT that returns what of ``EVERYTHING`` a database may have something of."""


@lru_cache(maxsize=64)
def catalogue(version: int, present: frozenset[str] = EVERYTHING) -> str:
    """Return the SELECT for a major version of PostgreSQL. ``$1`` is the owner's name, ``$2`` the tenant's role.

    Args:
        version: The version.
        present: What ``PRESENT`` has returned in the same snapshot.
    """
    columns = _COLUMNS.format(not_null=_NOT_NULL_OR_NOT_VALID if version >= 18 else "'yes'")
    publications = _PUBLICATIONS.format(
        parts=_PARTS if version >= 15 else "", schemas=_PUBLISHED_SCHEMAS if version >= 15 else ""
    )
    routines, types = "functions" in present, "types" in present
    others = (_PRIVILEGES_ON_ROUTINES if routines else "") + (_PRIVILEGES_ON_TYPES if types else "")
    parts = {
        "views": [_VIEWS],
        "rules": [_RULES],
        "functions": [_FUNCTIONS],
        "triggers": [_TRIGGERS],
        "types": [_TYPES, _CONSTRAINTS_OF_TYPES],
        "policies": [_POLICIES],
        "event triggers": [_EVENT_TRIGGERS],
        "publications": [publications],
        "statistics": [_STATISTICS],
        "foreign servers": [_FOREIGN_SERVERS],
        "default privileges": [_DEFAULT_PRIVILEGES],
        "others": [_OTHERS],
    }
    always = (
        _SCHEMAS,
        _TABLES,
        columns,
        _CONSTRAINTS,
        _INDEXES,
        _SEQUENCES,
        _EXTENSIONS,
        _PRIVILEGES.format(others=others),
    )
    ctes = _CTES + (_ROUTINES if routines else "") + (_KINDS_OF_TYPES if types else "")
    return ctes + "UNION ALL".join([*always, *(one for name in parts if name in present for one in parts[name])])
