"""What a snapshot sees, and what a watch remembers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.routing.overtaken import EARLY_LIMIT, Snapshot, Watch
from cdcbridge.routing.router import OPERATIONS
from cdcbridge.routing.subscription import Subscription

WIDE = st.integers(min_value=3, max_value=1 << 40)


@given(
    xmin=WIDE, span=st.integers(0, 1000), running=st.sets(st.integers(0, 999)), offset=st.integers(-(1 << 30), 1 << 30)
)
def test_a_snapshot_sees_what_had_committed_whatever_the_epoch(
    xmin: int, span: int, running: set[int], offset: int
) -> None:
    xmax = xmin + span
    listed = {xmin + n for n in running if n < span}
    snapshot = Snapshot.parse(f"{xmin}:{xmax}:{','.join(map(str, listed))}")
    xid = max(3, xmin + offset)
    assert snapshot.sees(xid % (1 << 32)) == (xid < xmax and xid not in listed)
    assert snapshot.certain().sees(xid % (1 << 32)) == (xid < xmin)


def watch() -> Watch:
    return Watch(Subscription(1, "c", ("public.t",), frozenset(OPERATIONS)), "public.t")


def test_only_what_a_snapshot_does_not_see_is_stale() -> None:
    watched = watch()
    watched.note("insert", ("a", None), 10)
    watched.note("update", ("new", "old"), 12)
    assert watched.begin() is not None
    watched.early = frozenset()
    stale = watched.stale(Snapshot.parse("11:13:12"))
    assert [key in stale for key in ("a", "new", "old", "b")] == [False, True, True, False]
    assert "new" not in watched.stale(Snapshot.parse("13:13:"))
    watched.note("truncate", (None,), 14)
    assert "b" in watched.stale(Snapshot.parse("14:14:"))
    assert "b" not in watched.stale(Snapshot.parse("15:15:"))


def test_operations_that_the_consumer_does_not_take_change_nothing_for_it() -> None:
    watched = Watch(Subscription(1, "c", ("public.t",), frozenset({"insert"})), "public.t")
    watched.note("update", ("a", None), 10)
    assert "a" not in watched.stale(Snapshot.parse("5:5:"))


def test_what_came_before_the_first_rows_is_remembered_and_bounded() -> None:
    watched = watch()
    watched.before = frozenset({"earlier"})
    watched.note("insert", ("a", None), 10)
    assert set(watched.begin()) == {"earlier", "a", None}
    assert "a" in watched.stale(Snapshot.parse("20:20:")), "though every snapshot sees it by now"
    long = watch()
    long.visible = Snapshot.parse("50:50:")
    for n in range(EARLY_LIMIT + 10):
        long.note("insert", (str(n), None), 10)
    assert len(long.changed) < EARLY_LIMIT, "what every snapshot sees is forgotten while it waits"
