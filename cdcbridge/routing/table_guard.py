"""Require at each new version of a table that it has an identity, and the columns that consumers name.

The module is pure. It raises before anything of the new version is collected, so nothing of that version is confirmed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from cdcbridge.changes.events import Relation
from cdcbridge.changes.position import Position
from cdcbridge.errors import IdentityLost, OperatorNeeded
from cdcbridge.routing.router import Router
from cdcbridge.routing.subscription import Subscription


class TableGuard:
    """A guard that compares each version of a table with the needs of the router's consumers."""

    def __init__(
        self,
        router: Router,
        has_identity: Callable[[Relation], bool] = lambda _relation: False,
        columns: dict[str, frozenset[str]] | None = None,
        left_out: Collection[str] = (),
    ) -> None:
        """Begin with the knowledge of earlier sessions.

        Args:
            router: Knows the consumers of each table.
            has_identity: Returns whether a table has a usable replica identity now. At the stream's place it may have
                had none.
            columns: The columns of each topic as they were last known.
            left_out: The topics that are known to have no identity. They must not stop the other tables.
        """
        self._router = router
        self._has_identity = has_identity
        self._columns = {} if columns is None else columns
        self._left_out = left_out
        self._met: set[Relation] = set()

    def require_identity(self, relation: Relation, position: Position) -> None:
        """End the session if a table that a consumer names has lost its identity.

        The next session continues without it. A table that only a wildcard covers never had to have an identity:
        PostgreSQL refuses its UPDATEs and DELETEs, and its INSERTs are whole. If the table has an identity again by
        now, its older changes without one are INSERTs, and they are delivered.

        Raises:
            IdentityLost: The table has no identity, and a consumer that names it takes updates or deletes.
        """
        if relation.identity or relation.topic in self._left_out:
            return
        for subscription in self._subscriptions(relation):
            taken = subscription.operations & {"update", "delete"}
            if taken and relation.topic in subscription.tables and not self._has_identity(relation):
                raise IdentityLost(
                    f"source: {relation.topic} has lost its replica identity at position {position}, and a consumer"
                    f" takes its {' and '.join(sorted(taken))}s. The bridge starts again without them",
                    hint=f"`ALTER TABLE {_quoted(relation)} REPLICA IDENTITY FULL;` (or add a primary key). Then the"
                    " bridge takes these changes again.",
                )

    def require_columns(self, relation: Relation, position: Position) -> None:
        """Stop if a column that a consumer names in its key or its columns does not exist any more.

        For example, after `rename card_number to card_no` a consumer that excludes card_number would deliver the
        number. A consumer with that key would get null keys.

        Raises:
            OperatorNeeded: The column was renamed or dropped.
        """
        if relation in self._met or not relation.columns:
            return  # a later change of this version, or a table that was dropped before it was looked at
        self._met.add(relation)
        gone = self._columns.get(relation.topic, relation.columns) - relation.columns
        for subscription in self._subscriptions(relation) if gone else ():
            if names := sorted(gone & subscription.columns):
                raise OperatorNeeded(
                    f"{relation.topic} has no column {', '.join(names)} from position {position} on (it was renamed or"
                    f" dropped), and consumer {subscription.name} names it in its key or columns. Nothing after it is"
                    " confirmed",
                    hint=f"Write the column's present name into consumer {subscription.name} in the configuration, and"
                    " start the bridge again. It continues here.",
                )
        self._columns[relation.topic] = relation.columns

    def _subscriptions(self, relation: Relation) -> list[Subscription]:
        return self._router.subscriptions(*relation.topic.split(".", 1))


def _quoted(relation: Relation) -> str:
    """Return the table's name as an SQL identifier."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in (relation.schema, relation.table))
