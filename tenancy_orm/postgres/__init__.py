"""What every room that talks to PostgreSQL shares: connections, locks, quoting, SQLSTATEs, what a lost server says."""
