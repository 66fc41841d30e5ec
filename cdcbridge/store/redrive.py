"""Redrive dead letters on which a filter failed: compare each one with the consumer's present filter.

Only letters that match are redriven. For example, a user renames the column `status`, so that `record.status == 'paid'`
fails on paid and unpaid orders alike. With a corrected filter only the paid orders are redriven. Each page is one
transaction, so a killed command loses and repeats nothing. This module must never remove a letter on which the filter
fails again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cdcbridge.database import Connection
from cdcbridge.database.patience import patiently
from cdcbridge.routing.dead_reasons import FILTER_ERROR
from cdcbridge.routing.judged import Logged
from cdcbridge.routing.subscription import Subscription
from cdcbridge.routing.verdict import Bury, Pass, verdict

PAGE: Final = 1000  # dead letters that are compared and redriven at a time
_AT_ONCE: Final = 50  # letters in memory at a time: each may have `max_message_bytes`


@dataclass(slots=True)
class Redriven:
    """The counts of a redrive.

    Attributes:
        redriven: Letters that were put back into the queue.
        not_wanted: Letters that were removed, because the filter does not match them.
        undecidable: Letters that remain, because the filter fails on them again.
        compared: Letters on which the filter had failed before.
        why: The reason of the last letter that remains.
    """

    redriven: int = 0
    not_wanted: int = 0
    undecidable: int = 0
    compared: int = 0
    why: str = ""


@dataclass(slots=True)
class _Page:
    """The ids of a page's letters, by verdict.

    Attributes:
        left: The id, key and data of each row that left the filter.
    """

    wanted: list[int] = field(default_factory=list)
    unwanted: list[int] = field(default_factory=list)
    left: list[tuple[int, str | None, str]] = field(default_factory=list)


def redrive_chosen(store: Connection, name: str, filters: Mapping[str, str | None]) -> Redriven:
    """Redrive all dead letters that the filters choose, except those that the consumer's filter does not match.

    Args:
        store: A session on the store.
        name: The consumer's name.
        filters: The `topic`, `key` and beginning of the `reason` of the letters. None matches every letter.
    """
    done = Redriven()
    letters = chosen_letters(store, name, filters)
    for start in range(0, len(letters), PAGE):
        redrive_page(store, name, letters[start : start + PAGE], done)
    return done


def chosen_letters(store: Connection, name: str, filters: Mapping[str, str | None]) -> list[tuple[int, bool]]:
    """Return the id of each letter that the filters choose, and whether the filter failed on it, in log order."""
    query = "select id, filter_failed from dead_ids(%(name)s, %(topic)s, %(key)s, %(reason)s)"
    return [(row[0], row[1]) for row in store.execute(query, {"name": name, **filters})]


def redrive_page(store: Connection, name: str, letters: Sequence[tuple[int, bool]], done: Redriven) -> None:
    """Redrive one page of dead letters, except those that the filter does not match.

    Args:
        store: A session on the store.
        name: The consumer's name.
        letters: The id of each letter, and whether the filter failed on it, in the order of the log.
        done: The counts, to which this page is added.
    """
    page = _Page([letter for letter, failed in letters if not failed])
    failed = [letter for letter, failed in letters if failed]
    if failed:
        done.compared += len(failed)
        row = store.execute("select id, name, mode, config from show_consumer(%s)", (name,)).fetchone()
        if row is not None:
            # Operators may redrive letters of any size.
            wanted = replace(Subscription.from_config(*row), max_bytes=sys.maxsize)
            _compare(store, wanted, failed, page, done)
    ids, keys, documents = ([entry[n] for entry in page.left] for n in range(3))
    given = (name, page.wanted, page.unwanted, ids, keys, documents)
    counts = patiently(
        store,
        lambda: store.execute(
            "select redriven, removed from redrive_compared(%s, %s::bigint[], %s::bigint[], %s::bigint[], %s::text[],"
            " %s::text[])",
            given,
        ).fetchone(),
        what=f"dead redrive {name}",
    )
    redriven, removed = counts or (0, 0)
    done.redriven += redriven
    done.not_wanted += removed


def _compare(store: Connection, wanted: Subscription, ids: list[int], page: _Page, done: Redriven) -> None:
    with store.transaction(), store.cursor(name="cdcbridge_compare") as letters:
        letters.itersize = _AT_ONCE
        letters.execute("select * from dead_to_compare(%s, %s::bigint[])", (wanted.name, ids))
        for row in letters:
            _decide(wanted, row, page, done)


def _decide(wanted: Subscription, row: Sequence[Any], page: _Page, done: Redriven) -> None:
    """Add one letter to the part of the page that its verdict requires."""
    letter, topic, key, text, commit_lsn, ordinal, xid, log_key, old_key, columns = row
    if wanted.key is None:
        log_key = key  # the same key, and present even if the log's segment was dropped
    identity = frozenset(columns or ())
    said = verdict(wanted, Logged(text, topic, log_key, commit_lsn, ordinal, xid, old_key, key, identity))
    if isinstance(said, Pass):
        page.unwanted.append(letter)
    elif isinstance(said, Bury):
        done.undecidable += 1
        done.why = said.reason.removeprefix(FILTER_ERROR)
    elif said.data is not None:
        page.left.append((letter, said.key, said.data.decode()))
    else:
        page.wanted.append(letter)
