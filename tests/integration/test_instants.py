"""Each named instant is reached by a running bridge, and is where a test kills one."""

from __future__ import annotations

from pathlib import Path

from cdcbridge import instants
from cdcbridge.instants import INSTANTS, AnyInstant
from tests.harness.world import World, eventually

TESTS = Path(__file__).parents[1]


def test_a_running_bridge_reaches_each_instant(world: World) -> None:
    world.execute("create table t (id int primary key)")
    world.consumer("one")
    with world.bridge():
        world.execute("insert into t select generate_series(1, 10)")
        world.messages(10)
    world.consumer("from_log", start="earliest")
    world.consumer("from_table", start="snapshot")
    reached: set[AnyInstant] = set()
    instants.listen(reached.add)
    try:
        with world.bridge():
            world.execute("insert into t values (11)")
            eventually(lambda: world.value("select bool_and(state = 'done') from backfills"), "the snapshot is read")
            eventually(lambda: world.value("select count(*) from messages where key = '11'"), "the change is there")
    finally:
        instants.listen(None)
    assert reached == set(INSTANTS)


def test_a_bridge_is_killed_at_each_instant() -> None:
    """The names stand in tests that give start_process() an instant to die at."""
    texts = [path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    killing = "\n".join(text for text in texts if "crash=(" in text)
    assert [instant for instant in INSTANTS if f'"{instant}"' not in killing] == []
