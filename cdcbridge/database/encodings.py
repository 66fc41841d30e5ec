"""The server encodings that the bridge cannot work with, and the problems that result.

Every session uses UTF-8, and PostgreSQL converts to it. An encoding must therefore have a conversion to UTF-8. This
module is pure. Never converts a text itself.

Source: PostgreSQL manual, "Character Set Support".
"""

from __future__ import annotations

from typing import Final, Literal

from cdcbridge.problem import Problem

WITHOUT_CONVERSION: Final = ("SQL_ASCII", "MULE_INTERNAL")
_CREATE: Final = "create database {} encoding 'UTF8' locale 'C' template template0;"
_MOVE: Final = {
    "source": _CREATE.format("new_name") + " -- then load a dump of the old one, and name it in source.dsn",
    "store": _CREATE.format("cdcbridge_store") + " -- and name it in store.dsn",
}


def unusable(side: Literal["source", "store"], encoding: str) -> Problem:
    """Return the problem of a database whose characters cannot be converted to UTF-8."""
    return Problem(
        "encoding",
        "error",
        side,
        f"the {side}'s database has the encoding {encoding}, which PostgreSQL cannot convert to UTF8",
        _MOVE[side],
    )


def narrow_store(store: str, source: str) -> Problem:
    """Return the problem of a store that lacks characters which the source may contain."""
    return Problem(
        "store_encoding",
        "error",
        "store",
        f"the store's database has the encoding {store} and the source's has {source}: a character that {store} lacks"
        " would stop the bridge",
        _MOVE["store"],
    )


def bytes_as_they_are(encoding: str) -> Problem:
    """Return the problem of wal2json on a database whose encoding is not UTF8."""
    return Problem(
        "encoding",
        "error",
        "source",
        f"the source's database has the encoding {encoding}, and wal2json writes UTF8 databases only correctly",
        "Set source.plugin to pgoutput.",
    )


def lacks(side: Literal["source", "store"], encoding: str, where: str, value: str) -> Problem:
    """Return the problem of a text in the configuration that the database cannot store."""
    return Problem(
        "encoding_of_text",
        "error",
        where,
        f"{value!r} has a character that the {side}'s encoding {encoding} lacks",
        f"Write it with characters of {encoding}, or move the {side} to a UTF8 database.",
    )


def without_conversion(message: str) -> str | None:
    """Return the encoding without conversion that the message of a refused connection names, or None.

    For example, the message contains `conversion between UTF8 and MULE_INTERNAL`.
    """
    return next((name for name in WITHOUT_CONVERSION if name in message and "UTF8" in message), None)
