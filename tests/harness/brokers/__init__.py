"""Real brokers for the tests of sinks: each is a process of its own on free ports, with its data in a folder of its own.

`with Redis() as redis:` starts a server and removes it at the end. Fixtures that share a server are in fixtures.py.
"""
