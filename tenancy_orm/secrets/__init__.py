"""Sealed passwords and the keys that seal them: keyring, data keys, and providers of secrets."""
