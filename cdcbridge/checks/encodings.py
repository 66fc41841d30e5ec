"""Check that the bridge can read every character of the source, and that the store can hold it.

This module reads both databases and never changes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import psycopg

from cdcbridge.config import Config
from cdcbridge.database import Connection
from cdcbridge.database.encodings import WITHOUT_CONVERSION, bytes_as_they_are, lacks, narrow_store, unusable
from cdcbridge.problem import Problem

_OF_TABLES: Final = ("tables", "key", "columns")


def encoding_problems(
    config: Config, connection: Connection, store: Connection | None, plugin: str
) -> Iterator[Problem]:
    """Yield the problems of both databases' encodings, and of the file's texts that an encoding cannot represent.

    `store` is None if the store was not reached. Then only the source is checked.
    """
    encoding = server_encoding(connection)
    if encoding in WITHOUT_CONVERSION:
        yield unusable("source", encoding)
    elif plugin == "wal2json" and encoding != "UTF8":
        yield bytes_as_they_are(encoding)
    else:
        yield from _texts(config, connection, encoding)
    if store is None:
        return
    holds = server_encoding(store)
    if holds in WITHOUT_CONVERSION:
        yield unusable("store", holds)
    elif holds not in ("UTF8", encoding):
        yield narrow_store(holds, encoding)
    elif holds != "UTF8":
        yield from _configurations(config, store, holds)


def server_encoding(connection: Connection) -> str:
    """Return PostgreSQL's name of the database's encoding, for example `UTF8`."""
    row = connection.execute("select getdatabaseencoding()").fetchone()
    return str(row[0]) if row else ""


def _texts(config: Config, connection: Connection, encoding: str) -> Iterator[Problem]:
    """Find names of tables, columns and the publication that the source's encoding cannot represent."""
    for consumer in config.consumers:
        for what, value in _names(consumer.model_dump(mode="json")):
            if not can_hold(connection, value):
                yield lacks("source", encoding, f"consumers.{consumer.name}.{what}", value)
    if not can_hold(connection, config.source.publication):
        yield lacks("source", encoding, "source.publication", config.source.publication)


def _configurations(config: Config, store: Connection, encoding: str) -> Iterator[Problem]:
    """Find the other texts that the store keeps and that its encoding cannot represent.

    The store has the same encoding as the source here, so the names of tables and columns are left to `_texts()`.
    """
    for consumer in config.consumers:
        for what, value in _leaves(consumer.model_dump(mode="json", exclude=set(_OF_TABLES))):
            if not can_hold(store, value):
                yield lacks("store", encoding, f"consumers.{consumer.name}.{what}", value)
    if not can_hold(store, config.store.schema_):
        yield lacks("store", encoding, "store.schema", config.store.schema_)


def _names(consumer: dict[str, object]) -> Iterator[tuple[str, str]]:
    for what in _OF_TABLES:
        yield from _leaves(consumer.get(what), what)


def _leaves(value: object, what: str = "") -> Iterator[tuple[str, str]]:
    """Yield the place and the value of each text in a document, for example `("tables", "public.t")`."""
    if isinstance(value, str):
        yield what, value
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, what)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{what}.{name}".lstrip("."))


def can_hold(connection: Connection, value: str) -> bool:
    """Return whether the database's encoding has all characters of the text."""
    if value.isascii():
        return True
    try:
        with connection.transaction():
            connection.execute("select %s::text", (value,))
    except (psycopg.errors.UntranslatableCharacter, psycopg.errors.CharacterNotInRepertoire):
        return False
    return True
