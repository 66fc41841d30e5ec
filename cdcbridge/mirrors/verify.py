"""Compare all tables of a mirror: find them, look twice, and repair if that is wanted.

Between the two looks, the mirror gets time to apply everything that is committed. With two_way, so does the mirror that
leads back. Never changes a row without `right`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Final

from psycopg import sql

from cdcbridge.config import Config, Mirror
from cdcbridge.database import Connection, connect_source, connect_store, source_errors, store_errors, target_errors
from cdcbridge.errors import CdcbridgeError, UsageError
from cdcbridge.lsn import parse_lsn
from cdcbridge.mirrors.compare import Compared, TableComparison, compared_columns
from cdcbridge.mirrors.repair import Side, repair, silence_triggers
from cdcbridge.mirrors.source_tables import SourceTables
from cdcbridge.mirrors.stored_conflicts import open_target
from cdcbridge.mirrors.tables import TargetTable
from cdcbridge.mirrors.target_tables import read_columns
from cdcbridge.source.tables import tables_of

_POLL: Final = 0.1  # seconds between two looks at the mirror's offset
_HEARTBEAT: Final = "cdcbridge.heartbeat"


@dataclass(slots=True)
class VerifiedMirror:
    """The result of a comparison.

    Attributes:
        tables: The result of each table.
        notes: Reasons why rows may differ that the mirror has not applied yet.
    """

    tables: list[Compared] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(one.ok for one in self.tables)


def verify(
    config: Config, mirror: Mirror, table: str | None, *, wait: float, pause: float, right: Side | None = None
) -> VerifiedMirror:
    """Compare the tables of a mirror.

    Args:
        config: The configuration.
        mirror: The mirror.
        table: The only table to compare, as the source names it. None: all.
        wait: The longest time in seconds to wait until the mirror has applied everything.
        pause: The shortest time in seconds between the two looks.
        right: The side whose rows replace those of the other side. None: nothing is changed.

    Raises:
        UsageError: The mirror does not take the table, or its target has a history.
        CdcbridgeError: A row cannot be repaired, or a mirror is too far behind for that.
    """
    if mirror.apply == "append":
        raise UsageError(
            f"the target of {mirror.name!r} has a history (apply: append), which is not equal to the source's tables",
            hint="`cdcbridge verify TABLE` compares a table with the log.",
        )
    with ExitStack() as stack:
        source = stack.enter_context(connect_source(config.source_dsn, "cdcbridge mirror verify"))
        target = stack.enter_context(open_target(mirror))
        found = VerifiedMirror()
        comparisons = []
        tables = stack.enter_context(closing(SourceTables(config.source_dsn)))
        for topic in _topics(config, mirror, source, table):
            compared = _begin(mirror, topic, source, target, tables)
            if isinstance(compared, TableComparison):
                compared.first_look()
                comparisons.append(compared)
                compared = compared.result
            found.tables.append(compared)
        deadline = time.monotonic() + pause
        found.notes += _let_it_apply(config, mirror, source, target, wait)
        time.sleep(max(0.0, deadline - time.monotonic()))
        for one in comparisons:
            one.second_look(_held(config, mirror, one))
        if right is not None:
            _require_applied(mirror, right, found.notes)
            if right == "source":
                silence_triggers(target, mirror)
            for one in comparisons:
                repair(one, right)
    return found


def _require_applied(mirror: Mirror, right: Side, notes: list[str]) -> None:
    """Raise CdcbridgeError if a repair might replace a newer row by an older one that it has not reached yet."""
    if notes and (right == "target" or mirror.two_way is not None):
        raise CdcbridgeError(
            f"nothing was repaired: {notes[0]}",
            hint="Let the mirrors apply everything first. `cdcbridge mirror list` shows what they wait for.",
        )


def _topics(config: Config, mirror: Mirror, source: Connection, table: str | None) -> list[str]:
    """Return the tables that the mirror takes and that exist.

    Raises:
        UsageError: `table` is not one of them.
    """
    known = [one.topic for one in tables_of(source, mirror.patterns, config.store.schema_)]
    if table is None:
        return known
    topic = table if table in known else mirror.topic(table)
    if topic not in known:
        raise UsageError(
            f"the mirror {mirror.name!r} takes no table {table!r}", hint=f"It takes: {', '.join(known) or 'none'}."
        )
    return [topic]


def _begin(
    mirror: Mirror, topic: str, source: Connection, target: Connection, tables: SourceTables
) -> TableComparison | Compared:
    """Return the comparison of a table, or the result if the table cannot be compared."""
    route = mirror.route(topic)
    name = route.to or topic
    key = tables.key(topic)
    with source_errors():
        ours = TargetTable(topic, *_parts(topic), read_columns(source, topic), key, route)
    with target_errors():
        theirs = TargetTable(topic, *_parts(name), read_columns(target, name), key, route)
    if not key:
        return Compared(topic, name, notes=["it has no key, so its rows cannot be compared"])
    if not theirs.columns:
        return Compared(topic, name, fault="the target has no such table")
    columns, notes = compared_columns(ours, theirs)
    missing = [column for column in key if column not in columns]
    if missing:
        return Compared(topic, name, fault=f"the target lacks the column {missing[0]} of the key")
    made = TableComparison(source, target, ours, theirs, columns)
    made.result.notes += notes
    return made


def _parts(topic: str) -> tuple[str, str]:
    schema, _, name = topic.partition(".")
    return schema, name


def _held(config: Config, mirror: Mirror, one: TableComparison) -> Iterator[str]:
    """Yield the keys of a table about which a conflict on either side waits for a decision."""
    with target_errors():
        yield from _held_on(one.target, mirror.target.schema_, one.theirs.full_name)
    if mirror.two_way is not None:
        with source_errors():
            yield from _held_on(one.source, config.store.schema_, one.ours.full_name)


def _held_on(connection: Connection, schema: str, table: str) -> Iterator[str]:
    if connection.execute("select to_regclass(%s)", (f'"{schema}".conflicts',)).fetchone() == (None,):
        return
    query = sql.SQL("select key from {} where state = 'held' and table_name = %s")
    for (key,) in connection.execute(query.format(sql.Identifier(schema, "conflicts")), (table,)).fetchall():
        yield key


# waiting for the mirrors


def _let_it_apply(config: Config, mirror: Mirror, source: Connection, target: Connection, wait: float) -> Iterator[str]:
    """Wait until the mirrors have applied everything that is committed now. Yield why they have not."""
    until = time.monotonic() + wait
    with connect_store(config.store_dsn, config.store.schema_, "cdcbridge mirror verify") as store:
        with source_errors():
            marked = _mark(source)
        if why := _behind(store, mirror.name, marked, until):
            yield why
    if mirror.two_way is None:
        return
    given = mirror.target.store_dsn or mirror.target.dsn
    try:
        with connect_store(given.get_secret_value(), mirror.target.schema_, "cdcbridge mirror verify") as store:
            with target_errors():
                marked = _mark(target)
            if why := _behind(store, mirror.two_way.peer, marked, until):
                yield why
    except CdcbridgeError as error:
        yield f"the mirror {mirror.two_way.peer} of the target could not be asked: {error}"


def _mark(connection: Connection) -> int:
    """Write a small message into the WAL, and return an LSN up to which everything is committed."""
    row = connection.execute(
        "select l.lsn::text, pg_logical_emit_message(true, %s, '')"
        " from (select pg_current_wal_insert_lsn() as lsn offset 0) l",
        (_HEARTBEAT,),
    ).fetchone()
    return parse_lsn(row[0]) if row else 0


def _behind(store: Connection, name: str, lsn: int, until: float) -> str:
    """Wait until a mirror has applied everything up to an LSN. Return why it has not, or ''."""
    seq: int | None = None
    while True:
        with store_errors():
            row = store.execute(
                "select c.paused, m.stopped, mirror_runs(c.id), (select min(o.seq) from newest_offsets(c.id) o),"
                " (select (end_lsn - '0/0')::bigint from positions order by id desc limit 1),"
                " (select max(seq) from messages)"
                " from consumers c left join mirrors m on m.consumer_id = c.id where c.name = %s",
                (name,),
            ).fetchone()
        if row is None:
            return f"the store does not know the mirror {name} yet"
        paused, stopped, runs, offset, end, last = row
        if seq is None and end is not None and end >= lsn:
            seq = last or 0
        if seq is not None and offset is not None and offset >= seq:
            return ""
        if paused or stopped is not None or time.monotonic() > until:
            state = "is paused" if paused else "has stopped" if stopped is not None else "is behind"
            state = state if runs or paused or stopped is not None else "is not running"
            return f"the mirror {name} {state}, so rows may differ that it has not applied yet"
        time.sleep(_POLL)
