"""Events: relations are compared by identity, so that a plan belongs to one version of a table."""

from __future__ import annotations

from cdcbridge.changes.events import Change, Relation


def test_two_versions_of_a_table_are_two_relations_whatever_they_have_in_common() -> None:
    one, other = (Relation("public", "t", "public.t", ("id",), frozenset({"id"})) for _ in range(2))
    assert one != other and len({one, other}) == 2
    assert Change("insert", one, {}) == Change("insert", one, {}) != Change("insert", other, {})
