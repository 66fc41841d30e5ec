"""Mirrors: apply the changes of the log to another PostgreSQL, in whole transactions and exactly once."""
