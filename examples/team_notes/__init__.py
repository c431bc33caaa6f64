"""Notes of teams, for people who log in with a browser: see README.md."""
