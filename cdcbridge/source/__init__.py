"""The database that is read. Nothing here knows the store."""
