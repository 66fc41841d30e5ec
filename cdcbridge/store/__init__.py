"""The store: the database that is written, with the log and the consumers. Nothing here knows the source."""
