"""What travels to a server, and what runs there first."""
