"""The manual's table of the ways in which a handler can end has a row for each way that a test tries, and no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.harness import misbehaving
from tests.integration import test_client, test_client_handlers, test_client_loss, test_client_order

MANUAL: Final = Path(__file__).parents[2] / "docs" / "CONSUMERS.md"
CLIENT: Final = Path(__file__).parents[2] / "cdcbridge" / "client"
Test = Callable[..., Any]

# The row's first column → the ways of test_client_handlers.WAYS, those of misbehaving.WAYS (`make soak`), other tests.
ROWS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[Test, ...]]]] = {
    "returns": (("returns",), ("returns",), ()),
    "returns, and the delivery had expired": (("loses its delivery",), (), ()),
    "raises an exception": (("raises",), ("raises",), ()),
    "raises one whose text has NUL or half of a surrogate pair": (
        ("raises with NUL", "raises with half a pair"), ("raises_with_nul", "raises_with_surrogate"), (),
    ),
    "raises one whose `__str__` fails": (("raises without words",), ("raises_without_text",), ()),
    "raises `CancelledError` or `GeneratorExit`": (("CancelledError", "GeneratorExit"), (), ()),
    "calls `sys.exit()`, or raises `KeyboardInterrupt`": (
        (), ("exits",), (test_client_handlers.test_a_handler_that_ends_the_program_gives_its_message_back_first,),
    ),
    "acks, then returns": (("acks and returns",), ("acks_inside", "acks_with_its_effect", "acks_in_serializable"), ()),
    "acks, then raises": (("acks and raises",), ("acks_inside",), ()),
    "nacks, then returns or raises": (("nacks and returns", "nacks and raises"), ("nacks_inside",), ()),
    "acks in its own transaction, which is rolled back": (
        (), ("acks_and_rolls_back",),
        (test_client_order.test_a_worker_whose_ack_is_rolled_back,
         test_client_order.test_a_block_that_raises_after_its_ack_gives_the_message_back),
    ),
    "returns a coroutine or a generator": (
        (), (), (test_client_handlers.test_a_handler_that_returns_a_coroutine_has_not_handled_anything,),
    ),
    "reads `message.data` that Python cannot hold": (
        (), (), (test_client_handlers.test_one_bad_document_concerns_its_message_alone,),
    ),
    "runs for longer than its lease": ((), ("dawdles",), (test_client.test_long_work_is_extended,)),
    "runs while its lease is lost (another session gave the message back, or the process was stopped)": (
        ("loses its delivery and raises",), (),
        (test_client_handlers.test_a_lease_that_is_lost_under_its_handler_is_told,),
    ),
    "ends while the database is away": (
        (), (), (test_client_loss.test_a_worker_handles_once_although_the_database_was_away,),
    ),
    "outlives `grace` after a stop": (
        (), (), (test_client_handlers.test_a_handler_that_outlives_the_grace_comes_again_and_the_rest_is_given_back,),
    ),
    "is killed with its process": (
        (), ("is_killed",), (test_client_handlers.test_a_handler_that_is_killed_leaves_its_message_to_the_timeout,),
    ),
}  # fmt: skip


def table() -> list[list[str]]:
    lines = MANUAL.read_text().splitlines()
    start = lines.index("| the handler | its message | the log says | the worker |")
    rows = lines[start + 2 : lines.index("", start)]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_manual_has_a_row_for_each_way_that_is_tried() -> None:
    assert [row[0] for row in table()] == list(ROWS)
    assert all(len(row) == 4 and all(row) for row in table()), "each way has its behaviour and its log line"
    assert all(any(tried) for tried in ROWS.values()), "each way has a test"


def test_each_way_that_is_tried_has_its_row() -> None:
    assert {way for ways, _, _ in ROWS.values() for way in ways} == set(test_client_handlers.WAYS)
    assert {way for _, ways, _ in ROWS.values() for way in ways} == set(misbehaving.WAYS)


def test_the_log_lines_are_those_of_the_client() -> None:
    source = " ".join(path.read_text() for path in sorted(CLIENT.glob("*.py")))
    quoted = {line for row in table() for line in re.findall("`([^`]+)`", row[2])}
    assert len(quoted) >= 5
    for line in quoted:
        pattern = re.escape(line).replace(r"message\ N\ of\ C", r"message\ \S+\ of\ \S+").replace("a\\ coroutine", ".*")
        assert re.search(pattern, source), f"the client does not log {line!r}"
