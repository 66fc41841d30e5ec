"""The demo and its PostgreSQL server, separate from the rest of the program."""
