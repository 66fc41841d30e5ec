"""Changes as the decoders read them from the WAL, and the identity of each change.

Every module of this package is pure. Never touches a database.
"""
