"""`dead redrive` compares messages that the filter failed on with the consumer's filter of today."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Any

import psycopg
import pytest

from tests.harness.world import World, clean_environment, eventually
from tests.integration.test_on_leave import messages, told, waits

FILTER = "record.status == 'paid'"


def program(world: World, *arguments: str) -> tuple[dict[str, Any], str]:
    done: subprocess.CompletedProcess[str] = world.run_program(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def dead_letters(
    world: World, *statements: str, count: int, back: bool = False, full: bool = False, **settings: Any
) -> None:
    """Letters of a consumer c whose filter reads a column that was renamed, and back, in the meantime."""
    world.execute("create table t (id int primary key, status text, amount numeric)")
    if full:
        world.execute("alter table t replica identity full")
    world.consumer(**{"filter": FILTER, **settings})
    with world.bridge():
        world.execute("alter table t rename column status to state", *statements)
        eventually(lambda: world.value("select count(*) from dead_messages") == count)
        if back:
            world.execute("alter table t rename column state to status")
    assert world.value("select bool_and(reason = 'filter_error: no such field: status') from dead_messages")


OPEN_AND_PAID = (
    "insert into t values (1, 'open', 1), (2, 'paid', 2.50)",
    "update t set amount = 3 where id = 1",
)


def test_what_does_not_match_is_removed_and_counted(world: World) -> None:
    dead_letters(world, *OPEN_AND_PAID, count=3, back=True, mode="fifo")
    # The letters have the column under its other name: their data is as it was logged.
    world.rows("update dead_messages set data = replace(data::text, 'state', 'status')::json where seq < 3 returning 1")
    answer, said = program(world, "dead", "redrive", "c")
    assert answer == {"redriven": 1, "not_wanted": 1, "undecidable": 1}
    assert "1 removed: the filter gives false" in said
    assert "1 remain dead letters, because the filter still fails on them" in said and "cdcbridge filter test c" in said
    assert told(messages(world)) == [("insert", "2", {"id": 2, "status": "paid", "amount": 2.50})]
    assert world.rows("select seq, reason from dead_messages") == [(3, "filter_error: no such field: status")]
    # By its id it comes whatever the filter says.
    (letter,) = world.json("dead", "list", "c", "--json")
    answer, said = program(world, "dead", "redrive", "c", str(letter["id"]))
    assert answer == {"redriven": 1} and "cdcbridge dead redrive c" in said
    assert [op for op, _, _ in told(messages(world))] == ["update"]


def test_a_filter_that_was_corrected_decides(world15: World) -> None:
    dead_letters(world15, *OPEN_AND_PAID, count=3)
    world15.consumer(filter="record.state == 'paid'")
    with world15.bridge():
        pass
    answer, _ = program(world15, "dead", "redrive", "c", "--rate", "20")
    assert answer == {"redriven": 1, "not_wanted": 2, "undecidable": 0}
    assert [key for _, key, _ in told(messages(world15))] == ["2"]
    assert world15.value("select count(*) from dead_messages") == 0


def test_letters_of_other_reasons_keep_their_place_between_them(world18: World) -> None:
    world18.execute("create table t (id int primary key, n int)")
    world18.consumer(filter="10 / record.n > 1", max_deliveries=1)
    with world18.bridge():
        world18.execute("insert into t values (1, 1), (2, 0), (3, 2), (4, 0), (5, 100)")
        waits(world18, 2)
    for receipt in [r["receipt"] for r in messages(world18, ack=False)]:
        world18.rows("select nack('c', %s, dead => true)", [receipt])
    assert world18.value("select count(*) from dead_messages") == 4
    world18.consumer(filter="record.n < 10", max_deliveries=1)
    with world18.bridge():
        pass
    assert program(world18, "dead", "redrive", "c", "--topic", "public.no")[0] == {"redriven": 0}
    assert program(world18, "dead", "redrive", "c")[0] == {"redriven": 4, "not_wanted": 0, "undecidable": 0}
    assert [key for _, key, _ in told(messages(world18))] == ["1", "2", "3", "4"]


def test_without_failures_of_the_filter_the_answer_is_the_old_one(world18: World) -> None:
    world18.execute("create table t (id int primary key)")
    world18.consumer(filter="record.id > 0")
    with world18.bridge():
        world18.execute("insert into t values (1)")
        waits(world18, 1)
    world18.rows("select nack('c', %s, dead => true)", [messages(world18, ack=False)[0]["receipt"]])
    answer, said = program(world18, "dead", "redrive", "c")
    assert (answer, said) == ({"redriven": 1}, "")


@pytest.mark.parametrize("mode", ["queue", "fifo"])
def test_a_row_that_left_comes_back_as_a_delete(world: World, mode: str) -> None:
    """The update is decided as when it is fanned out: by what the row was before it."""
    world.execute("create table t (id int primary key, status text, amount int)", "alter table t replica identity full")
    failing = "record.status == 'paid' && 10 / record.amount > 0"
    world.consumer(filter=failing, on_leave="delete", mode=mode, key=["status", "id"])
    with world.bridge():
        world.execute(
            "insert into t values (1, 'paid', 1), (2, 'open', 1)",
            "update t set status = 'paid', amount = 0 where id = 2",
            "update t set amount = 0 where id = 1",
        )
        eventually(lambda: world.value("select count(*) from dead_messages") == 2)
        assert [op for op, _, _ in told(messages(world))] == ["insert"]
    world.consumer(
        filter="record.status == 'paid' && record.amount > 0", on_leave="delete", mode=mode, key=["status", "id"]
    )
    with world.bridge():
        pass
    assert program(world, "dead", "redrive", "c")[0] == {"redriven": 1, "not_wanted": 1, "undecidable": 0}
    assert told(messages(world)) == [("delete", '["paid","1"]', {"id": 1, "status": "paid", "amount": 1})]
    assert world.value("select count(*) from dead_messages") == 0
    assert world.value("select count(*) from redriven") == 0


def test_more_letters_than_a_page_and_a_command_that_is_killed(world18: World) -> None:
    dead_letters(world18, "insert into t select n, case when n % 2 = 0 then 'paid' else 'open' end, n"
                 " from generate_series(1, 2500) n", count=2500, mode="fifo")  # fmt: skip
    world18.consumer(filter="record.state == 'paid'", mode="fifo")
    with world18.bridge():
        pass
    world18.write_config()
    killed = subprocess.Popen(
        [sys.executable, "-m", "cdcbridge", "-c", str(world18.folder / "cdcbridge.yaml"), "dead", "redrive", "c",
         "--rate", "400"],
        stdout=subprocess.DEVNULL, env=clean_environment(),
    )  # fmt: skip
    eventually(lambda: 0 < world18.value("select count(*) from dead_messages") < 2500)
    killed.kill()
    killed.wait()
    half = world18.value("select count(*) from consumer_messages")
    assert 0 < half < 1250
    answer, _ = program(world18, "dead", "redrive", "c")
    assert answer["undecidable"] == 0 and answer["redriven"] + answer["not_wanted"] < 2500
    rows = world18.rows("select key, seq from peek('c', 5000)")
    assert [int(key) for key, _ in rows] == list(range(2, 2501, 2)), "each once, in order"


def test_the_sql_function_says_which_were_never_compared(world: World) -> None:
    dead_letters(world, *OPEN_AND_PAID, count=3)
    with psycopg.connect(world.dsn, autocommit=True) as session:
        said: list[str] = []
        session.add_notice_handler(lambda notice: said.append(f"{notice.message_primary} {notice.message_hint}"))
        assert session.execute("select cdcbridge.redrive('c')").fetchall() == [(3,)]
    (notice,) = said
    assert notice.startswith(
        "3 of 3 dead letters were never compared with the filter of consumer 'c', because it failed on them"
    )
    assert "`cdcbridge dead redrive c`" in notice


def test_a_role_redrives_its_own_letters(world15: World) -> None:
    role = f"reader_{world15.database}"
    world15.execute(f"create role {role} login", "grant create on schema public to public")
    try:
        dead_letters(world15, *OPEN_AND_PAID, count=3, role=role, on_leave="delete", full=True)
        world15.consumer(filter="record.state == 'paid'", role=role, on_leave="delete")
        with world15.bridge():
            pass
        world15.user = role
        answer, _ = program(world15, "dead", "redrive", "c")
        world15.user = "postgres"
        assert answer == {"redriven": 1, "not_wanted": 2, "undecidable": 0}
    finally:
        world15.user = "postgres"
        with contextlib.suppress(psycopg.Error):
            world15.execute(f"drop owned by {role}", f"drop role {role}")
