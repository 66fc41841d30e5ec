"""Find objects in the store's schema that cdcbridge did not make, so that `uninstall` does not drop them.

This module only reads.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Final

from cdcbridge.database import Connection
from cdcbridge.schemas import both

_MADE: Final = re.compile(
    r"create (?:or replace )?(?:unlogged )?(?:table|view|sequence|function|type)(?: if not exists)? (\w+)"
)
_NUMBERED: Final = re.compile(r"(\w+?)_\d+(_\w+)?")
# Without sequences of columns, which are dropped together with their owners.
_RELATIONS: Final = """
    select c.relname, false from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = any (%(schemas)s) and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
      and not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid
                      and d.deptype in ('a', 'i') and d.refclassid = 'pg_class'::regclass)
    union
    select p.proname, true from pg_proc p join pg_namespace n on n.oid = p.pronamespace
    where n.nspname = any (%(schemas)s)
"""


def strangers(store: Connection, schema: str) -> list[str]:
    """Return the names of the tables, views, sequences and functions that cdcbridge does not make.

    Both schemas of the store are searched.
    """
    found = store.execute(_RELATIONS, {"schemas": list(both(schema))}).fetchall()
    made = _made()
    return sorted(
        f"the function {name}" if function else name for name, function in found if not _ours(name, made, function)
    )


def _ours(name: str, made: frozenset[str], function: bool) -> bool:
    """Return whether cdcbridge makes the object.

    The object is in an SQL file, or it belongs to a consumer or a segment, such as `waiting_12` or `messages_3`.
    """
    if name in made:
        return True
    numbered = _NUMBERED.fullmatch(name)
    return numbered is not None and (function or numbered[1] in made)


@cache
def _made() -> frozenset[str]:
    root = resources.files("cdcbridge") / "sql"
    folders = ("", "migrations", "api", "internal", "internal/dispatch", "views")
    files = [file for folder in folders for file in (root / folder).iterdir() if file.name.endswith(".sql")]
    return frozenset(name for file in files for name in _MADE.findall(file.read_text()))
