"""Who is calling: credentials, the directory that knows them, lock-out, admissions; issuing and revoking keys."""
