"""Each command with text and streams as they should not be: never a traceback, and what to do is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cdcbridge.cli import cli
from tests.harness.forked import CLOSED, FULL, LEFT, command
from tests.harness.world import World, clean_environment, fresh_database

CRAB = "🦀 ž"
BAD = "caf\udce9"  # an argument that is not UTF-8, as Python hands it over
VALUES = {
    "name": "c", "receipts": "1-1", "topic": "news", "table": "public.t", "ids": "1", "shell": "bash",
    "target": "earliest", "start": "earliest", "to": "0/1", "by": "1s",
    "rule": "dead_letters", "seconds": "1s", "number": "1",
}  # fmt: skip
MORE = {"decode": ["--plugin", "wal2json"], "verify": ["--wait", "0"]}


def leaves(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if not isinstance(group, click.Group):
        yield path, group
        return
    context = click.Context(group)
    for name in sorted(group.list_commands(context)):
        child = group.get_command(context, name)
        assert child is not None
        yield from leaves(child, (*path, name))


# demo starts a server of its own, and run goes on until it is stopped; neither takes or prints a text.
COMMANDS = {" ".join(path): one for path, one in leaves(cli) if path[0] not in ("demo", "run", "serve")}
each_command = pytest.mark.parametrize("path", COMMANDS)


def arguments_of(path: str, odd: str = "") -> list[str]:
    """The command with what it needs; `odd`: the name of a parameter that gets BAD."""
    given: list[str] = path.split()
    for parameter in COMMANDS[path].params:
        name = str(parameter.name)
        if not (parameter.required or name == odd) or isinstance(parameter.type, click.Choice | click.File):
            continue
        value = BAD if name == odd else VALUES[name]
        given += [value] if isinstance(parameter, click.Argument) else [parameter.opts[-1], value]
    return [*given, *MORE.get(path.split(maxsplit=1)[0], []), *(["bash"] if path == "completion" else [])]


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, str(p.name)) for path, one in COMMANDS.items() for p in one.params if p.type.name == "text"],
)
def test_a_text_that_is_not_utf_8_is_refused(path: str, name: str, tmp_path: Path) -> None:
    result = command(["-c", str(tmp_path / "absent.yaml"), *arguments_of(path, odd=name)])
    assert result.code == 2 and b"is not UTF-8" in result.err and b"caf\\udce9" in result.err, result


@pytest.fixture(scope="module")
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A store whose messages, keys, topics and reasons no Latin-1 terminal can show."""
    server = request.getfixturevalue("pg15")
    with fresh_database(server) as database:
        world = World(server, database, "pgoutput", tmp_path_factory.mktemp("shop"))
        world.execute("create table t (id int primary key, v text)", f'create table "{CRAB}" (id int primary key)')
        topics = ["news", CRAB]
        world.consumer("c", ("public.t", f"public.{CRAB}"), topics=topics, max_deliveries=1, visibility_timeout="500ms")
        world.consumer("s", ("public.t",), mode="stream", topics=topics)
        world.consumer("k", (), topics=[CRAB], visibility_timeout="10m")  # from which nobody takes anything
        with world.bridge():
            world.execute(f"insert into t select g, '{CRAB}' from generate_series(1, 100) g")
            world.messages(100)
        world.rows("select publish(%s, %s, to_json(%s::text)) from generate_series(1, 9)", CRAB, CRAB, CRAB)
        world.rows("select start_backfill('c', %s, null, null, null)", f"public.{CRAB}")
        receipts = [receipt for (receipt,) in world.rows("select receipt from receive('c', 5)")]
        world.rows("select nack('c', %s, dead => true, reason => %s)", receipts, CRAB)
        # Neither a database's nor a role's encoding reaches a command, nor one of libpq's environment.
        world.execute(f"alter database {database} set client_encoding = LATIN1")
        world.execute(f"alter role postgres in database {database} set client_encoding = WIN1252")
        yield world
        world.close()


def run(world: World, path: str, **streams: object) -> tuple[int, bytes, bytes]:
    given = arguments_of(path)
    if path.startswith("offsets"):
        given[2] = "s"
    result = command(["-c", str(world.folder / "cdcbridge.yaml"), *given], **streams)  # type: ignore[arg-type]
    assert result.code in (0, 1, 2, 3), result.err.decode(errors="replace")
    assert b"Traceback" not in result.err and b"Exception ignored" not in result.err, result.err.decode(
        errors="replace"
    )
    assert result.code == 0 or b"UnicodeError" not in result.err
    return result


@each_command
@pytest.mark.parametrize("encoding", ["latin-1"])
def test_a_terminal_that_lacks_characters(shop: World, path: str, encoding: str) -> None:
    run(shop, path, encoding=encoding, stdin=b"1-1\n")


@each_command
def test_client_encodings_of_the_environment(shop: World, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "WIN1252")
    monkeypatch.setenv("PGOPTIONS", "-c client_encoding=LATIN1")
    _, _, err = run(shop, path, stdin=f'"{CRAB}"\n'.encode())
    assert b"in encoding" not in err, err.decode()


@each_command
@pytest.mark.parametrize("stdin", [b"\xff\xfe\n\xe9", b'{"receipt": "\xe9\0"}\n', CLOSED], ids=repr)
def test_stdin_that_is_no_text(shop: World, path: str, stdin: bytes | str) -> None:
    run(shop, path, stdin=stdin)
    if COMMANDS[path].params and any(p.name == "receipts" for p in COMMANDS[path].params):
        given = [BAD if part == "1-1" else part for part in arguments_of(path)]
        given = ["-" if part == BAD else part for part in given]
        result = command(["-c", str(shop.folder / "cdcbridge.yaml"), *given], stdin=stdin)
        assert result.code == 2 and b"Traceback" not in result.err, result


@each_command
@pytest.mark.parametrize("stdout", [LEFT, FULL, CLOSED])
def test_stdout_that_takes_nothing(shop: World, path: str, stdout: str) -> None:
    code, _, err = run(shop, path, stdout=stdout, stdin=b"1\n")
    if code == 1 and stdout == FULL and b"stdout" not in err and b"No space" not in err:
        assert err, "it says why"


def test_a_closed_or_full_stdout_acks_nothing(shop: World) -> None:
    path = str(shop.folder / "cdcbridge.yaml")
    for stdout, message in ((CLOSED, b"stdout is closed"), (FULL, b"No space left"), (LEFT, b"")):
        before = shop.value("select pending + in_flight from consumer_lag() where name = 'k'")
        result = command(["-c", path, "receive", "k", "-n", "1", "--ack"], stdout=stdout)
        assert result.code == 1 and message in result.err, (stdout, result)
        assert shop.value("select pending + in_flight from consumer_lag() where name = 'k'") == before > 0, stdout


def test_lines_are_utf_8_whatever_the_terminal_is(shop: World) -> None:
    result = command(["-c", str(shop.folder / "cdcbridge.yaml"), "peek", "k", "-n", "1"], encoding="latin-1")
    (row,) = [json.loads(line) for line in result.out.decode().splitlines()]
    assert (row["topic"], row["key"], row["data"]["record"]) == (CRAB, CRAB, CRAB)


@pytest.mark.parametrize("data", ["\\ud800", "\ud800", "\0", "[" * 5000, "1e400"], ids=ascii)
def test_odd_json_is_published_or_refused(shop: World, data: str) -> None:
    line = f'"{data}"\n' if len(data) < 10 else data + "\n"
    given = line.encode("utf-8", "surrogatepass")
    result = command(["-c", str(shop.folder / "cdcbridge.yaml"), "publish", "news"], stdin=given)
    assert result.code in (0, 2) and b"Traceback" not in result.err, result
    assert (result.code == 2) == (b"stdin: line 1: not JSON" in result.err), result


@pytest.mark.parametrize(
    "arguments",
    [
        ("receive", "c", "-n", "3000000000"),
        ("dead", "show", "c", "99999999999999999999"),
        ("dead", "redrive", "c", "-99999999999999999999"),
        ("offsets", "seek", "s", "earliest", "--partition", "3000000000"),
        ("extend", "c", "1-1", "--by", "99999999999999999999d"),
        ("nack", "c", "1-1", "--delay", "1" + "0" * 300),
        ("publish", "news", "1", "--delay", "99999999999d"),
        ("consumers", "replay", "c", "--from", "9" * 30),
        ("offsets", "seek", "s", "294277-01-01"),
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_numbers_that_are_too_large_are_a_mistake_of_the_caller(shop: World, arguments: tuple[str, ...]) -> None:
    result = command(["-c", str(shop.folder / "cdcbridge.yaml"), *arguments])
    assert result.code == 2 and b"Traceback" not in result.err, result


def test_real_processes_in_the_locale_c_and_of_latin_1(shop: World) -> None:
    """Without Python's own help for the locale C. A text in UTF-8 is taken there, and one in Latin-1 refused."""
    program = [sys.executable, "-m", "cdcbridge", "-c", str(shop.folder / "cdcbridge.yaml")]
    plain = {**clean_environment(), "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for environment, codes in ((plain, (0, 2)), ({**clean_environment(), "PYTHONIOENCODING": "latin-1"}, (0, 2))):
        for topic, code in zip((CRAB.encode(), b"caf\xe9"), codes, strict=True):
            result = subprocess.run(
                [*program, "publish", topic, "1"], capture_output=True, check=False, env=environment
            )
            assert result.returncode == code and b"Traceback" not in result.stderr, result
        table = subprocess.run([*program, "dead", "list", "c"], capture_output=True, check=False, env=environment)
        assert table.returncode == 0 and b"REASON" in table.stdout, table


def test_a_reader_that_left_ends_a_command_without_a_word(shop: World) -> None:
    first = f"{sys.executable} -m cdcbridge -c {shop.folder}/cdcbridge.yaml peek c -n 200 | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", first], capture_output=True, check=True, env=clean_environment())
    line, code = result.stdout.splitlines()
    assert json.loads(line)["seq"] and code in (b"0", b"1") and result.stderr == b"", result
