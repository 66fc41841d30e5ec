"""Rows that a table had before its consumer: read while the stream continues, and compared with the log."""
