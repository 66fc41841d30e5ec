"""Which server encodings the bridge can work with, and what is said of the others. Pure.

Every session speaks UTF-8 and PostgreSQL converts, so an encoding must have a conversion to UTF-8.
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
    """The problem of a database whose characters cannot be converted to UTF-8."""
    return Problem(
        "encoding",
        "error",
        side,
        f"the {side}'s database has the encoding {encoding}, which PostgreSQL cannot convert to UTF8",
        _MOVE[side],
    )


def narrow_store(store: str, source: str) -> Problem:
    """The problem of a store that lacks characters which the source may have."""
    return Problem(
        "store_encoding",
        "error",
        "store",
        f"the store's database has the encoding {store} and the source's has {source}: a character that {store} lacks"
        " would stop the bridge",
        _MOVE["store"],
    )


def bytes_as_they_are(encoding: str) -> Problem:
    """The problem of wal2json on a database that is not UTF8."""
    return Problem(
        "encoding",
        "error",
        "source",
        f"the source's database has the encoding {encoding}, and wal2json writes UTF8 databases only correctly",
        "Set source.plugin to pgoutput.",
    )


def lacks(side: Literal["source", "store"], encoding: str, where: str, value: str) -> Problem:
    """The problem of a text in the file that the database cannot hold."""
    return Problem(
        "encoding_of_text",
        "error",
        where,
        f"{value!r} has a character that the {side}'s encoding {encoding} lacks",
        f"Write it with characters of {encoding}, or move the {side} to a UTF8 database.",
    )


def without_conversion(message: str) -> str | None:
    """The encoding that a refused connection names, as in `conversion between UTF8 and MULE_INTERNAL`."""
    return next((name for name in WITHOUT_CONVERSION if name in message and "UTF8" in message), None)
