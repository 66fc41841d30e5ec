"""Commands that read a queue: receive, peek, ack, nack, extend, dead."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import click
import orjson

from cdcbridge.cli.context import App, as_json, name_argument, pass_app, print_json, print_line, print_table, say
from cdcbridge.database import Connection
from cdcbridge.errors import UsageError
from cdcbridge.units import parse_duration

# Rows as JSON made by the server: data must not go through a Python number, and times are ISO as in JSON.
_RECEIVE = "select to_json(r)::text, r.receipt from receive(%s, %s) r"
_PEEK = "select to_json(r)::text from peek(%s, %s) r"
_LONGEST_SLEEP = 5.0  # seconds between looks of a waiting reader whom no notification reached


class DurationType(click.ParamType[float]):
    """A duration such as 30s."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


DURATION = DurationType()
receipts_argument = click.argument("receipts", nargs=-1, required=True, metavar="RECEIPT...")


@click.command()
@name_argument
@click.option("-n", "--max", "count", type=click.IntRange(1), default=10, show_default=True, help="At most so many.")
@click.option("--wait", type=click.FloatRange(0), default=0, metavar="SECONDS", help="Wait so long for the first one.")
@click.option("--ack", is_flag=True, help="Ack what was printed.")
@pass_app
def receive(app: App, name: str, count: int, wait: float, ack: bool) -> None:
    """Take messages from a consumer's queue: a JSON line each, with the columns of the SQL function.

    An empty queue prints nothing. What is not acked becomes visible again after its visibility timeout.

    \b
    Examples:
      cdcbridge receive billing -n 100 --wait 20 > batch && ./handle batch && cdcbridge ack billing - < batch
      cdcbridge receive billing --ack | jq .data.record
    """
    with app.store() as store:
        rows = _wait_for(store, name, count, wait)
        for line, _ in rows:
            click.echo(line)
        if ack and rows:
            sys.stdout.flush()
            store.execute("select ack(%s, %s, true)", (name, [receipt for _, receipt in rows]))


def _wait_for(store: Connection, name: str, count: int, wait: float) -> list[tuple[str, str]]:
    """receive(), again on each notification and now and then, until there is something or the time is over."""
    deadline = time.monotonic() + wait
    if wait:
        store.execute(b"listen " + _channel(store))
    while True:
        rows = store.execute(_RECEIVE, (name, count)).fetchall()
        left = deadline - time.monotonic()
        if rows or left <= 0:
            return [(row[0], row[1]) for row in rows]
        for _ in store.notifies(timeout=min(left, _LONGEST_SLEEP), stop_after=1):
            pass


def _channel(store: Connection) -> bytes:
    row = store.execute("select quote_ident(current_schema())").fetchone()
    return str(row[0]).encode() if row else b""


@click.command()
@name_argument
@click.option("-n", "--max", "count", type=click.IntRange(1), default=10, show_default=True, help="At most so many.")
@pass_app
def peek(app: App, name: str, count: int) -> None:
    """Look at the next messages without taking them; receipt is null."""
    with app.store() as store:
        for (line,) in store.execute(_PEEK, (name, count)).fetchall():
            click.echo(line)


@click.command()
@name_argument
@receipts_argument
@pass_app
def ack(app: App, name: str, receipts: tuple[str, ...]) -> int:
    """Finish messages. RECEIPT may be `-`: receipts, or lines of `receive`, on stdin."""
    return _settle(app, "acked", "select ack(%s, %s)", name, receipts)


@click.command()
@name_argument
@receipts_argument
@click.option("--delay", type=DURATION, help="Visible again after this; default: the consumer's retry_delay.")
@click.option("--reason", help="Kept in the message's history.")
@click.option("--dead", is_flag=True, help="No further delivery: straight to the dead letters.")
@pass_app
def nack(app: App, name: str, receipts: tuple[str, ...], delay: float | None, reason: str | None, dead: bool) -> int:
    """Give messages back. RECEIPT may be `-`."""
    query = "select nack(%s, %s, make_interval(secs => %s), %s, %s)"
    return _settle(app, "nacked", query, name, receipts, delay, reason, dead)


@click.command()
@name_argument
@receipts_argument
@click.option("--by", "by", type=DURATION, required=True, help="New visibility timeout, counted from now.")
@pass_app
def extend(app: App, name: str, receipts: tuple[str, ...], by: float) -> int:
    """Keep messages invisible for longer. RECEIPT may be `-`."""
    return _settle(app, "extended", "select extend(%s, %s, make_interval(secs => %s))", name, receipts, by)


def _settle(app: App, verb: str, query: str, name: str, receipts: Sequence[str], *arguments: object) -> int:
    given = list(dict.fromkeys(_receipts(receipts)))
    with app.store() as store:
        row = store.execute(query.encode(), (name, given, *arguments)).fetchone()
    done = row[0] if row else 0
    print_line({verb: done})
    if done < len(given):
        say(f"{len(given) - done} of {len(given)} receipts are stale: expired, or settled before")
        return 1
    return 0


def _receipts(given: Sequence[str]) -> list[str]:
    found: list[str] = []
    for receipt in given:
        if receipt != "-":
            found.append(receipt)
            continue
        for line in sys.stdin:
            text = line.strip()
            if text.startswith("{"):
                try:
                    found.append(orjson.loads(text)["receipt"])
                except (orjson.JSONDecodeError, KeyError):
                    raise UsageError(f"stdin: not a line of `receive`: {text[:80]}") from None
            elif text:
                found.append(text)
    return found


@click.group()
def dead() -> None:
    """Dead letters: list, show, redrive, purge."""


ids_argument = click.argument("ids", nargs=-1, type=int, metavar="[ID]...")


@dead.command("list")
@name_argument
@click.option("-n", "--max", "count", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@as_json
@pass_app
def dead_list(app: App, name: str, count: int, as_json: bool) -> None:
    """A consumer's dead letters, the newest first."""
    with app.store() as store:
        rows = store.execute(
            "select d.id, d.seq, d.topic, d.key, d.deliver_count, d.reason, d.died_at from dead_messages d"
            " where d.consumer_id = (queue_named(%s)).id order by d.id desc limit %s",
            (name, count),
        ).fetchall()
    headings = ("id", "seq", "topic", "key", "deliver_count", "reason", "died_at")
    if as_json:
        print_json([dict(zip(headings, row, strict=True)) for row in rows])
    else:
        shown = [(*row[:6], f"{row[6]:%Y-%m-%d %H:%M:%S}") for row in rows]
        print_table(
            [heading.upper().replace("_", " ") for heading in headings], shown, empty=f"{name}: no dead letters"
        )


@dead.command("show")
@name_argument
@click.argument("ids", nargs=-1, type=int, required=True, metavar="ID...")
@pass_app
def dead_show(app: App, name: str, ids: tuple[int, ...]) -> None:
    """Everything about dead letters, with data and history: a JSON line each."""
    with app.store() as store:
        store.execute("select refuse_unknown_dead(queue_named(%s), %s)", (name, list(ids)))
        for (line,) in store.execute(
            "select to_json(d)::text from dead_messages d where d.consumer_id = (queue_named(%s)).id"
            " and d.id = any (%s) order by d.id",
            (name, list(ids)),
        ).fetchall():
            click.echo(line)


@dead.command()
@name_argument
@ids_argument
@pass_app
def redrive(app: App, name: str, ids: tuple[int, ...]) -> None:
    """Put dead letters (all, or those with these ids) back at the end of the queue, with a fresh count."""
    with app.store() as store:
        row = store.execute("select redrive(%s, %s)", (name, list(ids) or None)).fetchone()
    print_line({"redriven": row[0] if row else 0})


@dead.command()
@name_argument
@ids_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def purge(app: App, name: str, ids: tuple[int, ...], yes: bool) -> None:
    """Delete dead letters (all, or those with these ids) for good."""
    if not yes:
        what = f"{len(ids)}" if ids else "all"
        click.confirm(f"Delete {what} dead letters of {name} for good?", abort=True, err=True)
    with app.store() as store:
        row = store.execute("select purge(%s, %s)", (name, list(ids) or None)).fetchone()
    print_line({"purged": row[0] if row else 0})


COMMANDS = (receive, peek, ack, nack, extend, dead)
