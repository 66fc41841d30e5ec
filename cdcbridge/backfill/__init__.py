"""Rows that were in a table before its consumer: read beside the stream, and compared with the log."""
