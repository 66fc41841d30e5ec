"""A mirror that ends in an orderly way, in the middle of its work."""

from __future__ import annotations

from cdcbridge import instants
from cdcbridge.instants import AnyInstant
from cdcbridge.mirrors.applier import Applier
from cdcbridge.mirrors.log_reader import CHUNK_ROWS
from tests.harness.world import PATIENCE, eventually
from tests.mirrors.pair import Pair

ROWS = 2 * CHUNK_ROWS + 7


def test_a_mirror_that_ends_inside_a_large_transaction_loses_nothing(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both("create table t (id int primary key)")
    pair18.mirror(start="now")
    config = a.config()
    with a.bridge():
        a.execute(f"insert into t select generate_series(1, {ROWS})")
        eventually(lambda: a.value("select count(*) from messages") == ROWS, "the log")
        first = Applier(config, config.mirrors[0])

        def end(instant: AnyInstant) -> None:
            if instant == "mirror applied":
                first.stop()

        instants.listen(end)
        try:
            first.start()
            assert first.join(PATIENCE)
        finally:
            instants.listen(None)
        assert b.sql.execute("select count(*) from t").fetchone() == (0,)
        with Applier(config, config.mirrors[0]):
            eventually(lambda: b.sql.execute("select count(*) from t").fetchone() == (ROWS,), "all rows")
    assert pair18.conflicts(b) == []
