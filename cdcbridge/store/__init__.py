"""The database that is written: the log and the consumers. Nothing here knows the source."""
