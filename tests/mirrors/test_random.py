"""Random writes on both sides at once: in the end both are equal, and nothing was lost unseen and unlisted."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest

from tests.mirrors.pair import Pair
from tests.mirrors.workload import SCHEMA, Ledger, Writer, examine, seed_of

TRANSACTIONS = 25


def prepare(pair: Pair, **settings: Any) -> None:
    """Make the tables on both sides, and declare both mirrors."""
    pair.both(*SCHEMA)
    pair.two_way(**{"create_tables": False, **settings})


def write_on_both(pair: Pair, seed: int, transactions: int = TRANSACTIONS) -> Ledger:
    """Two writers on each side, until all have written their transactions."""
    ledger = Ledger()
    writers = [
        Writer(2 * number + n, partial(getattr, side, "dsn"), ledger, seed, transactions=transactions)
        for number, side in enumerate(pair.sides)
        for n in range(2)
    ]
    for writer in writers:
        writer.finish()
    return ledger


def judge(pair: Pair, ledger: Ledger) -> None:
    """All promises of docs/TWO_WAY.md, once everything is applied."""
    pair.settle()
    found = examine([side.sql for side in pair.sides], ledger)
    print(
        f"{found.writes} writes, {found.conflicts} conflicts, {found.held} held, {ledger.refused} refused", flush=True
    )
    assert not found.wrong, (len(found.wrong), found.wrong[:10])
    assert found.writes > 100


def marks(pair: Pair) -> list[Any]:
    """What moves when anything is logged or applied on either side."""
    return [
        (side.value("select last_value from messages_seq"), side.rows("select mirror, id, seq from mirror_places"))
        for side in pair.sides
    ]


@pytest.mark.parametrize("versions", ["pair18", "pair15"])
def test_both_sides_end_equal_and_nothing_loops(versions: str, request: pytest.FixtureRequest) -> None:
    pair: Pair = request.getfixturevalue(versions)
    seed = seed_of()
    prepare(pair)
    with pair.running():
        ledger = write_on_both(pair, seed)
        judge(pair, ledger)
        before = marks(pair)
        time.sleep(2)  # nothing may happen, so there is nothing to wait for
        assert marks(pair) == before


@pytest.mark.parametrize(("rule", "back"), [("prefer_source", "prefer_target"), ("hold", "hold")])
def test_each_rule_keeps_its_promise(pair18: Pair, rule: str, back: str) -> None:
    seed = seed_of()
    prepare(pair18, conflict=rule)
    pair18.b.mirrors[0]["conflict"] = back
    with pair18.running():
        judge(pair18, write_on_both(pair18, seed, 15))
