"""What a table must still have at each new version of it."""

from __future__ import annotations

import pytest

from cdcbridge.changes.events import Relation
from cdcbridge.changes.position import Position
from cdcbridge.errors import IdentityLost, OperatorNeeded
from cdcbridge.routing.router import OPERATIONS, Router
from cdcbridge.routing.subscription import Subscription
from cdcbridge.routing.table_guard import TableGuard

HERE = Position(0x100, 3)


def guard(
    *operations: str, tables: tuple[str, ...] = ("public.t",), named: tuple[str, ...] = (), **given: object
) -> TableGuard:
    wanted = Subscription(1, "c", tables, frozenset(operations or OPERATIONS), columns=frozenset(named))
    return TableGuard(Router([wanted]), **given)  # type: ignore[arg-type]


def version(*columns: str, identity: tuple[str, ...] = ()) -> Relation:
    return Relation("public", "t", "public.t", None, frozenset(identity), columns=frozenset(columns))


def test_a_named_table_that_lost_its_identity_is_told_with_the_mend() -> None:
    with pytest.raises(
        IdentityLost, match=r"public\.t has lost .* at position 0/100#3, .* its delete and updates"
    ) as error:
        guard().require_identity(version("id"), HERE)
    assert error.value.hint is not None and 'ALTER TABLE "public"."t" REPLICA IDENTITY FULL;' in error.value.hint


@pytest.mark.parametrize(
    "fine",
    [
        guard("insert", "truncate"),
        guard(tables=("public.*",)),  # PostgreSQL refuses its updates and deletes
        guard(tables=("public.u",)),
        guard(left_out=["public.t"]),
        guard(has_identity=lambda _: True),  # older rows of a table that has one again
    ],
)
def test_who_needs_no_identity(fine: TableGuard) -> None:
    fine.require_identity(version("id"), HERE)
    guard().require_identity(version("id", identity=("id",)), HERE)


def test_a_column_that_a_consumer_names_must_not_go() -> None:
    one = guard(named=("card", "id"))
    one.require_columns(version("id", "card", "v"), HERE)
    one.require_columns(version("id", "card"), HERE)
    with pytest.raises(
        OperatorNeeded, match=r"public\.t has no column card from position 0/100#3 on .* consumer c names"
    ):
        one.require_columns(version("id", "card_no"), HERE)


def test_a_version_is_looked_at_once_and_unknown_columns_say_nothing() -> None:
    known = {"public.t": frozenset({"id", "card"})}
    one = guard(named=("card",), columns=known)
    one.require_columns(version(), HERE)  # a table that was dropped before anybody looked
    assert known == {"public.t": {"id", "card"}}
    same = version("id", "card")
    one.require_columns(same, HERE)
    known["public.t"] |= {"later"}
    one.require_columns(same, HERE)  # not compared once more for each of its rows
    guard(named=("card",), tables=("public.u",), columns=dict(known)).require_columns(version("id"), HERE)
