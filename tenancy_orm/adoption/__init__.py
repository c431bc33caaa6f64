"""Adoption: an existing database, schema, or set of rows becomes a tenant."""
