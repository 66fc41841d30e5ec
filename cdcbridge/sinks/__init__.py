"""Deliver the messages of consumers to other systems: brokers, webhooks and files.

`target.py` is the interface of an adapter, and `targets/` has one adapter for each type of sink. `process.py` runs all
sinks of a configuration file. Never appends to the log, and never holds WAL back.
"""
