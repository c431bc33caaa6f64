"""A two-tenant application in one file: see ``app.py``."""
