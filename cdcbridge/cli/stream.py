"""Commands that read a stream without moving its group: read, tail."""

from __future__ import annotations

import time
from typing import Final

import click
from click.core import ParameterSource

from cdcbridge.cli.context import App, name_argument, pass_app, print_document, say
from cdcbridge.cli.where import PLACE, PLACE_HELP, PlaceCommand
from cdcbridge.database import Connection
from cdcbridge.database.pooled import PooledConnection
from cdcbridge.errors import StoreUnavailable, UsageError

# The server turns rows into JSON, as for `receive`.
_PEEK: Final = "select to_json(r)::text, r.seq from peek_stream(%s, %s::int, %s, %s) r"
_PAGE: Final = 1000
# Seconds between two looks. The rollback of a publisher that held messages back sends no notification.
_LONGEST_SLEEP: Final = 2.0
_LOOK: Final = 1.0  # seconds between two looks through a pooler, where a reader gets no notifications
_RETRY: Final = 1.0


@click.command(cls=PlaceCommand)
@name_argument
@click.option("-n", "--max", "count", type=click.IntRange(1), default=10, show_default=True, help="At most this many.")
@click.option("--from", "place", type=PLACE, help=f"The first message. Default: the group's offsets. {PLACE_HELP}")
@pass_app
def read(app: App, name: str, count: int, place: str | None) -> None:
    """Show messages of a stream, as JSON lines.

    They have the order of the log. No offset moves, and the receipt is null.

    Without --from it shows the messages that the group has not read yet. `cdcbridge offsets seek` moves the group.

    \b
    Examples:
      cdcbridge read audit -n 100
      cdcbridge read audit --from -1h | jq .data.record
    """
    with app.store(pooled=True) as store:
        _print(store, name, count, place)


@click.command(cls=PlaceCommand)
@name_argument
@click.option(
    "-n",
    "--max",
    "count",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Print this many messages, the last ones.",
)
@click.option("--from", "place", type=PLACE, help=f"Begin with all messages from here on. {PLACE_HELP}")
@pass_app
def tail(app: App, name: str, count: int, place: str | None) -> None:
    """Follow a stream until Ctrl-C.

    It prints the last messages, then each new one. No offset moves.

    \b
    Examples:
      cdcbridge tail audit
      cdcbridge tail audit --from yesterday | jq 'select(.topic == "public.orders")'
    """
    if place is not None and click.get_current_context().get_parameter_source("count") is ParameterSource.COMMANDLINE:
        raise UsageError(
            "give either -n or --from: -n prints the last messages, and --from prints all messages from a place on",
            hint=f"`cdcbridge read {name} --from {place} -n {count}` prints the first ones from there.",
        )
    following = _Following(name, count, place)
    try:
        while True:
            try:
                with app.store(pooled=True) as store:
                    following.run(store)
            except StoreUnavailable as error:
                say(f"{error}. Trying again")
                time.sleep(_RETRY)
    except KeyboardInterrupt:
        return


class _Following:
    """The place of a `tail` in the stream.

    The object is kept when a session is lost, so that the next session continues there.
    """

    def __init__(self, name: str, count: int, place: str | None) -> None:
        self._name = name
        self._count = count
        self._place = place

    def run(self, store: Connection) -> None:
        """Print the messages that exist, and new ones as they arrive, until the session is lost."""
        listens = not isinstance(store, PooledConnection)
        if listens:
            row = store.execute("select quote_ident(current_schema())").fetchone()
            store.execute(b"listen " + str(row[0] if row else "cdcbridge").encode())
        if self._place is None or self._place.lower() == "latest":
            self._begin(store)
        while True:
            self._catch_up(store)
            if listens:
                for _ in store.notifies(timeout=_LONGEST_SLEEP, stop_after=1):
                    pass
            else:
                time.sleep(_LOOK)

    def _begin(self, store: Connection) -> None:
        """Print the last messages, and continue after them.

        Continue after max_safe_seq() at the earliest. No open transaction can still commit a message up to that seq, so
        none is skipped.
        """
        row = store.execute("select max_safe_seq()").fetchone()
        end = row[0] if row else 0
        last = (
            _print(store, self._name, self._count, None, newest=True) if self._count and self._place is None else None
        )
        self._place = str(max(end, last or 0) + 1)

    def _catch_up(self, store: Connection) -> None:
        while (last := _print(store, self._name, _PAGE, self._place)) is not None:
            self._place = str(last + 1)


def _print(store: Connection, name: str, count: int, place: str | None, *, newest: bool = False) -> int | None:
    """Print up to `count` messages, and return the seq of the last one, or None."""
    last = None
    for line, last in store.execute(_PEEK, (name, count, place, newest)).fetchall():  # noqa: B007 - it is returned
        print_document(line)
    return last


COMMANDS = (read, tail)
