"""Recognise a consumer's role, which has fewer rights than the store's owner, and refuse commands that need the owner.

A consumer's role may call functions of the store, but may read none of its tables. For example, the role cannot read
the version of the schema, and may not run `cdcbridge consumers pause`. Never writes to the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import psycopg

from cdcbridge.database import Connection
from cdcbridge.errors import CdcbridgeError, OperatorNeeded
from cdcbridge.schemas import INTERNAL

MAY: Final = (
    "receive, peek, ack, nack, extend, dead, read, tail, offsets, lag, status, slot list, consumers list and consumers"
    " show"
)
_OWNER: Final = "select quote_ident(pg_get_userbyid(nspowner)) from pg_namespace where nspname = current_schema()"
_LOOK: Final = """
    select quote_ident(current_user), quote_ident(pg_get_userbyid(n.nspowner)), quote_ident(n.nspname)
    from pg_namespace n join pg_namespace i on i.nspname = n.nspname || %s
    where n.nspname = current_schema() and not has_schema_privilege(i.oid, 'usage')
"""


# To a guest, the tables and functions of the internal schema look as if they did not exist.
_LACKING: Final = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.UndefinedObject,
)


@dataclass(slots=True, frozen=True)
class Guest:
    """A role that may call functions of the store, and nothing else. The names are quoted as in SQL."""

    role: str
    owner: str
    schema: str

    def refusal(self, what: str) -> OperatorNeeded:
        """Return the error for a command that a guest may not run."""
        return OperatorNeeded(
            f"{what} needs the store's owner, {self.owner}. The role {self.role} may only use its own consumers",
            hint=f"As {self.role}, these commands work on its consumers: {MAY}. Others: connect as {self.owner}.",
        )


def guest(connection: Connection) -> Guest | None:
    """Return the role of the session if it is only a guest in the store, else None.

    The store is the one in the session's search_path.
    """
    row = connection.execute(_LOOK, (INTERNAL,)).fetchone()
    return Guest(*row) if row else None


@contextmanager
def refusing(who: Guest | None, what: str) -> Iterator[None]:
    """Replace the server's error about a table or function by one about the command, if a guest lacks a right.

    Args:
        who: The guest, or None if the role is not a guest.
        what: The command, for example "`cdcbridge receive`".

    Raises:
        OperatorNeeded: The guest lacks a right.
    """
    try:
        yield
    except (psycopg.Error, CdcbridgeError) as error:
        cause = error if isinstance(error, psycopg.Error) else error.__cause__
        if who is None or not isinstance(cause, _LACKING):
            raise
        refused = who.refusal(what)
        if "function publish" in str(error):
            grant = f"grant execute on function {who.schema}.publish to {who.role};"
            refused = OperatorNeeded(
                f"the role {who.role} may not publish", hint=f"As the store's owner, {who.owner}: {grant}"
            )
        raise refused from error


@contextmanager
def as_owner(store: Connection, what: str) -> Iterator[None]:
    """Refuse a guest, and name the owner in the hint of each error about a right that another role lacks on the store.

    Args:
        store: The session on the store.
        what: The command, for example "`cdcbridge verify`".

    Raises:
        OperatorNeeded: The role is a guest, or lacks a right.
    """
    who = guest(store)
    if who is not None:
        raise who.refusal(what)
    owner = store.execute(_OWNER).fetchone()
    try:
        yield
    except OperatorNeeded as error:
        if owner and isinstance(error.__cause__, psycopg.errors.InsufficientPrivilege) and of_store(error):
            error.hint = f"Connect as the store's owner, {owner[0]} (store.dsn)."
        raise


def of_store(error: OperatorNeeded) -> bool:
    """Return whether the error is from the store's server, and not from the source's server."""
    return str(error).startswith("store: ")
