"""`check` says one line for each fix; `check --fixes` prints the whole SQL, for psql."""

from __future__ import annotations

import json
import subprocess

import pytest

from cdcbridge.problem import Problem, script
from tests.harness.hostile import own_environment
from tests.harness.world import World


def psql(world: World, text: str) -> None:
    command = [str(world.server.binaries / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", world.dsn]
    subprocess.run(command, input=text, check=True, text=True, env=own_environment())


def plain(world: World) -> tuple[str, str]:
    """Statements that make a role which is no superuser."""
    name = f"plain_{world.database}"
    return f"create role {name} login replication", f"grant create on database {world.database} to {name}"


@pytest.fixture
def shop(world18: World) -> World:
    world18.execute("create table t (id int primary key)")
    world18.consumer("all", ("public.*",))
    return world18


def test_long_sql_is_printed_on_request_alone(shop: World) -> None:
    plain = shop.run_program("check")
    assert plain.stdout.count("\n") == 3, plain.stdout
    assert "fix: `cdcbridge check --fixes` prints the SQL (1" in plain.stdout
    (problem,) = json.loads(shop.run_program("check", "--json").stdout)["problems"]
    assert problem["code"] == "wildcard_identity" and "create event trigger" in problem["fix"]
    fixes = shop.run_program("check", "--fixes")
    assert fixes.returncode == 0 and fixes.stderr == "ok\n"
    assert problem["fix"] in fixes.stdout and f"-- warning: {problem['object']}: {problem['message']}\n" in fixes.stdout
    psql(shop, fixes.stdout)
    assert shop.run_program("check").stdout == "ok\n"
    assert shop.run_program("check", "--fixes").stdout == ""


def test_what_run_refuses_has_no_long_sql_either(shop: World) -> None:
    shop.execute(*plain(shop))
    shop.user = f"plain_{shop.database}"
    shop.settings["event_trigger"] = True
    for refused in (shop.run_program("run", "--no-wait"), shop.run_program("check")):
        text = refused.stdout + refused.stderr
        assert refused.returncode == 2 and "the event trigger is not installed" in text
        assert "create or replace" not in text and "cdcbridge check --fixes" in text
    fixes = shop.run_program("check", "--fixes")
    assert fixes.returncode == 2 and fixes.stderr.endswith("not ok\n")
    shop.user = "postgres"
    psql(shop, fixes.stdout)


def test_one_long_line_is_long_too(shop: World) -> None:
    names = [f"a_table_with_quite_a_long_name_{n}" for n in range(12)]
    shop.execute(*(f"create table {name} (id int primary key)" for name in names))
    shop.execute("create publication theirs", *plain(shop))
    shop.user, shop.settings["publication"] = f"plain_{shop.database}", "theirs"
    shop.consumer("all", tuple(f"public.{name}" for name in names))
    text = shop.run_program("check").stdout
    assert max(map(len, text.splitlines())) < 900 and "prints the SQL" in text, text
    full = shop.run_program("check", "--fixes").stdout
    assert all(name in full for name in names)


def test_a_script_has_each_fix_once_and_what_is_no_sql_as_a_comment() -> None:
    found = [
        Problem("a", "error", "x", "two\nlines", "alter table x replica identity full; -- or give it a primary key"),
        Problem("b", "warning", "y", "the same", "alter table x replica identity full; -- or give it a primary key"),
        Problem("c", "error", "z", "a sentence", "Set source.slot to another name."),
        Problem("d", "error", "z", "a command", "cdcbridge slot recreate"),
    ]
    assert script(found) == (
        "-- error: x: two\n-- lines\n-- warning: y: the same\n"
        "alter table x replica identity full; -- or give it a primary key\n"
        "\n-- error: z: a sentence\n-- no SQL: Set source.slot to another name.\n"
        "\n-- error: z: a command\n-- no SQL: cdcbridge slot recreate\n"
    )
