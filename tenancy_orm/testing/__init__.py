"""Real PostgreSQL servers for tests, demos and development.

``tenancy_orm.testing.embedded`` needs the extra ``embedded`` and is imported explicitly, so that importing this
package costs nothing and needs nothing.
"""
