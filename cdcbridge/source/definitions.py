"""Detect cheaply whether the definition of any table that consumers take has changed.

The check needs one query of the catalogue and no locks on tables. For example, `alter table orders drop constraint
orders_pkey` changes the mark, so that the bridge checks its consumers again. VACUUM and ANALYZE do not change the mark.
This module never changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cdcbridge.database import Connection, source_errors
from cdcbridge.schemas import both

# Each DDL writes a new version of a catalogue row, whose xmin is its transaction. A dropped row changes the sum, too.
_MARK: Final = """
    with t as (
        select c.oid, hashtextextended(concat_ws('/', c.oid, c.xmin, n.nspname, c.relname, c.relreplident), 0) as mark
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relkind in ('r', 'p', 'f', 'v', 'm') and c.relpersistence <> 't' and n.nspname !~ '^pg_'
          and n.nspname <> all (%(own)s) and n.nspname <> 'information_schema'
          and (%(everything)s or n.nspname = any (%(schemas)s) or c.relispartition
               or n.nspname || '.' || c.relname = any (%(names)s))
    )
    select concat_ws('/', (select sum(mark) from t),
        (select sum(hashtextextended(concat_ws('/', a.attrelid, a.attnum, a.xmin, a.attisdropped), 0))
         from t join pg_attribute a on a.attrelid = t.oid where a.attnum > 0),
        (select sum(hashtextextended(concat_ws('/', i.indexrelid, i.xmin), 0))
         from t join pg_index i on i.indrelid = t.oid where i.indisunique),
        (select sum(hashtextextended(concat_ws('/', oid, nspname), 0)) from pg_namespace
         where nspname = any (%(schemas)s)))
"""


def mark(connection: Connection, patterns: Sequence[str], own_schema: str) -> str:
    """Return a text that differs after every DDL on a table of the patterns.

    The patterns have the form that a publication uses, for example `public.orders`, `sales.*` and `*.*`.
    """
    given = {
        "own": list(both(own_schema)),
        "everything": "*.*" in patterns,
        "schemas": [pattern[:-2] for pattern in patterns if pattern.endswith(".*") and pattern != "*.*"],
        "names": [pattern for pattern in patterns if not pattern.endswith(".*")],
    }
    with source_errors():
        row = connection.execute(_MARK, given, prepare=True).fetchone()
    return str(row[0]) if row else ""
