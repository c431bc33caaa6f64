"""What every room that talks to PostgreSQL shares: quoting, errors by SQLSTATE, what a lost server raises."""
