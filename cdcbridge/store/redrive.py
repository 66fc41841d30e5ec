"""Compare dead letters that a filter failed on with the consumer's filter of today. Part of the rim.

Only letters that match come back. For example, somebody renames the column `status`, so that `record.status == 'paid'`
fails on paid and unpaid orders alike. Each page is one transaction, so a killed command loses and repeats nothing.
This module must never remove a letter whose filter fails again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cdcbridge.database import Connection
from cdcbridge.database.patience import patiently
from cdcbridge.routing.dead_reasons import FILTER_ERROR
from cdcbridge.routing.judged import Logged
from cdcbridge.routing.subscription import Subscription
from cdcbridge.routing.verdict import Bury, Pass, verdict

PAGE: Final = 1000  # dead letters that are compared and brought back at a time
_AT_ONCE: Final = 50  # letters in memory: each may have `max_message_bytes`


@dataclass(slots=True)
class Redriven:
    """How many letters came back, were removed, and stay. `compared`: letters that the filter had failed on.

    why: the reason of the last letter that stays.
    """

    redriven: int = 0
    not_wanted: int = 0
    undecidable: int = 0
    compared: int = 0
    why: str = ""


@dataclass(slots=True)
class _Page:
    """The ids of a page's letters, by the verdict on each.

    left: (id, key, data) of rows that left the filter.
    """

    wanted: list[int] = field(default_factory=list)
    unwanted: list[int] = field(default_factory=list)
    left: list[tuple[int, str | None, str]] = field(default_factory=list)


def redrive_page(store: Connection, name: str, letters: Sequence[tuple[int, bool]], done: Redriven) -> None:
    """Bring one page of dead letters back, except those that the filter does not want, and count in `done`.

    letters: (id, whether the filter failed on it), in the order of the log.
    """
    page = _Page([letter for letter, failed in letters if not failed])
    failed = [letter for letter, failed in letters if failed]
    if failed:
        done.compared += len(failed)
        row = store.execute("select id, name, mode, config from show_consumer(%s)", (name,)).fetchone()
        if row is not None:
            # People bring letters back whatever their size is.
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
    """Put one letter where it belongs."""
    letter, topic, key, text, commit_lsn, ordinal, xid, log_key, old_key, columns = row
    if wanted.key is None:
        log_key = key  # known even where the segment is gone
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
