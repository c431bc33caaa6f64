"""What is on a server: databases, roles and sessions, and what is done to them one by one."""
