"""Make the configuration that `cdcbridge init` writes, from the tables of a database.

Reads the catalogue and runs the checks of `cdcbridge check`. Never changes anything in the database.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from cdcbridge.checks.identity import identity_fix, identity_trouble
from cdcbridge.checks.server import check
from cdcbridge.config import Consumer, load
from cdcbridge.database import Connection, connect_source, source_errors
from cdcbridge.errors import CdcbridgeError, ConfigError
from cdcbridge.problem import Problem
from cdcbridge.schemas import both
from cdcbridge.source.slots import slots
from cdcbridge.source.tables import Table, dotted_schemas, find_tables

VARIABLE: Final = "DATABASE_URL"
_SCHEMA: Final = "cdcbridge"
_VIRTUAL_SINCE: Final = 180000
_PLAIN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\.[A-Za-z_][A-Za-z0-9_]*")
# Tables of an extension, such as spatial_ref_sys of PostGIS, do not belong to the application.
_OF_EXTENSIONS: Final = "select objid::int8 from pg_depend where classid = 'pg_class'::regclass and deptype = 'e'"
_ELSEWHERE: Final = """
    select n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'r' and c.relpersistence = 'u' and not c.relispartition and n.nspname !~ '^pg_'
      and n.nspname <> all (%s) and n.nspname <> 'information_schema' order by 1
"""


@dataclass(slots=True, frozen=True)
class Left:
    """A table that the file names only in a comment, because it cannot be captured yet.

    Attributes:
        fix: The SQL or the sentence after which it can be captured. '' if there is none.
    """

    name: str
    reason: str
    fix: str


@dataclass(slots=True)
class Starter:
    """The text of the file, and the remarks that are printed about it.

    Attributes:
        taken: Each table that the file lists, and the remark on its key.
        problems: The problems that `check` finds with the file.
    """

    text: str = ""
    taken: list[tuple[str, str]] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def make(dsn: str, written: str) -> Starter:
    """Look at the tables of the database and make the text of the file.

    Args:
        dsn: The connection string to use now.
        written: The connection string in the file, for example `${DATABASE_URL}`.

    Raises:
        SourceUnavailable: The database cannot be reached.
        UsageError: The connection string cannot be parsed.
    """
    made = Starter()
    with connect_source(dsn, "cdcbridge init") as connection:
        database = connection.info.dbname
        _look(connection, made)
        slot = _free_name(connection, database)
    made.text = _file(made, written, database, slot)
    made.problems = _problems(made.text, dsn, written)
    if made.problems:
        made.text = _file(made, written, database, slot)
    return made


def _look(connection: Connection, made: Starter) -> None:
    strict = connection.info.server_version >= _VIRTUAL_SINCE
    with source_errors():
        foreign = {oid for (oid,) in connection.execute(_OF_EXTENSIONS).fetchall()}
        unlogged = [name for (name,) in connection.execute(_ELSEWHERE, (list(both(_SCHEMA)),)).fetchall()]
    for table in find_tables(connection, "*.*", _SCHEMA):
        if table.oid in foreign:
            continue
        troubled = [
            (one, said)
            for one in (table, *(leaf for leaf in table.leaves if leaf.logged))
            if (said := identity_trouble(one, strict=strict))
        ]
        if not _nameable(table.topic):
            made.left.append(Left(table.topic, "its name cannot be written in `tables`", "Rename it."))
        elif troubled:
            reason = "no replica identity: " + "; ".join(
                said if one is table else f"partition {one.topic}: {said}" for one, said in troubled
            )
            fix = "\n".join(identity_fix(one, (), strict=strict) for one, _ in troubled)
            made.left.append(Left(table.topic, reason, fix))
        else:
            made.taken.append((table.topic, _key(table)))
    made.left += [Left(name, "it is unlogged: its changes are not in the WAL", "") for name in unlogged]
    made.left += [
        Left(f"{schema}.*", "the name of a schema must not have a dot", "") for schema in dotted_schemas(connection)
    ]


def _nameable(topic: str) -> bool:
    try:
        consumer = Consumer.model_validate({"name": "changes", "tables": [topic]})
    except ValidationError:
        return False
    return consumer.tables == (topic,) and topic[0] != "!" and "*" not in topic and "${" not in topic


def _key(table: Table) -> str:
    """Return the remark on the columns that order the table's messages.

    The messages of a table without a key are in no order.
    """
    index = table.primary_key if table.primary_key and table.primary_key.usable else table.identity_index
    if index is None:
        return "no key: its messages are in no order"
    return f"key: {', '.join(index.columns)}"


def _free_name(connection: Connection, database: str) -> str:
    """Return the name of a new slot: `cdcbridge`, or another name if a different database has a slot `cdcbridge`."""
    if all(slot.database == database for slot in slots(connection, "cdcbridge")):
        return "cdcbridge"
    name = re.sub(r"[^a-z0-9_]", "_", f"cdcbridge_{database}".lower())
    return name[:63]


def _problems(text: str, dsn: str, written: str) -> list[Problem]:
    """Run `check` on this text of the file, and return the problems.

    The text does not contain the problems yet. An error that prevents the check becomes a problem as well.
    """
    environment = {VARIABLE: dsn} if written == f"${{{VARIABLE}}}" else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cdcbridge.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return [p for p in check(load(path, environment)) if p.code != "wildcard_identity"]
        except ConfigError as error:  # a CDCBRIDGE_… variable, which overrides the file, is wrong
            said = str(error).replace(f"{path}", "the file")
            return [Problem("configuration", "error", "environment", said, error.hint or "Correct the variable.")]
        except CdcbridgeError as error:
            return [Problem("unchecked", "error", "check", str(error), error.hint or "Run `cdcbridge check`.")]


def _file(made: Starter, written: str, database: str, slot: str) -> str:
    return "\n".join([*_head(made, database), *_source(written, slot), *_consumers(made), ""])


def _head(made: Starter, database: str) -> Iterator[str]:
    yield f"# cdcbridge: the changes of the database {_shown(database)}. Written by `cdcbridge init`."
    yield "#"
    yield "#   cdcbridge check                        problems, each with its fix"
    yield "#   cdcbridge run                          the bridge"
    if made.taken:
        yield "#   cdcbridge receive changes --wait 20    the messages of the consumer below"
    yield "#"
    yield "# `cdcbridge config schema` lists every key. Values are read again when the bridge starts."
    if made.problems:
        yield "#"
        yield "# To fix, from `cdcbridge check`:"
        for problem in made.problems:
            yield from _comment(f"{problem.severity}: {problem.object}: {problem.message}", "#   ")
            yield from _comment(f"fix: {problem.brief}", "#     ")
    yield ""


def _source(written: str, slot: str) -> Iterator[str]:
    yield "source:"
    yield f"  dsn: {_scalar(written)}"
    yield f"  slot: {slot}                   # the replication slot. The first `run` creates it"
    yield "  plugin: auto                      # wal2json if the server has a new version, otherwise pgoutput"
    yield "  max_retained_wal: 10GB            # an alarm when the slot holds back more WAL than this"
    yield "  max_slot_inactive: 5m             # an alarm when no bridge has read the slot for longer than this"
    yield ""
    yield "store:"
    yield "  # dsn: ${STORE_URL}               # another server for the queues (default: the source)"
    yield f"  schema: {_SCHEMA}                 # the first `run` creates it"
    yield "  retention: 7d                     # how long the log keeps messages that every consumer has finished"
    yield ""


def _consumers(made: Starter) -> Iterator[str]:
    if not made.taken:
        yield "# No table can be captured yet. A consumer looks like this:"
        yield "#   - name: changes"
        yield "#     mode: fifo"
        yield "#     tables: [public.orders]"
        yield from _left(made, "# ")
        yield "consumers: []"
        return
    yield "consumers:"
    yield "  - name: changes"
    yield "    mode: fifo                      # one message of a key at a time, in order | queue | stream"
    yield "    start: now                      # snapshot: also the existing rows"
    yield "    visibility_timeout: 30s         # a message that is not acked by then is delivered again"
    yield "    max_deliveries: 5               # then it becomes a dead letter: `cdcbridge dead list`"
    yield "    # filter: \"op != 'truncate'\"    # which messages; `cdcbridge filter test changes` tries it"
    yield "    # columns: {exclude: [password]}  # columns that receivers do not get"
    yield "    tables:"
    width = max(len(_scalar(name)) for name, _ in made.taken)
    for name, key in made.taken:
        yield f"      - {_scalar(name):<{width}}  # {_shown(key)}"
    yield from _left(made, "      # ")


def _left(made: Starter, prefix: str) -> Iterator[str]:
    if not made.left:
        return
    yield prefix.rstrip()
    yield f"{prefix}Left out. After its fix, a table can be listed here:"
    for left in made.left:
        yield from _comment(f"- {_scalar(left.name)}  # {left.reason}", prefix)
        for line in left.fix.splitlines():
            yield from _comment(f"    {line}", prefix)


def _comment(text: str, prefix: str) -> Iterator[str]:
    for line in text.splitlines():
        yield f"{prefix}{_shown(line)}".rstrip()


def _shown(text: str) -> str:
    """Return a text for a comment, with its unprintable characters escaped.

    Some of them, such as U+2028, end a line in YAML, and the rest of the text would no longer be a comment.
    """
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _scalar(text: str) -> str:
    """Return the text as a YAML scalar on one line."""
    if _PLAIN.fullmatch(text) or text == f"${{{VARIABLE}}}":
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(text, ensure_ascii=False))
