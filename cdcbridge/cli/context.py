"""What the commands share: the configuration on demand, and how things are printed. Data on stdout, talk on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import orjson

from cdcbridge.config import Config, load
from cdcbridge.database import Connection, connect_store, store_errors
from cdcbridge.errors import CdcbridgeError, OperatorNeeded
from cdcbridge.logs import configure
from cdcbridge.migrate import schema_version

as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")


def _complete_name(context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Consumers of the configuration file, for the shell; nothing where it cannot be read."""
    path = context.find_root().params.get("path")
    try:
        consumers = load(Path(path or "cdcbridge.yaml")).consumers
    except CdcbridgeError:
        return []
    return [consumer.name for consumer in consumers if consumer.name.startswith(incomplete)]


name_argument = click.argument("name", shell_complete=_complete_name)


class App:
    """What the group hands to its commands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def config(self) -> Config:
        config = load(self.path)
        configure(config.log.format, config.log.level)
        return config

    @contextmanager
    def store(self) -> Iterator[Connection]:
        """A session on a store that has been migrated. Raises OperatorNeeded where it has not."""
        connection = connect_store(self.config.store_dsn, self.config.store.schema_, "cdcbridge cli")
        with connection, store_errors():
            if schema_version(connection) == 0:
                raise OperatorNeeded(
                    f"there is no cdcbridge store in the schema {self.config.store.schema_!r}",
                    hint="`cdcbridge migrate` makes it; `cdcbridge run` does so too.",
                )
            connection.add_notice_handler(lambda notice: say(f"notice: {notice.message_primary}"))
            yield connection


pass_app = click.make_pass_decorator(App)


def say(text: str) -> None:
    """To people, on stderr."""
    click.echo(text, err=True)


def print_json(value: Any) -> None:
    """One document, indented where a person looks at it."""
    options = orjson.OPT_NON_STR_KEYS | (orjson.OPT_INDENT_2 if sys.stdout.isatty() else 0)
    click.echo(orjson.dumps(value, option=options, default=str))


def print_line(value: Any) -> None:
    """One JSON line."""
    click.echo(orjson.dumps(value, default=str))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str = "") -> None:
    """A table for people; `empty` is said instead of a table without rows."""
    from rich.console import Console
    from rich.table import Table

    if not rows and empty:
        say(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        numbers = any(isinstance(row[len(table.columns)], int | float) for row in rows)
        table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
