"""The manual's table of locks has a row for each command that a test runs beside open transactions, and says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cdcbridge.database import patience
from tests.integration import test_locks
from tests.integration.test_locks import COMMANDS, DUMP, PUBLISHER, RECEIVER
from tests.sql import test_end_of_segment

MANUAL: Final = Path(__file__).parents[2] / "docs" / "OPERATIONS.md"
Test = Callable[..., Any]

# The row's first column → the commands of test_locks.COMMANDS, other tests.
ROWS: Final[dict[str, tuple[tuple[str, ...], tuple[Test, ...]]]] = {
    "any change of consumers": ((), (test_locks.test_a_change_of_consumers_names_another_that_is_under_way,)),
    "`consumers apply`: a new queue": (
        ("apply a queue", "apply a fifo", "apply one that takes tables from the beginning", "apply a change"), (),
    ),
    "… its last step": (("apply a queue",), ()),
    "… with `start: earliest` and `topics`": (("apply one with start: earliest",), ()),
    "… the first stream": (
        ("apply the first stream",), (test_locks.test_a_bridge_that_starts_names_the_publisher_that_it_waits_for,),
    ),
    "`consumers remove`": (("remove a queue",), (test_locks.test_remove_beside_an_idle_receiver,)),
    "… of a stream": (("remove a stream",), ()),
    "`consumers pause`, `resume`": (("pause",), ()),
    "`consumers replay`": (("replay",), ()),
    "`offsets seek`": (
        ("seek",),
        (test_locks.test_seek_beside_an_idle_reader_names_it, test_locks.test_seek_holds_no_partition_while_it_waits_for_another),
    ),
    "`backfill start`": (("backfill start",), ()),
    "`backfill pause`, `resume`, `cancel`": (("backfill cancel",), ()),
    "retention": (("retention",), ()),
    "compaction": (("compaction",), ()),
    "change of `store.partitions`": (("change of partitions",), ()),
    "a new segment, by the bridge or a publisher": (
        ("create segments",),
        (test_end_of_segment.test_the_one_who_makes_it_is_named, test_end_of_segment.test_a_bridge_beside_a_publisher_that_makes_a_segment),
    ),
    "`publish` with a `dedup_id`": ((), (test_locks.test_publish_with_a_dedup_id_names_the_open_publisher_of_the_same_one,)),
    "migration, new functions": (("migrate the code",), ()),
    "migration of a table": (("migrate a table",), ()),
    "housekeeping (expired deliveries, hints, dedup ids)": (
        (), (test_locks.test_housekeeping_passes_by_what_a_receiver_in_its_transaction_has_replaced,),
    ),
}  # fmt: skip
# How the column "waits for" names those that test_locks keeps in their transactions.
HOLDERS: Final = {
    RECEIVER: ("receivers", "members that read in a transaction"),
    PUBLISHER: ("publishers",),
    DUMP: ("pg_dump",),
}
# A further stream needs no index any more, so nobody has to end for it.
UNLISTED: Final = {"apply a stream"}


def table() -> list[list[str]]:
    lines = MANUAL.read_text().splitlines()
    start = lines.index("| command | lock | on | waits for | at a time | who waits meanwhile |")
    rows = lines[start + 2 : lines.index("", start)]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_manual_has_a_row_for_each_command_that_is_tried() -> None:
    assert [row[0] for row in table()] == list(ROWS)
    assert all(commands or tests for commands, tests in ROWS.values()), "each row has a test"
    assert {name for commands, _ in ROWS.values() for name in commands} == set(COMMANDS) - UNLISTED


def test_each_command_waits_for_those_that_the_manual_names() -> None:
    said = ""
    for command, _, _, waits_for, *_ in table():
        if waits_for != "the same":
            said = waits_for
        named = {holder for holder, words in HOLDERS.items() if any(word in said for word in words)}
        for name in ROWS[command][0]:
            assert COMMANDS[name][1] == named, f"{name}: the manual says that it waits for {said}"


def test_a_command_tries_for_as_long_as_the_page_says() -> None:
    assert patience.PATIENCE == 30
    assert "for 30 s" in MANUAL.read_text()
