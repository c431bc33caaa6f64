"""A platform for AI agents, one PostgreSQL database per customer: see ``README.md``."""
