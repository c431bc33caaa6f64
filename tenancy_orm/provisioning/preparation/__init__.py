"""What a server needs before the first tenant is on it."""
