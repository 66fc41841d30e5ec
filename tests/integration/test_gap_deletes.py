"""Rows that were deleted while a slot was lost: what `verify` says, and the manual's ways to mend copies."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from cdcbridge.backfill.verify import Verified
from tests.harness.world import World, eventually

MANUAL = Path(__file__).parents[2] / "docs" / "OPERATIONS.md"


def test_the_manual_mends_copies_after_a_lost_slot(world15: World) -> None:
    world = world15
    world.execute("create table orders (id int primary key, status text not null)")
    world.consumer("billing", ("public.orders",))
    with world.bridge():
        world.execute("insert into orders select n, 'new' from generate_series(1, 7) n")
        eventually(lambda: world.value("select count(*) from messages") == 7)
    world.execute(
        f"select pg_drop_replication_slot('{world.slot}')",
        "delete from orders where id in (5, 6)",
        "update orders set status = 'paid' where id = 1",
        "insert into orders values (8, 'new')",
    )
    assert world.run_program("slot", "recreate", "--yes").returncode == 0
    with world.bridge():
        before = world.run_program("verify", "public.orders")
        assert "backfill start billing public.orders" in before.stderr
        assert world.run_program("backfill", "start", "billing", "public.orders").returncode == 0
        eventually(lambda: world.value("select bool_and(state = 'done') from backfills"), "the backfill")
        found = world.run_program("verify", "public.orders")
        assert found.returncode == 2 and "in the log, not in the table: 2: 5, 6" in found.stdout
        assert "backfill start" not in found.stderr and "were deleted in a gap" in found.stderr
        # by hand, in a copy
        world.execute("create schema copy", "create table copy.orders as select n as id from generate_series(1, 8) n")
        (statement,) = re.findall(r"^ +(delete from .*;)$", found.stderr, re.MULTILINE)
        world.execute(statement.replace('"public"', "copy"))
        assert world.rows("select string_agg(id::text, ',' order by id) from copy.orders") == [("1,2,3,4,7,8",)]
        # by a transaction on the source, which refuses a key that was inserted again
        (recipe,) = re.findall(
            r"^```text\n(begin;\nset local session_replication_role.*?)```",
            MANUAL.read_text(),
            re.DOTALL | re.MULTILINE,
        )
        world.execute("insert into orders values (5, 'again')")
        with pytest.raises(psycopg.errors.UniqueViolation):
            world.execute(recipe)
        world.sql.execute("rollback")
        assert world.value("select status from public.orders where id = 5") == "again"
        world.execute(recipe.replace("(5, ''), ", "").replace("(5, 6)", "(6)"))
        assert world.run_program("verify", "public.orders").returncode == 0
        told = world.rows("select data ->> 'op' from messages where key = '6' order by seq desc limit 2")
        assert told == [("delete",), ("insert",)]


@pytest.mark.parametrize(("key", "extra", "said"), [
    (("id",), ("5", "6"), "\"id\" in ('5', '6')"),
    (('a"b',), ("it's",), "\"a\"\"b\" in ('it''s')"),
    (("a", "b"), ('["1","x"]', '["2","it\'s"]'), "(\"a\", \"b\") in (('1', 'x'), ('2', 'it''s'))"),
])  # fmt: skip
def test_the_statement_quotes_names_and_keys(key: tuple[str, ...], extra: tuple[str, ...], said: str) -> None:
    found = Verified("public.Orders", 1, (), extra, (), key=key)
    assert found.deletion == f'delete from "public"."Orders" where {said};'
