"""Integrations, one small module each. Every module names the extra that it needs."""
