"""What databases and servers are compared with."""
