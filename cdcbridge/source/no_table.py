"""Suggest an existing table for a name that matches no table. This module never changes anything."""

from __future__ import annotations

from cdcbridge.database import Connection, source_errors
from cdcbridge.words import did_you_mean, one_of

_TOPICS = """
    select n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence = 'p'
    and n.nspname not in ('pg_catalog', 'information_schema')
    order by n.nspname <> 'public', 1 limit 5000
"""


def nearest(connection: Connection, given: str) -> str:
    """Return a suggestion such as `; did you mean public.orders?`, or '' if no table has a similar name.

    A name without a schema also finds its table, for example `orders`.
    """
    with source_errors():
        known = [topic for (topic,) in connection.execute(_TOPICS).fetchall()]
    schema, _, name = given.strip(".").rpartition(".")
    same = [topic for topic in known if topic.partition(".")[2].lower() == name.lower()]
    if not same:
        near_by = {
            topic.partition(".")[2]: topic for topic in reversed(known) if not schema or topic.startswith(f"{schema}.")
        }
        match = did_you_mean(name, near_by).removeprefix("; did you mean ").removesuffix("?")
        same = [near_by[match]] if match else []
    return f"; did you mean {one_of(same[:3])}?" if same else ""
