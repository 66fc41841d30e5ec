"""Commands that read a queue or write to it: receive, peek, ack, nack, extend, publish."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click
import psycopg

from cdcbridge.cli.context import DURATION, App, name_argument, pass_app, print_document, print_line, say
from cdcbridge.cli.pretty import pretty_option, print_pretty
from cdcbridge.cli.receipts import read_receipts
from cdcbridge.cli.where import TIME
from cdcbridge.database import Connection, one_line
from cdcbridge.database.patience import patiently
from cdcbridge.database.pooled import PooledConnection
from cdcbridge.errors import StoreUnavailable, UsageError
from cdcbridge.store.holders import consumer_holders, told

# The server turns rows into JSON: a number of the data must not become a Python number, which might change it. Times
# are in ISO format, as elsewhere in JSON.
_RECEIVE = "select to_json(r)::text, r.receipt from receive(%s, %s::int, make_interval(secs => %s)) r"
_PEEK = "select to_json(r)::text from peek(%s, %s::int, %s) r"
# The function is called in FROM, so that the setting is read after the call.
_PUBLISH = (
    "select p.seq, current_setting('cdcbridge.duplicate', true)"
    " from publish(%s, %s, %s::json, time_of(%s, 'time'), %s, make_interval(secs => %s)) p (seq)"
)
_LONGEST_SLEEP = 5.0  # seconds between two looks of a waiting receiver at most, if no notification arrives
_SHORTEST_SLEEP = 0.02  # seconds between two looks at least, while messages wait that cannot be claimed
_LOOK = 1.0  # seconds between two looks at most through a pooler, where a receiver gets no notifications
_RETRY = 1.0  # seconds between two attempts to reach a server that is unavailable
_HELD_FOR = 0.1  # seconds that a transaction holds messages before it is reported


receipts_argument = click.argument("receipts", nargs=-1, required=True, metavar="RECEIPT...")


@click.command()
@name_argument
@click.option("-n", "--max", "count", type=click.IntRange(1), default=10, show_default=True, help="At most this many.")
@click.option("--wait", type=DURATION, default=0, help="Wait this long for the first message, for example 20s.")
@click.option("--visibility-timeout", "timeout", type=DURATION, help="The visibility timeout. Default: the consumer's.")
@click.option("--ack", is_flag=True, help="Ack the messages after printing them.")
@pretty_option
@pass_app
def receive(app: App, name: str, count: int, wait: float, timeout: float | None, ack: bool, pretty: bool) -> None:
    """Receive messages of a queue, as JSON lines.

    Each line has the columns of the SQL function receive().

    An empty queue prints nothing. Messages that are not acked become visible again after their visibility timeout. If
    an open transaction holds the messages, stderr names its session.

    \b
    Examples:
      cdcbridge receive billing -n 100 --wait 20 > batch && ./handle batch && cdcbridge ack billing - < batch
      cdcbridge receive billing --ack | jq .data.record
    """
    deadline = time.monotonic() + wait
    taken = False
    while not taken:
        try:
            with app.store(pooled=True) as store:
                rows = _wait_for(store, (name, count, timeout), deadline)
                taken = True
                for line, _ in rows:
                    (print_pretty if pretty else print_document)(line)
                if not rows:
                    for holder in told(consumer_holders(store, name, seconds=_HELD_FOR)):
                        say(holder)
                if ack and rows:
                    sys.stdout.flush()
                    store.execute("select ack(%s, %s, true)", (name, [receipt for _, receipt in rows]))
        except StoreUnavailable as error:
            left = deadline - time.monotonic()
            if taken or left <= 0:
                raise
            say(f"{error}. Trying again")
            time.sleep(min(left, _RETRY))


def _wait_for(store: Connection, wanted: tuple[str, int, float | None], deadline: float) -> list[tuple[str, str]]:
    """Call receive() until it returns messages, or until the deadline by time.monotonic() has passed.

    The calls are repeated after a notification, when a timeout or a delay ends, and after _LONGEST_SLEEP at the latest.
    Through a pooler there are no notifications, so they are repeated after _LOOK.
    """
    listens = deadline > time.monotonic() and not isinstance(store, PooledConnection)
    if listens:
        store.execute(b"listen " + _channel(store))
    while True:
        rows = store.execute(_RECEIVE, wanted).fetchall()
        left = deadline - time.monotonic()
        if rows or left <= 0:
            return [(row[0], row[1]) for row in rows]
        soon = store.execute("select next_visible(%s)", wanted[:1]).fetchone()
        sleep = _LONGEST_SLEEP if not soon or soon[0] is None else max(_SHORTEST_SLEEP, min(soon[0], _LONGEST_SLEEP))
        if not listens:
            time.sleep(min(left, sleep, _LOOK))
            continue
        for _ in store.notifies(timeout=min(left, sleep), stop_after=1):
            pass


def _channel(store: Connection) -> bytes:
    row = store.execute("select quote_ident(current_schema())").fetchone()
    return str(row[0]).encode() if row else b""


@click.command()
@name_argument
@click.option("-n", "--max", "count", type=click.IntRange(1), default=10, show_default=True, help="At most this many.")
@click.option("--delayed", is_flag=True, help="Show delayed messages instead, the next one first.")
@pretty_option
@pass_app
def peek(app: App, name: str, count: int, delayed: bool, pretty: bool) -> None:
    """Show the next messages without receiving them.

    The receipt is null. With --delayed it shows messages that were given back or published for later, and
    not_visible_until is the time when they become visible.
    """
    with app.store(pooled=True) as store:
        for (line,) in store.execute(_PEEK, (name, count, delayed)).fetchall():
            (print_pretty if pretty else print_document)(line)


@click.command()
@name_argument
@receipts_argument
@pass_app
def ack(app: App, name: str, receipts: tuple[str, ...]) -> int:
    """Finish messages.

    RECEIPT may be `-`: then stdin has receipts, or lines that `receive` printed.
    """
    return _settle(app, "acked", "select ack(%s, %s)", name, receipts)


@click.command()
@name_argument
@receipts_argument
@click.option(
    "--delay", type=DURATION, help="The time until they are delivered again. Default: the consumer's retry_delay."
)
@click.option("--reason", help="A reason, which is stored in the history of the message.")
@click.option("--dead", is_flag=True, help="Make them dead letters instead.")
@pass_app
def nack(app: App, name: str, receipts: tuple[str, ...], delay: float | None, reason: str | None, dead: bool) -> int:
    """Give messages back to the queue.

    RECEIPT may be `-`: then stdin has receipts, or lines that `receive` printed.
    """
    query = "select nack(%s, %s, make_interval(secs => %s), %s, %s)"
    return _settle(app, "nacked", query, name, receipts, delay, reason, dead)


@click.command()
@name_argument
@receipts_argument
@click.option("--by", "by", type=DURATION, required=True, help="The new visibility timeout, counted from now.")
@pass_app
def extend(app: App, name: str, receipts: tuple[str, ...], by: float) -> int:
    """Keep messages invisible for longer.

    RECEIPT may be `-`: then stdin has receipts, or lines that `receive` printed.
    """
    return _settle(app, "extended", "select extend(%s, %s, make_interval(secs => %s))", name, receipts, by)


def _settle(app: App, verb: str, query: str, name: str, receipts: Sequence[str], *arguments: object) -> int:
    given = list(dict.fromkeys(_receipts(receipts)))
    with app.store(pooled=True) as store:
        row = patiently(
            store,
            lambda: store.execute(query.encode(), (name, given, *arguments)).fetchone(),
            what=f"the call for {name}",
        )
    done = row[0] if row else 0
    print_line({verb: done})
    if done < len(given):
        which = "the receipt is" if len(given) == 1 else f"{len(given) - done} of {len(given)} receipts are"
        say(f"{which} stale: expired, or already acked or nacked")
        return 1
    return 0


def _receipts(given: Sequence[str]) -> list[str]:
    found: list[str] = []
    for receipt in given:
        if receipt != "-":
            found.append(receipt)
            continue
        found += read_receipts(sys.stdin.buffer)
    return found


@click.command()
@click.argument("topic")
@click.argument("data", nargs=-1)
@click.option("--key", help="The key of the messages.")
@click.option("--delay", type=DURATION, help="Deliver them after this time, for example 5m.")
@click.option("--deliver-at", type=TIME, help="Deliver them from this time on: 2026-05-01 10:00+02, +1h, tomorrow.")
@click.option("--dedup-id", help="Publish once within 5 minutes, even if the command is repeated.")
@pass_app
def publish(
    app: App,
    topic: str,
    data: tuple[str, ...],
    key: str | None,
    delay: float | None,
    deliver_at: str | None,
    dedup_id: str | None,
) -> None:
    """Publish JSON messages to the consumers of a topic.

    Each DATA, or each line of stdin, is one message. The command prints a seq for each.

    With --dedup-id it also prints "duplicate": true if such a message was published before. Then nothing is added.

    \b
    Examples:
      cdcbridge publish invoices '{"id": 42}' --key 42
      cdcbridge publish reminders '{"id": 42}' --delay 5m
      jq -c .[] invoices.json | cdcbridge publish invoices
    """
    texts: Iterable[str | bytes] = data or filter(None, map(bytes.strip, sys.stdin.buffer))
    with app.store(pooled=True) as store:
        for number, text in enumerate(texts, 1):
            try:
                values = (topic, key, _decoded(text), deliver_at, dedup_id, delay)
                row = _publish_once(store, values, dedup_id) if dedup_id else store.execute(_PUBLISH, values).fetchone()
            except (psycopg.DataError, UnicodeDecodeError) as error:
                if getattr(error, "sqlstate", None) not in (None, "22P02"):  # 22P02: no JSON. None: NUL or no UTF-8
                    raise
                shown = text if isinstance(text, str) else text.decode(errors="replace")
                where = f"argument {number}" if data else f"stdin: line {number}"
                raise UsageError(f"{where}: not JSON: {_reason(error)}: {shown[:80]}") from None
            seq, duplicate = row or (None, None)
            print_line({"seq": seq} if dedup_id is None else {"seq": seq, "duplicate": duplicate == "on"})


def _publish_once(store: Connection, values: tuple[Any, ...], dedup_id: str) -> Any:
    """Publish with a deduplication ID.

    While another transaction that published with the same ID is open, the server cannot know whether this is a
    duplicate. Then wait for a limited time until that transaction ends.
    """
    return patiently(
        store,
        lambda: store.execute(_PUBLISH, values).fetchone(),
        what=f"publish {values[0]} --dedup-id {dedup_id}",
    )


def _decoded(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode()


def _reason(error: psycopg.Error | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return one_line(error.diag.message_detail or error.diag.message_primary or str(error)).rstrip(".")


COMMANDS = (receive, peek, ack, nack, extend, publish)
