"""The two schemas of a store: one that applications use, and one for everything that only cdcbridge uses.

For example, the store in the schema `cdcbridge` has its internal tables and functions in `cdcbridge_internal`. No other
role may use them. This module is pure. Never asks a database which schemas exist.
"""

from __future__ import annotations

from typing import Final

INTERNAL: Final = "_internal"


def internal(schema: str) -> str:
    """Return the name of the internal schema of the store in this schema."""
    return schema + INTERNAL


def both(schema: str) -> tuple[str, str]:
    """Return the names of the store's schema and of its internal schema."""
    return schema, internal(schema)
