"""The pure ring: LSNs, units, keys, arrays, filters, routing, positions."""

from __future__ import annotations

import zlib

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.changes.events import Begin, Change, Commit, LogicalMessage, Relation, Truncate
from cdcbridge.changes.keys import key_text, partition_of
from cdcbridge.changes.pgtypes import parse_array, text
from cdcbridge.changes.position import START, Position, Progress
from cdcbridge.errors import DecodeError, IdentityLost
from cdcbridge.lsn import format_lsn, parse_lsn
from cdcbridge.routing.collector import Collector
from cdcbridge.routing.copy_format import CHUNK_SIZE, chunk_rows, message_rows
from cdcbridge.routing.filters import Filter, FilterError
from cdcbridge.routing.router import OPERATIONS, Router
from cdcbridge.routing.subscription import Subscription
from cdcbridge.units import format_duration, format_size, parse_duration, parse_size


@given(st.integers(0, (1 << 64) - 1))
def test_an_lsn_survives_its_text(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


@pytest.mark.parametrize("bad", ["", "1", "1/", "/1", "1/2/3", "g/0", "123456789/0", " 0/0"])
def test_what_is_no_lsn_is_named(bad: str) -> None:
    with pytest.raises(ValueError, match="not an LSN"):
        parse_lsn(bad)


@pytest.mark.parametrize(
    ("text_", "seconds"), [("500ms", 0.5), ("30s", 30), ("10m", 600), ("2h", 7200), ("7d", 604800)]
)
def test_durations(text_: str, seconds: float) -> None:
    assert parse_duration(text_) == seconds
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize("bad", ["30", "s", "-1s", "1 year", "", None, 30, "1e3s"])
def test_bad_durations_are_named(bad: object) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(bad)


@pytest.mark.parametrize(("text_", "size"), [("1kB", 1024), ("10GB", 10 << 30), ("1.5MB", 3 << 19), (7, 7), ("5B", 5)])
def test_sizes_count_as_in_postgresql(text_: object, size: int) -> None:
    assert parse_size(text_) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("bad", ["1", "1KB", "1gb", -1, True, None])
def test_bad_sizes_are_named(bad: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(bad)


def test_keys_are_texts_or_compact_arrays_of_texts() -> None:
    row = {"i": 1, "t": 'a"b', "n": None, "b": True, "m": orjson.Fragment(b"12.50"), "m2": None}
    assert key_text(row, ("i",)) == "1"
    assert key_text(row, ("t",)) == 'a"b'
    assert key_text(row, ("b",)) == "true"
    assert key_text(row, ("m",)) == "12.50"
    assert key_text(row, ("i", "t", "n")) == '["1","a\\"b",null]'
    assert key_text(row, ("n",)) is key_text(row, ("n", "m2")) is key_text(row, None) is key_text(None, ("i",)) is None


def test_the_partition_is_crc32_of_the_key() -> None:
    assert zlib.crc32(b"123456789") == 0xCBF43926, "the check value of CRC-32"
    assert partition_of(b"123456789", 16) == 0xCBF43926 % 16
    assert partition_of(None, 16) == 0


elements = st.none() | st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def array_text(value: object, mark: str = ",") -> str:
    """An array as array_out writes it, quoting everything."""
    if isinstance(value, list):
        return "{" + mark.join(array_text(v, mark) for v in value) + "}"
    return "NULL" if value is None else '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(st.lists(elements) | st.lists(st.lists(elements, min_size=2, max_size=2), min_size=1))
def test_an_array_survives_its_text(value: list[object]) -> None:
    assert parse_array(array_text(value).encode(), text) == value
    assert parse_array(b"[0:9]=" + array_text(value).encode(), text) == value


@given(
    st.lists(elements) | st.lists(st.lists(elements, min_size=2, max_size=2), min_size=1),
    st.characters(min_codepoint=1, max_codepoint=126, exclude_characters='"{}'),
)
def test_an_array_may_have_any_delimiter(value: list[object], mark: str) -> None:
    assert parse_array(array_text(value, mark).encode(), text, mark.encode()) == value


@given(st.binary(max_size=30), st.sampled_from([b",", b":", b"\\", b"]", b"^", b"-"]))
def test_what_is_no_array_is_a_value_error(rubbish: bytes, mark: bytes) -> None:
    try:
        assert isinstance(parse_array(rubbish, lambda value: value, mark), list)
    except ValueError:
        pass


# filters

COMPLETE = {"op": "insert", "topic": "public.t", "key": "1", "record": {"a": 1, "s": "paid"}, "old": None, "meta": {}}


def wants(source: str, *unchanged: str, **changed: object) -> bool:
    return Filter(source).wants({**COMPLETE, **changed}, unchanged)


@pytest.mark.parametrize("source", [
    "record.tags[0] == 'x'", "record.tags[-1] == 'x'", "record.absent == 1", "int(record.s) > 0", "record.a / 0 > 1",
    "record[record.s] == 2", "record.s.matches(record.s)", "record.s", "timestamp(record.s) > timestamp(record.s)",
    "duration(record.s) > duration('1s')", "record.big * record.big > 0", "record.a.map(x, x.y) == []",
])  # fmt: skip
def test_a_filter_that_fails_says_so_in_a_text_that_postgresql_takes(source: str) -> None:
    record = {"a": 1, "s": "(\0", "tags": [], "big": 1 << 62}
    with pytest.raises(FilterError) as raised:
        wants(source, record=record)
    assert "\0" not in str(raised.value)


def test_a_filter_decides_on_what_is_there() -> None:
    assert wants("record.s == 'paid' && op in ['insert', 'update']")
    assert not wants("record.s == 'open'")
    assert wants("record.a > 0.5") and wants("key == '1'") and wants("topic.startsWith('public.')")
    assert wants("old == null") and not wants("has(record.nothing)")


def test_a_filter_that_reads_what_the_wal_did_not_carry_delivers() -> None:
    update = {"op": "update", "record": {"a": 1}}
    assert wants("record.s == 'paid'", "s", **update)
    assert wants("has(record.s)", "s", **update)
    assert wants("'s' in record", "s", **update)
    assert wants("has(record.s) && record.s == 'x'", "s", **update)
    assert not wants("record.a == 2 && record.s == 'paid'", "s", **update), "false whatever s is"
    assert wants("record.s == 'paid'", op="delete", record={"a": 1})
    assert not wants("record.a == 2", op="delete", record={"a": 1})
    assert wants("record.s == 'paid'", op="truncate", record=None)
    assert not wants("op == 'insert'", op="truncate", record=None)
    assert wants("old.s != record.s"), "an insert has no old"


@pytest.mark.parametrize(
    "source", ["record.nothing == 1", "int(record.s) > 1", "record.s > 1", "record.a", "1 / 0 == 1"]
)
def test_a_filter_that_fails_on_values_that_are_there_is_an_error(source: str) -> None:
    with pytest.raises(FilterError):
        wants(source)


@pytest.mark.parametrize("source", ["record.a ==", "rec.a == 1", "nofunction(record.a)", "", "record.a = 1"])
def test_what_is_no_filter_is_refused(source: str) -> None:
    with pytest.raises(ValueError):
        Filter(source)


# routing and collecting

T = Relation("public", "t", "public.t", ("id",), frozenset({"id"}))


def subscription(number: int, *tables: str, **given_: object) -> Subscription:
    return Subscription(number, f"c{number}", tables, frozenset(OPERATIONS), **given_)  # type: ignore[arg-type]


def test_patterns_match_tables_schemas_and_everything_but_our_own() -> None:
    router = Router(
        [subscription(1, "public.t"), subscription(2, "public.*"), subscription(3, "*.*"), subscription(4, "x.t")]
    )
    assert [s.consumer_id for s in router.subscriptions("public", "t")] == [1, 2, 3]
    assert [s.consumer_id for s in router.subscriptions("x", "t")] == [3, 4]
    assert router.subscriptions("cdcbridge", "messages") == []
    both = Router([subscription(1, "public.t", "public.*")])
    assert len(both.subscriptions("public", "t")) == 1, "a consumer gets a message once"


def collector(done: Position = START, *subscriptions: Subscription) -> Collector:
    return Collector(Router(subscriptions or [subscription(1, "public.t")]), 16, done, 0)


def transaction(lsn: int, count: int) -> list[object]:
    changes = [Change("insert", T, {"id": n}) for n in range(count)]
    return [Begin(lsn, 7, 0), *changes, Commit(lsn + 1, lsn)]


def feed(into: Collector, events: list[object]) -> None:
    into.feed(events)  # type: ignore[arg-type]


@given(st.integers(0, 7), st.integers(0, 7))
def test_a_restart_anywhere_gives_each_change_once(cut: int, size: int) -> None:
    """Cut the stream anywhere, take what is there, start again from that position with the transaction sent anew."""
    first = collector()
    feed(first, [*transaction(100, size), *transaction(200, 3)][:cut])
    batch = first.take()
    second = collector(batch.position)
    feed(second, [*transaction(100, size), *transaction(200, 3)])
    again = second.take()
    assert len(batch.rows) + len(again.rows) == size + 3
    assert again.position == (200, 2)


def test_ordinals_count_all_that_the_plugin_sent() -> None:
    one = collector()
    other = Relation("public", "u", "public.u", None, frozenset({"id"}))
    feed(one, [
        Begin(10, 7, 0), Change("insert", other, {}), LogicalMessage(True, "p", b"", 5), Truncate((T,), 3),
        Change("insert", T, {"id": 1}), Commit(11, 10),
    ])  # fmt: skip
    batch = one.take()
    assert [int.from_bytes(row[4:8]) for row in batch.rows] == [2, 5]
    assert (batch.position, batch.end_lsn, batch.open) == ((10, 5), 11, False)


def test_an_open_transaction_is_never_reported_as_ended() -> None:
    one = collector()
    feed(one, [*transaction(10, 1), *transaction(20, 2)[:2]])
    batch = one.take()
    assert (batch.position, batch.end_lsn, batch.open) == ((20, 0), 11, True)


@pytest.mark.parametrize("events", [
    [Change("insert", T, {"id": 1})], [Commit(1, 1)], [Begin(1, 1, 1), Begin(2, 2, 2)], [Begin(None, 1, 1)],
])  # fmt: skip
def test_events_out_of_order_are_a_decode_error(events: list[object]) -> None:
    with pytest.raises(DecodeError):
        feed(collector(), events)


def test_a_table_that_lost_its_identity_ends_the_session() -> None:
    with pytest.raises(IdentityLost, match="has lost its replica identity"):
        feed(collector(), [Begin(1, 1, 1), Relation("public", "t", "public.t", None, frozenset())])


def test_progress_only_rises_and_never_stores_what_was_not_received() -> None:
    progress = Progress(10, 10, 10, 10)
    progress.receive(20)
    progress.receive(15)
    progress.stored(20)
    progress.stored(12)
    assert progress.confirm() == 10, "nobody has vouched for it"
    progress.vouch(20)
    assert progress.confirm() == 20
    with pytest.raises(ValueError, match="durable only up to"):
        progress.vouch(21)
    with pytest.raises(ValueError, match="received only up to"):
        progress.stored(21)


def test_fan_out_rows_are_small_for_small_appends_and_shared_for_large_ones() -> None:
    def rows(count: int) -> int:
        data, position, found = chunk_rows((1,), range(1, count + 1), None, count), 0, 0
        while position < len(data):
            position += 2 + 4 + 4 + 4 + 8
            for _ in range(2):
                size = int.from_bytes(data[position : position + 4], signed=True)
                position += 4 + max(size, 0)
            found += 1
        return found

    assert rows(100) == 100
    assert rows(1000) == 1000 / CHUNK_SIZE


def test_500_consumers_on_500_tables_cost_as_one() -> None:
    """Routing looks at the consumers of the table, not at all: a plan per relation, found by one look-up."""
    router = Router([subscription(n, f"public.t{n}") for n in range(500)])
    relation = Relation("public", "t7", "public.t7", None, frozenset())
    plan = router.plan(relation, "insert")
    assert plan is not None and plan.plain == (7,) and plan.special == ()
    assert router.plan(relation, "insert") is plan


def test_an_oversized_message_dies_for_one_consumer_and_reaches_the_other() -> None:
    one = collector(START, subscription(1, "public.t", max_bytes=30), subscription(2, "public.t"))
    feed(one, transaction(10, 1))
    batch = one.take()
    size = len(orjson.dumps({"op": "insert", "record": {"id": 0}, "old": None, "unchanged": []}))
    assert batch.dead == [(1, 0, f"oversized: data has {size} bytes, max_message_bytes is 30", "0")]
    assert batch.groups == {(2,): [0]}


def test_rows_of_a_partition_stand_beside_each_other_where_groups_read_and_keep_their_seqs() -> None:
    rows = [b"<%d>" % n for n in range(5)]
    plain = message_rows(rows, 100)
    grouped = message_rows(rows, 100, [1, 0, 1, 0, 2])
    pieces = {n: plain[plain.index(rows[n]) - 14 : plain.index(rows[n]) + 3] for n in range(5)}
    assert grouped == b"".join(pieces[n] for n in (1, 3, 0, 2, 4))
