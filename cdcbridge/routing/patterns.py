"""Match tables with a consumer's `tables`: `public.orders`, `sales.*`, `sales.o_*`, without `!sales.tmp_*`.

A pattern is compared with `schema.table`, and `*` matches any characters. A table that one pattern excludes is not
taken, in any order of the patterns. The module is pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Final

_SPECIAL: Final = re.compile(r"[\\%_]")


def refuse_bad_patterns(patterns: Sequence[str]) -> None:
    """Raise ValueError if an entry is not a valid pattern, or if all of them only exclude tables."""
    for pattern in patterns:
        schema, dot, table = pattern.removeprefix("!").partition(".")
        if not (schema and dot and table):
            raise ValueError(f"{pattern!r} is not a table. Write schema.table, schema.*, schema.part* or !schema.table")
        if "*" in schema and not pattern.startswith("!") and pattern != "*.*":
            raise ValueError(
                f"{pattern!r} is not a table: a schema's name takes no *. Write *.*, or one pattern for each schema"
            )
    if patterns and not taken(patterns):
        raise ValueError(
            f"{patterns[0]!r} has nothing to leave out. Name the tables to take before it, for example public.*"
        )


def taken(patterns: Iterable[str]) -> list[str]:
    """Return the patterns that take tables."""
    return [pattern for pattern in patterns if not pattern.startswith("!")]


def left_out(patterns: Iterable[str]) -> list[str]:
    """Return the patterns that exclude tables, without their exclamation mark."""
    return [pattern[1:] for pattern in patterns if pattern.startswith("!")]


def is_name(pattern: str) -> bool:
    """Return whether the pattern names one table."""
    return "*" not in pattern


def matches(pattern: str, topic: str) -> bool:
    """Return whether a pattern, without exclamation mark, matches `schema.table`."""
    return _compiled(pattern).fullmatch(topic) is not None


def take(patterns: Iterable[str], topic: str) -> bool:
    """Return whether the patterns take `schema.table`."""
    found = False
    for pattern in patterns:
        if pattern.startswith("!"):
            if matches(pattern[1:], topic):
                return False
        else:
            found = found or matches(pattern, topic)
    return found


def whole(patterns: Iterable[str]) -> list[str]:
    """Return the names to publish for these patterns: tables, `schema.*` and `*.*`.

    A publication can have a table, or all tables of a schema. For example, `sales.o_*` needs all of sales, and routing
    drops the changes of its other tables.
    """
    patterns = list(patterns)
    found = []
    for pattern in taken(patterns):
        if is_name(pattern):
            if take(patterns, pattern):
                found.append(pattern)
        else:
            found.append(f"{pattern.partition('.')[0]}.*")
    return list(dict.fromkeys(found))


def without(patterns: Iterable[str], published: Collection[str]) -> tuple[str, ...]:
    """Return the patterns without those that need one of the names in `published`.

    For example, `sales.o_*` needs `sales.*`, so it is removed if `published` contains `sales.*`.
    """
    return tuple(p for p in patterns if p not in published and not set(whole([p])) & set(published))


def like(pattern: str) -> str:
    """Return the pattern as SQL's LIKE takes it."""
    return _SPECIAL.sub(r"\\\g<0>", pattern).replace("*", "%")


@lru_cache(10_000)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)
