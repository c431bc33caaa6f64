"""Shared by every room that talks to PostgreSQL: connections, advisory locks, quoting, SQLSTATEs, server failures."""
