"""Bytes of an output plugin in, typed events out. Pure: no socket, no clock, no log, no thread."""
