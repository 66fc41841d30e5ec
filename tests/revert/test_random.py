"""1,000 random transactions are undone, and the tables are as before."""

from __future__ import annotations

import random

import pytest

from cdcbridge.database import connect_store
from cdcbridge.revert.selection import Selection
from cdcbridge.revert.undo import apply, prepare
from tests.harness.world import World
from tests.revert.conftest import caught_up, checksum
from tests.revert.workload import SETUP, TABLES, Workload

TRANSACTIONS = 1000


@pytest.mark.timeout(900)  # 6,000 changes, each with a look at its row
def test_a_thousand_random_transactions_are_undone(world: World) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    world.execute(*SETUP)
    world.consumer(tables=tuple(f"public.{name}" for name in TABLES), mode="stream")
    with world.bridge():
        work = Workload(world.sql, seed, nan=world.plugin == "pgoutput")
        for _ in range(200):
            work.transaction()
        first = caught_up(world)
        before = checksum(world, *TABLES)
        for _ in range(TRANSACTIONS):
            work.transaction()
        last = caught_up(world)
        assert checksum(world, *TABLES) != before and last - first > TRANSACTIONS
        config = world.config()
        seqs = tuple(seq for (seq,) in world.rows("select seq from messages where seq > %s order by seq", first))
        with connect_store(config.store_dsn, config.store.schema_, "test") as store:
            found = prepare(config, store, Selection(seqs=seqs), force=False)
            assert not found.plan.problems
            assert found.reverts == {"first_seq": min(seqs), "last_seq": max(seqs), "changes": len(seqs)}  # short
            assert not found.plan.conflicts, found.plan.conflicts[0].conflict
            apply(config, found, force=False)
    assert checksum(world, *TABLES) == before
