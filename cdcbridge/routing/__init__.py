"""Decide which consumers get each change, and encode the rows that the store appends for them.

No module of this folder touches a database. A module that is called pure imports no socket, file, thread or terminal
either, nor any module that does. For example, `router` finds the consumers of a table, and `copy_format` encodes rows.
"""
