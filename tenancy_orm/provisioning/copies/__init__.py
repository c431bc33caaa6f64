"""A database that is copied from another one, with pg_dump and pg_restore."""
