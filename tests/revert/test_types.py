"""A row with each type of the server is as before, after its values were overwritten and after it was deleted."""

from __future__ import annotations

import pytest

from tests.harness.world import World
from tests.integration.test_all_types import all_types
from tests.integration.test_types import CASES, TYPES
from tests.revert.conftest import caught_up, revert, rows

# JSON has one null, and no bounds of arrays, so the log does not have the difference.
LOST = [
    ("json", "'null'", "null", None),
    ("jsonb", "'null'", "null", None),
    ("int4[]", "'[0:1]={7,8}'", "[0:1]={7,8}", "{7,8}"),
    ("int4[]", "'[2:3][0:1]={{1,2},{3,4}}'", "[2:3][0:1]={{1,2},{3,4}}", "{{1,2},{3,4}}"),
]

# No server reads a pg_node_tree, and PostgreSQL makes no array of vectors from JSON: a revert refuses such a row.
UNWRITTEN = ("pg_node_tree", "int2vector[]", "oidvector[]")
JSON_ARRAYS = ("json[]", "jsonb[]")  # the log does not have their dimensions


def texts(world: World, count: int) -> tuple[str, ...]:
    """The text of each column of the only row."""
    (found,) = rows(world, f"select {', '.join(f'c{n}::text' for n in range(count))} from t")
    return found


@pytest.mark.parametrize("full", [True, False], ids=["full", "default"])
def test_every_type_of_the_server(world: World, full: bool) -> None:
    types = [
        (name, None if name in UNWRITTEN or (name in JSON_ARRAYS and "[[" in str(value)) else value)
        for name, value in all_types(world)
    ]
    columns = ", ".join(f"c{n} {name}" for n, (name, _) in enumerate(types))
    world.execute(f"create table t (id int primary key, {columns})")
    if full:
        world.execute("alter table t replica identity full")
    world.consumer()
    values = ", ".join("null" if value is None else f"({value})::{name}" for name, value in types)
    with world.bridge():
        world.execute(f"insert into t values (1, {values})")
        before = texts(world, len(types))
        world.execute(f"update t set {', '.join(f'c{n} = null' for n in range(len(types)))}", "delete from t")
        last = caught_up(world)
        revert(world, str(last - 1), str(last), "--apply")
        after = texts(world, len(types))
    assert [(*one, a, b) for one, a, b in zip(types, before, after, strict=True) if a != b] == []


def test_ugly_values(world: World) -> None:
    """Values at the limits of their types, in one row."""
    cases = [(name, value) for name, values in CASES for value in values if value != "null"]
    world.execute(*TYPES)
    columns = ", ".join(f"c{n} {name}" for n, (name, _) in enumerate(cases))
    world.execute(f"create table t (id int primary key, {columns})")
    world.consumer()
    values = ", ".join(f"({value})::{name}" for name, value in cases)
    with world.bridge():
        world.execute(f"insert into t values (1, {values})")
        before = texts(world, len(cases))
        world.execute("delete from t")
        revert(world, str(caught_up(world)), "--apply")
        after = texts(world, len(cases))
    others = [(*case, a, b) for case, a, b in zip(cases, before, after, strict=True) if a != b]
    assert others == LOST


def test_dimensions_of_json_arrays_are_not_guessed(world18: World) -> None:
    world18.execute("create table t (id int primary key, a json[])")
    world18.consumer()
    with world18.bridge():
        world18.execute("""insert into t values (1, array['{"x": [1]}'::json, null, '2'])""", "update t set a = null")
        seq = caught_up(world18)
        revert(world18, str(seq), "--apply")
        assert rows(world18, "select a::text from t") == [('{"{\\"x\\": [1]}",NULL,2}',)]
        world18.execute("update t set a = array['[1]'::json]", "update t set a = null")
        refused = revert(world18, str(caught_up(world18)), "--apply", code=2)
        assert "the dimensions of the arrays of a are not in the log" in refused.stderr
