"""What a table must still have at each new version: an identity, and the columns that consumers name.

Pure. It raises before anything of the new version is collected, so nothing of it is confirmed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from cdcbridge.changes.events import Relation
from cdcbridge.changes.position import Position
from cdcbridge.errors import IdentityLost, OperatorNeeded
from cdcbridge.routing.router import Router
from cdcbridge.routing.subscription import Subscription


class TableGuard:
    """Compares each version of a table with what the router's consumers need.

    has_identity: tells whether a table has a usable replica identity now, whatever it had at this point of the stream.
    columns: the columns of each topic as they were last known.
    left_out: topics that are known to have no identity, and must not stop the others.
    """

    def __init__(
        self,
        router: Router,
        has_identity: Callable[[Relation], bool] = lambda _relation: False,
        columns: dict[str, frozenset[str]] | None = None,
        left_out: Collection[str] = (),
    ) -> None:
        self._router = router
        self._has_identity = has_identity
        self._columns = {} if columns is None else columns
        self._left_out = left_out
        self._met: set[Relation] = set()

    def require_identity(self, relation: Relation, position: Position) -> None:
        """End the session where a table that a consumer names lost its identity. The next one goes on without it.

        A table that only a wildcard covers never had to have one: PostgreSQL refuses its UPDATEs and DELETEs, and its
        INSERTs are whole. Once the table has an identity again, older rows without one are INSERTs and go on.
        Raises IdentityLost.
        """
        if relation.identity or relation.topic in self._left_out:
            return
        for subscription in self._subscriptions(relation):
            taken = subscription.operations & {"update", "delete"}
            if taken and relation.topic in subscription.tables and not self._has_identity(relation):
                raise IdentityLost(
                    f"source: {relation.topic} has lost its replica identity at position {position}, and a consumer"
                    f" takes its {' and '.join(sorted(taken))}s; starting again without them",
                    hint=f"`ALTER TABLE {_quoted(relation)} REPLICA IDENTITY FULL;` (or add a primary key). Then the"
                    " bridge takes it up again.",
                )

    def require_columns(self, relation: Relation, position: Position) -> None:
        """Stop where a column is gone that a consumer names in its key or its columns.

        For example, after `rename card_number to card_no` a consumer that excludes card_number would deliver the
        number, and a consumer with that key would get null keys. Raises OperatorNeeded.
        """
        if relation in self._met or not relation.columns:
            return  # not the first change of this version; or a table that was dropped before anybody looked at it
        self._met.add(relation)
        gone = self._columns.get(relation.topic, relation.columns) - relation.columns
        for subscription in self._subscriptions(relation) if gone else ():
            if names := sorted(gone & subscription.columns):
                raise OperatorNeeded(
                    f"{relation.topic} has no column {', '.join(names)} from position {position} on (it was renamed or"
                    f" dropped), and consumer {subscription.name} names it in its key or columns; nothing after it is"
                    " confirmed",
                    hint=f"Write the column's present name into consumer {subscription.name} in the configuration, and"
                    " start the bridge again: it goes on here.",
                )
        self._columns[relation.topic] = relation.columns

    def _subscriptions(self, relation: Relation) -> list[Subscription]:
        return self._router.subscriptions(*relation.topic.split(".", 1))


def _quoted(relation: Relation) -> str:
    """As an SQL identifier."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in (relation.schema, relation.table))
