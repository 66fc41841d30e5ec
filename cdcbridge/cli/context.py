"""Common parts of the commands: the configuration, sessions on the store, parameter types and printing.

Results are printed on stdout, remarks for people on stderr.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import click
import orjson
import psycopg

from cdcbridge.cli.modes import right_command
from cdcbridge.cli.screen import column_widths, facts, width, wrapped
from cdcbridge.config import Config, load
from cdcbridge.database import Connection, connect_store, store_errors
from cdcbridge.database.pooled import connect_for_calls
from cdcbridge.database.rights import guest, refusing
from cdcbridge.errors import CdcbridgeError, OperatorNeeded, UsageError
from cdcbridge.logs import configure
from cdcbridge.store.migrate import schema_version
from cdcbridge.units import format_duration, parse_duration
from cdcbridge.words import as_text, one_line

_LINE_ENDS: Final = {"\n": " ", "\r": " ", "\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_HALF: Final = re.compile("[\ud800-\udfff]")
_NUMBER: Final = re.compile(r"\d+(\.\d*)?|\.\d+")
OTHER_MODE: Final = "CB002"  # SQLSTATE of an error: a function of queues was called for a stream, or the reverse
UNLISTED: Final = "CB011"  # SQLSTATE of a notice: no consumer lists the topic
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")


def complete_name(context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the consumers of the configuration file for shell completion, or none if it cannot be read."""
    path = context.find_root().params.get("path")
    try:
        consumers = load(Path(path or "cdcbridge.yaml")).consumers
    except CdcbridgeError:
        return []
    return [consumer.name for consumer in consumers if consumer.name.startswith(incomplete)]


name_argument = click.argument("name", shell_complete=complete_name)


class DurationType(click.ParamType[float]):
    """A duration such as 30s, as in the configuration. A number alone is in seconds.

    Args:
        least: The shortest duration that is accepted, in seconds.
    """

    name = "duration"

    def __init__(self, least: float = 0) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value) if _NUMBER.fullmatch(str(value).strip()) else parse_duration(value)
        except ValueError as error:
            self.fail(f"{error}. A number without a unit means seconds", param, ctx)
        if seconds < self._least:
            self.fail(f"{value} is too short: the minimum is {format_duration(self._least)}", param, ctx)
        return seconds


DURATION: Final = DurationType()


class TextType(click.types.StringParamType):
    """Text that a server accepts.

    If an argument contains bytes that Python cannot decode, Python replaces each by half of a surrogate pair. Such an
    argument is decoded again as UTF-8, and refused if it is not UTF-8.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(super().convert(value, param, ctx))
        try:
            # In the locale C, Python replaces the bytes of valid UTF-8 as well.
            return os.fsencode(text).decode() if _HALF.search(text) else text
        except UnicodeError:
            self.fail(f"{text!r} is not UTF-8: write it in UTF-8, or set LANG to its encoding", param, ctx)


TEXT: Final = TextType()


class App:
    """The object that each command receives: the configuration, and sessions on the store."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def config(self) -> Config:
        config = load(self.path)
        configure(config.log.format, config.log.level)
        return config

    @contextmanager
    def store(self, *, pooled: bool = False) -> Iterator[Connection]:
        """Open a session on the store, for the duration of a `with` block.

        Args:
            pooled: Also accept a connection through a pooler such as PgBouncer.

        Raises:
            OperatorNeeded: The store has not been migrated.
            UsageError: The block sent a value that no server accepts, or named a consumer of the other mode.
        """
        connect = connect_for_calls if pooled else connect_store
        connection = connect(self.config.store_dsn, self.config.store.schema_, "cdcbridge cli")
        with connection, _refusing_values(), store_errors():
            who = guest(connection)
            if who is None and schema_version(connection) == 0:
                raise OperatorNeeded(
                    f"there is no cdcbridge store in the schema {self.config.store.schema_!r}",
                    hint="`cdcbridge migrate` or `cdcbridge run` creates it.",
                )
            connection.add_notice_handler(_Notices())
            context = click.get_current_context()
            command = context.command_path.removeprefix(context.find_root().command_path)
            with refusing(who, f"`cdcbridge{command}`"):
                yield connection


class _Notices:
    """A handler that prints the notices of the server with their hints, except one that equals the notice before it.

    For example, a waiting `receive` gets the same notice at each look at a paused consumer.
    """

    def __init__(self) -> None:
        self._last: str | None = None

    def __call__(self, notice: psycopg.errors.Diagnostic) -> None:
        kind = "warning" if notice.sqlstate == UNLISTED else "notice"
        text = f"{kind}: {notice.message_primary}"
        if text != self._last:
            say(text)
            if notice.message_hint:
                say(f"hint: {notice.message_hint}")
            self._last = text


@contextmanager
def _refusing_values() -> Iterator[None]:
    """Turn errors that the caller has caused into UsageError, which exits with 2.

    One cause is a value that the server does not accept, such as the year 300,000. The other one is a consumer of the
    other mode, for example a stream for `receive`. For that, the hint names the right command.
    """
    try:
        yield
    except CdcbridgeError as error:
        if getattr(error.__cause__, "sqlstate", None) == OTHER_MODE:
            raise UsageError(str(error), hint=right_command() or error.hint) from error.__cause__
        if type(error) is CdcbridgeError and isinstance(error.__cause__, psycopg.DataError):
            raise UsageError(str(error).removeprefix("store: "), hint=error.hint) from error.__cause__
        raise


pass_app = click.make_pass_decorator(App)


def say(text: str) -> None:
    """Print a text for people on stderr. On a terminal it is wrapped between words."""
    click.echo(wrapped(text, width(sys.stderr), rest="    "), err=True)


def print_json(value: Any) -> None:
    """Print one JSON document, indented if stdout is a terminal."""
    options = orjson.OPT_NON_STR_KEYS | (orjson.OPT_INDENT_2 if sys.stdout.isatty() else 0)
    click.echo(orjson.dumps(value, option=options, default=str))


def print_line(value: Any) -> None:
    """Print a value as one JSON line."""
    print_document(orjson.dumps(value, default=str).decode())


def print_document(text: str) -> None:
    """Print a JSON document as one line, in UTF-8 in every locale.

    JSON has raw newlines only between tokens, where a blank replaces them. Strings may contain other characters that
    programs take for the end of a line, such as U+2028. These are escaped.
    """
    for mark, instead in _LINE_ENDS.items():
        text = text.replace(mark, instead)
    click.echo(text.encode())


def print_table(headings: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str = "") -> None:
    """Print a table for people.

    On a terminal that is too narrow for the longest words, each row becomes a block. In a pipe a row is one line.
    Without rows, the sentence `empty` is printed on stderr instead of the table.
    """
    if not rows and empty:
        say(empty)
        return
    cells = [[one_line(as_text(cell)) for cell in row] for row in rows]
    widths = column_widths([headings, *cells], width())
    if widths is None:
        for row in cells:
            facts(list(zip(headings, row, strict=True)))
            click.echo()
        return
    numbers = [
        any(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in column)
        for column in zip(*rows, strict=True)
    ] or [False] * len(headings)
    click.echo(_table(headings, cells, numbers, widths))


def _table(
    headings: Sequence[str], cells: Sequence[Sequence[str]], numbers: Sequence[bool], widths: Sequence[int]
) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, number, columns in zip(headings, numbers, widths, strict=True):
        table.add_column(heading, justify="right" if number else "left", overflow="fold", width=columns)
    for row in cells:
        table.add_row(*row)
    console = Console(width=sum(widths) + 2 * len(widths), highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
