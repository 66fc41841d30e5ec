"""Commands for dead letters: list, show, redrive, purge."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import click

from cdcbridge.cli.context import (
    App,
    as_json,
    complete_name,
    name_argument,
    pass_app,
    print_document,
    print_json,
    print_line,
    print_table,
    say,
)
from cdcbridge.cli.pretty import pretty_option, print_pretty
from cdcbridge.database import Connection
from cdcbridge.database.patience import patiently
from cdcbridge.errors import UsageError
from cdcbridge.store.redrive import PAGE, Redriven, chosen_letters, redrive_page

_LETTERS = "dead_letters({}, topic => %(topic)s, key => %(key)s, reason => %(reason)s, at_most => %(count)s) d"
_CHOSEN = f"from {_LETTERS.format('%(name)s')}"
_OF_ALL = f"from consumer_lag() c cross join lateral {_LETTERS.format('c.name')} where c.mode <> 'stream' or c.dead > 0"
_TICKS = 10  # about the number of batches per second, if a redrive has a rate
_Command: TypeAlias = Callable[..., Any]
Entry = TypeVar("Entry")


@click.group()
def dead() -> None:
    """List, show, redrive and purge dead letters."""


def _filters(command: _Command) -> _Command:
    """Add the options that select dead letters: --topic, --key and --reason, for list, redrive and purge."""
    command = click.option(
        "--reason", metavar="TEXT", help="Choose letters whose reason begins with this text, for example oversized:"
    )(command)
    command = click.option("--key", help="Choose letters with this key.")(command)
    return click.option("--topic", help="Choose letters of this topic.")(command)


ids_argument = click.argument("ids", nargs=-1, type=int, metavar="[ID]...")


@dead.command("list")
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("-n", "--max", "count", type=click.IntRange(1), default=50, show_default=True, help="At most this many.")
@_filters
@as_json
@pass_app
def dead_list(
    app: App, name: str | None, count: int, as_json: bool, topic: str | None, key: str | None, reason: str | None
) -> None:
    """List dead letters, the newest first.

    Without NAME it lists those of all consumers.
    """
    columns = ("id", "seq", "topic", "key", "deliver_count", "reason", "died_at")
    selected = ", ".join(f"d.{column}" for column in columns)
    given = {"name": name, "count": count, "topic": topic, "key": key, "reason": reason}
    if name is None:
        query = f"select c.name, {selected} {_OF_ALL} order by d.died_at desc, d.id desc limit %(count)s"
        headings: tuple[str, ...] = ("consumer", *columns)
    else:
        query, headings = f"select {selected} {_CHOSEN} order by d.id desc limit %(count)s", columns
    with app.store(pooled=True) as store:
        rows = store.execute(query.encode(), given).fetchall()
    if as_json:
        print_json([dict(zip(headings, row, strict=True)) for row in rows])
        return
    empty = "no dead letters" if name is None else f"{name}: no dead letters"
    shown = [(*row[:-1], f"{row[-1]:%Y-%m-%d %H:%M:%S}") for row in rows]
    print_table([heading.upper().replace("_", " ") for heading in headings], shown, empty=empty)


@dead.command("show")
@name_argument
@click.argument("ids", nargs=-1, type=int, required=True, metavar="ID...")
@pretty_option
@pass_app
def dead_show(app: App, name: str, ids: tuple[int, ...], pretty: bool) -> None:
    """Show dead letters with data and history, as JSON lines."""
    with app.store(pooled=True) as store:
        for (line,) in store.execute(
            "select to_json(d)::text from dead_letters(%s, %s::bigint[]) d order by d.id", (name, list(ids))
        ).fetchall():
            (print_pretty if pretty else print_document)(line)


@dead.command()
@name_argument
@ids_argument
@_filters
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Put back at most this many a second.")
@pass_app
def redrive(
    app: App,
    name: str,
    ids: tuple[int, ...],
    rate: float | None,
    topic: str | None,
    key: str | None,
    reason: str | None,
) -> None:
    """Put dead letters back into the queue: all, or those chosen.

    They are queued after all waiting messages, and their delivery count starts again at zero.

    Without IDs, letters with the reason `filter_error:` are compared with the consumer's current filter. Letters that
    match are put back. Letters that do not match are removed and counted as not_wanted. Letters on which the filter
    still fails stay and are counted as undecidable. A letter whose ID you give is put back whatever the filter decides.

    \b
    Examples:
      cdcbridge dead redrive billing 7 8
      cdcbridge dead redrive billing --reason filter_error:
      cdcbridge dead redrive billing --reason max_deliveries: --rate 100
    """
    filters = {"topic": topic, "key": key, "reason": reason}
    with app.store(pooled=True) as store:
        if ids:
            _refuse_both(ids, filters)
            done = Redriven(
                sum(_count(store, "select redrive(%s, %s::bigint[])", name, batch) for batch in _paced(ids, rate))
            )
        else:
            done = _redrive_compared(store, name, filters, rate)
    answer = {"redriven": done.redriven}
    if done.compared:
        answer |= {"not_wanted": done.not_wanted, "undecidable": done.undecidable}
    print_line(answer)
    if done.not_wanted:
        say(f"{name}: {done.not_wanted} removed: the filter gives false for them")
    if done.undecidable:
        say(
            f"{name}: {done.undecidable} remain dead letters, because the filter still fails on them, for example:"
            f" {done.why}"
        )
        say(
            f"  Correct the filter (`cdcbridge filter test {name}`) and redrive again, or give the IDs of the letters"
            " to deliver without the filter."
        )


def _redrive_compared(store: Connection, name: str, filters: dict[str, str | None], rate: float | None) -> Redriven:
    letters = chosen_letters(store, name, filters)
    done = Redriven()
    for page in _paced(letters, rate, PAGE):
        redrive_page(store, name, page, done)
    if not letters:
        redrive_page(store, name, [], done)  # so that a read-only store is reported, even if there are no letters
    return done


@dead.command()
@name_argument
@ids_argument
@_filters
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def purge(
    app: App, name: str, ids: tuple[int, ...], yes: bool, topic: str | None, key: str | None, reason: str | None
) -> None:
    """Delete dead letters for good: all, or those chosen."""
    with app.store(pooled=True) as store:
        chosen = _choose(store, name, ids, {"topic": topic, "key": key, "reason": reason})
        if not yes:
            what = "all" if chosen is None else str(len(chosen))
            click.confirm(f"Delete {what} dead letters of {name} for good?", abort=True, err=True)
        if chosen is None:
            purged = _count(store, "select purge(%s)", name)
        else:
            purged = _count(store, "select purge(%s, %s::bigint[])", name, chosen)
    print_line({"purged": purged})


def _refuse_both(ids: tuple[int, ...], filters: dict[str, str | None]) -> None:
    if ids and any(value is not None for value in filters.values()):
        raise UsageError("give either IDs or filters")


def _choose(store: Connection, name: str, ids: tuple[int, ...], filters: dict[str, str | None]) -> list[int] | None:
    """Return the given IDs, or the IDs that the filters find in log order. Return None for all dead letters."""
    _refuse_both(ids, filters)
    if ids:
        return list(ids)
    if all(value is None for value in filters.values()):
        return None
    rows = store.execute(
        f"select d.id {_CHOSEN} order by d.seq, d.id".encode(), {"name": name, "count": None, **filters}
    ).fetchall()
    return [row[0] for row in rows]


def _paced(entries: Sequence[Entry], rate: float | None, most: int | None = None) -> Iterator[list[Entry]]:
    """Yield the entries in batches, not faster than `rate` entries a second.

    Without a rate there is no pause. A batch has at most `most` entries, and without `most` it has all of them.
    """
    size = max(1, len(entries) if most is None else most)
    if rate is not None:
        size = max(1, min(size, int(rate / _TICKS)))
    started = time.monotonic()
    for start in range(0, len(entries), size):
        if rate is not None:
            time.sleep(max(0.0, started + start / rate - time.monotonic()))
        yield list(entries[start : start + size])


def _count(store: Connection, query: str, *arguments: Any) -> int:
    row = patiently(
        store, lambda: store.execute(query.encode(), arguments).fetchone(), what=f"the call for {arguments[0]}"
    )
    return row[0] if row else 0


COMMANDS = (dead,)
