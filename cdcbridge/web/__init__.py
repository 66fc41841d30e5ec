"""The HTTP API of `cdcbridge serve`.

Each process keeps a pool of sessions on the store and nothing else, so any number of them may run. Never imports the
bridge, and never writes to the source.
"""
