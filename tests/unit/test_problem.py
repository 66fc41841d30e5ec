"""Problems and their fixes: in one line, as a script for psql, and as the refusal of `run`."""

from __future__ import annotations

import pytest

from cdcbridge.errors import CheckFailed
from cdcbridge.problem import Problem, refuse, script

ADD = Problem("no_key", "error", "public.t", "it has no key", "alter table t add primary key (id);")
WRITE = Problem("name", "warning", "consumer c", "it is old\nand long", "Write another name.")


@pytest.mark.parametrize(
    ("fix", "brief"),
    [
        ("x" * 500, "x" * 500),
        ("x" * 501, "`cdcbridge check --fixes` prints the SQL (501 characters)"),
        ("a;\nb;\nc;", "`cdcbridge check --fixes` prints the SQL (3 lines)"),
        ("", ""),
    ],
)
def test_a_fix_that_is_too_long_for_a_line_says_where_to_read_it(fix: str, brief: str) -> None:
    assert Problem("c", "error", "o", "m", fix).brief == brief


def test_a_script_can_be_run_by_psql() -> None:
    again = Problem("no_identity", "error", "public.u", "nor this", ADD.fix)
    assert script([ADD, WRITE, again]) == (
        "-- error: public.t: it has no key\n-- error: public.u: nor this\nalter table t add primary key (id);\n\n"
        "-- warning: consumer c: it is old\n-- and long\n-- no SQL: Write another name.\n"
    )
    assert script([]) == ""


@pytest.mark.parametrize(
    ("fix", "runs"),
    [
        ("alter table t\n  add primary key (id);", True),
        ("-- first this\nselect 1;", True),
        ("select 1", False),  # without its end psql would wait for more
        ("Select a table; then go on.", False),
        ("selective; words", False),
        ("createdb x;", False),
    ],
)
def test_what_is_no_sql_is_a_comment(fix: str, runs: bool) -> None:
    lines = script([Problem("c", "error", "o", "m", fix)]).splitlines()[1:]
    assert ("\n".join(lines) == fix) is runs
    assert runs or all(line.startswith("-- ") for line in lines)


def test_only_errors_refuse_and_all_of_them_are_told() -> None:
    refuse([])
    refuse([WRITE])
    with pytest.raises(CheckFailed) as raised:
        refuse([WRITE, ADD, ADD])
    assert str(raised.value) == "\n".join(["public.t: it has no key\n    fix: alter table t add primary key (id);"] * 2)
    assert raised.value.problems == (ADD, ADD) and raised.value.exit_code == 2
