"""A filter that calculates gives the same answer on every path: snapshot, changes, replay and redrive."""

from __future__ import annotations

from tests.harness.world import World, eventually
from tests.integration.test_on_leave import messages, waits

FILTER = (
    "record.big * 1.5 > 1.0 && record.p * 1.5 > 4 && record.p % 2 == 1 && record.f * 2 > 5"
    " && (record.m == null || record.m / 2 > 1) && record.big - 9007199254740992 == 1"
)
# id, big, p, f, m: the numeric p is 3 in three forms, and 2.9; a double precision has no form of its own
ROWS = """
    insert into t values ({0} + 1, 9007199254740993, 3, 3, null), ({0} + 2, 9007199254740993, 3.0, 2.6, 3),
        ({0} + 3, 9007199254740993, 3.000, 3.0, 2.5), ({0} + 4, 9007199254740993, 2.9, 3, null),
        ({0} + 5, 9007199254740992, 3, 3, null), ({0} + 6, 9007199254740993, 3, 2.5, null), ({0} + 7, 9007199254740993, 3, 3, 2)
"""
TAKEN = [1, 2, 3]


def ids(world: World, name: str = "c") -> list[int]:
    return [message["data"]["record"]["id"] for message in messages(world, name)]


def test_numbers_of_both_kinds_on_every_path(world: World) -> None:
    world.execute(
        "create table t (id int primary key, big bigint not null, p numeric not null, f float8 not null, m numeric(20,4))",
        ROWS.format(0),
    )
    world.consumer(filter=FILTER, start="snapshot")
    world.consumer("z", filter="record.m * 2 > 1000")
    with world.bridge():
        waits(world, 3)
        world.execute(ROWS.format(10))
        waits(world, 6)
        both = [*TAKEN, *(i + 10 for i in TAKEN)]
        assert ids(world) == both, "rows that were read, and changes"
        assert world.json("consumers", "replay", "c", "--from", "earliest")["replayed"] == 6
        assert ids(world) == both
        eventually(lambda: world.value("select count(*) from dead_messages") == 4, "rows whose m is null")
        said = "filter_error: record.m * 2: CEL has no * for null and an integer. Write record.m != null && … (record.m is null)"
        assert world.rows("select distinct reason from dead_messages") == [(said,)]
    world.consumer("z", filter=FILTER)
    with world.bridge():
        answer = world.json("dead", "redrive", "z")
    assert answer == {"redriven": 1, "not_wanted": 3, "undecidable": 0}
    assert ids(world, "z") == [11]


def test_check_and_run_refuse_what_depends_on_the_form_of_a_number(world18: World) -> None:
    world18.execute("create table t (id int primary key, p numeric not null, u uuid not null)")
    world18.consumer(filter="record.id > 5 && record.p / 2 > 1")
    said = "Write `record.p / 2.0` for a result with decimals, or `int(record.p) / 2` for a whole number."
    for command in (("check",), ("run", "--no-wait"), ("consumers", "apply")):
        done = world18.run_program(*command)
        assert done.returncode == 2 and said in done.stdout + done.stderr, done
    world18.consumer(
        filter="record.id * 1.5 > 1.0 && record.p / 2.0 > 1 && record.u != 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'"
    )
    (problem,) = [p for p in world18.json("check", "--json")["problems"] if p["code"].startswith("filter")]
    assert (problem["code"], problem["severity"]) == ("filter_form", "warning")
    assert problem["fix"].startswith("Write 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11' instead of ")
