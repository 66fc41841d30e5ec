"""What people read who mistyped a command: the program's words, the nearest name, a bullet for each of several errors."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import click
import pytest

import cdcbridge.cli as cli_package
from cdcbridge.cli.complaints import complain
from cdcbridge.cli.screen import column_widths, wrapped
from cdcbridge.database import plain
from cdcbridge.errors import CheckFailed, UsageError
from cdcbridge.problem import Problem
from tests.harness.forked import command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frobnicate", "No such command 'frobnicate'"),
        ("recieve x", "No such command 'recieve'; did you mean receive?"),
        ("dead lst", "No such command 'lst'; did you mean list?"),
        ("receive", "NAME is missing"),
        ("receive billing -n 0", "--max: 0 is out of range: write at least 1"),
        ("receive billing -n x", "--max: 'x' is not a whole number"),
        ("receive billing --weight 3", "no such option: --weight; did you mean --wait?"),
        ("receive billing --wait soon", "--wait: 'soon' is not a duration. Write a number and one of ms, s, m, h, d, as in 30s. A number without a unit means seconds"),
        ("receive a b", "too many arguments: b"),
        ("slot skip", "--to is missing"),
        ("slot skip --to", "--to needs a value"),
        ("completion tcsh", "SHELL: 'tcsh' is not bash, zsh or fish"),
        ("completion zhs", "SHELL: 'zhs' is not bash, zsh or fish; did you mean zsh?"),
        ("dead redrive billing --rate x", "--rate: 'x' is not a number"),
        ("dead show billing x", "ID: 'x' is not a whole number"),
        ("ack billing", "RECEIPT is missing"),
    ],
)  # fmt: skip
def test_a_mistyped_command(line: str, message: str) -> None:
    result = command(line.split())
    assert result.code == 2 and result.err.decode().splitlines()[0] == f"error: {message}", result
    hint = result.err.decode().splitlines()[1:]
    assert not hint or (len(hint) == 1 and hint[0].startswith("hint: ") and hint[0].endswith(" --help")), hint


def test_several_errors_are_bullets_and_one_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "cdcbridge.yaml"
    path.write_text("source: {dsn: x=y, slott: a}\nlog: {lvl: x}\n")
    result = command(["-c", str(path), "config", "check"])
    assert result.code == 2 and result.err.decode().splitlines() == [
        "error: 2 problems",
        f"  - {path}:1: source.slott: unknown key; did you mean slot?",
        f"  - {path}:2: log.lvl: unknown key; did you mean level?",
    ]
    path.write_text("source: {dsn: x=y, slott: a}\n")
    one = command(["-c", str(path), "config", "check"]).err.decode()
    assert one == f"error: {path}:1: source.slott: unknown key; did you mean slot?\n"


def test_problems_of_a_check_are_bullets(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Problem("a", "error", name, "is wrong", f"alter {name};") for name in ("s", "t")]
    complain(CheckFailed("s: is wrong\nt: is wrong", found))
    assert capsys.readouterr().err == (
        "error: 2 problems\n  - s: is wrong\n    fix: alter s;\n  - t: is wrong\n    fix: alter t;\n"
    )


def test_the_nearest_consumer_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    complain(UsageError("no consumer named 'biling'", hint="Known: audit, billing"))
    assert capsys.readouterr().err.splitlines()[1] == "hint: Did you mean billing? Known: audit, billing"
    complain(UsageError("no consumer named 'zzz'", hint="Known: audit, billing"))
    assert capsys.readouterr().err.splitlines()[1] == "hint: Known: audit, billing"


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("a short one", 40, "> a short one"),
        ("one two three four", 12, "> one two\n. three four"),
        ("see https://example.org/a-long-address ok", 14, "> see\n. https://example.org/a-long-address\n. ok"),
        ("well-known things-to-do", 14, "> well-known\n. things-to-do"),
        ("first\n    fix: second third", 14, "> first\n.     fix:\n.     second\n.     third"),
        ("one two three four", None, "> one two three four"),
        ("", 10, "> "),
    ],
)
def test_text_is_wrapped_between_words(text: str, columns: int | None, expected: str) -> None:
    assert wrapped(text, columns, first="> ", rest=". ") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (('connection failed: connection to server at "127.0.0.1", port 1 failed: Connection refused; Is the server running on'
         " that host and accepting TCP/IP connections?"), "no connection to 127.0.0.1, port 1: Connection refused"),
        (('connection failed: connection to server at "db1" (10.0.0.1), port 5432 failed: FATAL:  password authentication'
         ' failed for user "app"'), 'no connection to db1, port 5432: password authentication failed for user "app"'),
        (('connection is bad: connection to server on socket "/tmp/.s.PGSQL.1" failed: No such file or directory; Is the server'
         " running locally and accepting connections on that socket?"),
         "no connection to /tmp/.s.PGSQL.1: No such file or directory"),
        ("connection is bad: no error details available", "connection is bad: no error details available"),
        ("server closed the connection unexpectedly", "server closed the connection unexpectedly"),
    ],
)  # fmt: skip
def test_a_failed_connection_without_libpqs_words(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_a_column_has_its_longest_word() -> None:
    rows = [["TOPIC", "REASON"], ["public.orders", "the mail server refuses this address"]]
    assert column_widths(rows, None) == [13, 36]
    assert column_widths(rows, 80) == [13, 36]
    assert column_widths(rows, 30) == [13, 15]
    assert column_widths(rows, 22) == [13, 7]
    assert column_widths(rows, 21) is None, "a word would be broken: a block for each row"
    assert column_widths([["A"]], 80) == [1]


def test_the_group_knows_the_module_of_every_command() -> None:
    folder = Path(cli_package.__file__).parent
    found = {}
    for path in folder.glob("*.py"):
        module = importlib.import_module(f"cdcbridge.cli.{path.stem}") if path.stem != "__init__" else None
        if hasattr(module, "COMMANDS"):
            found[path.stem] = tuple(str(command.name) for command in module.COMMANDS)  # type: ignore[union-attr]
    assert found == cli_package._MODULES


def test_a_command_that_reads_a_queue_does_not_load_the_bridge() -> None:
    script = """if True:
        import sys
        from cdcbridge.cli import cli
        cli.main(["receive", "--help"], standalone_mode=False)
        print([name for name in ("cdcbridge.bridge", "cdcbridge.metrics", "prometheus_client") if name in sys.modules])
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]", ended.stdout


def groups() -> list[click.Group]:
    context = click.Context(cli_package.cli)
    found = [cli_package.cli.get_command(context, name) for name in cli_package.cli.list_commands(context)]
    return [cli_package.cli, *(command for command in found if isinstance(command, click.Group))]


@pytest.mark.parametrize("group", groups(), ids=lambda group: group.name)
def test_no_summary_of_a_command_is_cut(group: click.Group) -> None:
    # The settings belong to the context: click keeps the help option that it makes first, also for later tests.
    context = click.Context(group, terminal_width=80, **cli_package.cli.context_settings)
    listed = group.get_help(context).partition("[ARGS]...")[2]
    assert "..." not in listed


def test_every_command_stands_in_one_section_of_the_help() -> None:
    listed = [name for names in cli_package._SECTIONS.values() for name in names]
    assert sorted(listed) == cli_package.cli.list_commands(click.Context(cli_package.cli))
    context = click.Context(cli_package.cli, **cli_package.cli.context_settings)
    text = cli_package.cli.get_help(context)
    assert all(f"\n{section}:\n" in text for section in cli_package._SECTIONS)
