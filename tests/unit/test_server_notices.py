"""Notices of wal2json in the stream: each dropped change opens one gap, and stops nobody else."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from cdcbridge.changes.events import Begin, Relation
from cdcbridge.changes.position import START
from cdcbridge.errors import DecodeError
from cdcbridge.routing.collector import Collector
from cdcbridge.routing.dropped_changes import Missing
from cdcbridge.routing.router import OPERATIONS, Router
from cdcbridge.routing.server_notices import Notices
from cdcbridge.routing.subscription import Subscription

T = Relation("public", "t", "public.t", None, frozenset())


class Stream:
    """A collector inside a transaction, and the notices that come before its next message."""

    def __init__(self, *operations: str, left_out: tuple[str, ...] = (), begun: bool = True) -> None:
        wanted = Subscription(1, "c", ("public.t",), frozenset(operations or OPERATIONS))
        router = Router([wanted])
        self.collector = Collector(router, 16, START, 0)
        if begun:
            self.collector.feed([Begin(256, 7, 0)])
        self.notices = Notices(
            self.collector, router, lambda schema, table, _: T if table == "t" else None, left_out, Missing()
        )

    def take(self, *notices: str) -> list[bytes]:
        for notice in notices:
            self.notices.note(notice)
        return list(self.notices.heeded(iter([b"next", b"and next"])))


def dropped(action: str = "UPDATE", table: str = "t") -> str:
    return f'WARNING: no tuple identifier for {action} in table "public"."{table}"'


@pytest.mark.parametrize("actions", [("UPDATE",), ("DELETE",), ("UPDATE", "DELETE", "UPDATE")])
def test_a_dropped_change_opens_one_gap_and_the_session_starts_again(actions: tuple[str, ...]) -> None:
    stream = Stream()
    with capture_logs() as lines:
        assert stream.take(*map(dropped, actions)) == [b"next", b"and next"]
    batch = stream.collector.take()
    assert batch.gap and len(batch.rows) == 1 and batch.capture == {"missing": {"public.t": [256, None]}}
    assert stream.notices.reason == "updates or deletes of public.t are missing. The bridge starts again without them"
    (line,) = lines
    assert (line["event"], line["first"], line["consumers"]) == ("changes.missing", actions[0], ["c"])
    assert line["fix"].startswith('alter table "public"."t" replica identity full;')


@pytest.mark.parametrize(
    ("operations", "notice"),
    [
        (("insert",), dropped()),  # nobody takes its updates
        (("insert", "delete"), dropped("UPDATE")),
        ((), dropped(table="u")),  # nobody takes the table
    ],
)
def test_a_change_that_nobody_takes_leaves_no_gap(operations: tuple[str, ...], notice: str) -> None:
    stream = Stream(*operations)
    assert stream.take(notice) == [b"next", b"and next"]
    assert stream.collector.take().rows == [] and stream.notices.reason == ""


def test_a_table_that_is_known_to_have_no_identity_starts_no_session() -> None:
    stream = Stream(left_out=("public.t",))
    stream.take(dropped())
    assert stream.collector.take().gap and stream.notices.reason == ""


def test_another_notice_is_logged_and_heeded_once() -> None:
    stream = Stream()
    with capture_logs() as lines:
        stream.take("something else")
        stream.take()
    assert [(line["event"], line["message"]) for line in lines] == [("source.notice", "something else")]


def test_a_dropped_change_outside_a_transaction_is_a_decode_error() -> None:
    with pytest.raises(DecodeError, match=r"a dropped UPDATE of public\.t outside a transaction"):
        Stream(begun=False).take(dropped())
