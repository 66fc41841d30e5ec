"""A consumer's role beside the store's owner: who is which, and what the one may not do. Part of the rim; reads only.

A consumer's role may call functions of the store and read none of its tables. For example, it may not know the schema's
version, and `cdcbridge consumers pause` is not for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import psycopg

from cdcbridge.database import Connection
from cdcbridge.errors import OperatorNeeded

MAY: Final = (
    "receive, peek, ack, nack, extend, dead, offsets, lag, status, slot list, consumers list and consumers show"
)
_OWNER: Final = "select quote_ident(pg_get_userbyid(nspowner)) from pg_namespace where nspname = current_schema()"
_LOOK: Final = """
    select quote_ident(current_user), quote_ident(pg_get_userbyid(n.nspowner)), quote_ident(n.nspname)
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.oid = to_regclass('schema_migrations') and not has_table_privilege(c.oid, 'select')
"""


@dataclass(slots=True, frozen=True)
class Guest:
    """A role that may call functions of the store, and no more. Names are quoted as in SQL."""

    role: str
    owner: str
    schema: str

    def refusal(self, what: str) -> OperatorNeeded:
        """The error for a command that is not for it."""
        return OperatorNeeded(
            f"{what} needs the store's owner, {self.owner}; the role {self.role} may only use its own consumers",
            hint=f"As {self.role}, these commands work on its consumers: {MAY}. Others: connect as {self.owner}.",
        )


def guest(connection: Connection) -> Guest | None:
    """The session's role where it is no more than a guest in the store on the search_path."""
    row = connection.execute(_LOOK).fetchone()
    return Guest(*row) if row else None


@contextmanager
def refusing(who: Guest | None, what: str) -> Iterator[None]:
    """A right that a guest lacks as a sentence, instead of the server's words about a table or a function.

    Raises OperatorNeeded.
    """
    try:
        yield
    except (psycopg.errors.InsufficientPrivilege, OperatorNeeded) as error:
        cause = error if isinstance(error, psycopg.Error) else error.__cause__
        if who is None or not isinstance(cause, psycopg.errors.InsufficientPrivilege):
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
    """Refuse a guest in the store, and name the owner in the hint of every right on it that another role lacks.

    what: the command, for example "`cdcbridge verify`". Raises OperatorNeeded.
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
    """Whether the error is from the store's server, and not from the source's."""
    return str(error).startswith("store: ")
