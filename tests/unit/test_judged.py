"""What a verdict reads of a message, whichever way it came."""

from __future__ import annotations

import orjson
import pytest

from cdcbridge.changes.events import Begin, Change, Relation
from cdcbridge.routing.filters import FilterError
from cdcbridge.routing.judged import Changed, Logged, known_before

T = Relation("public", "t", "public.t", ("id",), frozenset({"id"}))
UPDATE = Change("update", T, {"id": 2, "v": "b"}, {"id": 1}, ("big",))


def logged(text: str, topic: str = "public.t", **more: object) -> Logged:
    return Logged(text, topic, "2", "0/1", 4, 7, **more)  # type: ignore[arg-type]


def test_a_change_and_its_message_of_the_log_read_alike() -> None:
    changed = Changed(UPDATE, "2", "1", Begin(1, 7, 0), 4)
    environment, unchanged = changed.environment()
    assert environment == logged(changed.data.decode()).environment()[0] and list(unchanged) == ["big"]
    assert environment["meta"] == {"schema": "public", "table": "t", "commit_lsn": "0/1", "ordinal": 4, "xid": 7}
    assert changed.environment()[0] is environment, "it is made once"
    assert changed.size == len(changed.data) and changed.data is changed.data


@pytest.mark.parametrize(("topic", "of_table"), [("public.t", True), ("invoices", False), ("cdcbridge.gap", False)])
def test_filters_apply_to_tables_alone(topic: str, of_table: bool) -> None:
    assert logged("{}", topic).of_table is of_table


@pytest.mark.parametrize(
    ("old", "identity", "before"),
    [
        ({"id": 1}, frozenset({"id"}), {"id": 1}),  # the key changed
        (None, frozenset({"id"}), {"id": 2}),  # it did not
        (None, frozenset(), {}),  # nothing is known
    ],
)
def test_what_is_known_of_the_row_before(
    old: dict[str, object] | None, identity: frozenset[str], before: dict[str, object]
) -> None:
    assert known_before({"id": 2, "v": "b"}, old, identity) == before


def test_the_row_that_left() -> None:
    assert Changed(UPDATE, "2", "1", None, 0).row_that_left() == {"id": 1}
    text = '{"op":"update","record":{"id":2,"v":1.50},"old":null,"unchanged":[]}'
    assert orjson.dumps(logged(text, identity=frozenset({"id", "v"})).row_that_left()) == b'{"id":2,"v":1.50}'
    assert orjson.dumps(logged(text).row_that_left()) == b'{"id":2,"v":1.50}', "no identity is known"


def test_a_row_that_orjson_cannot_hold_is_read_as_far_as_it_can() -> None:
    data, unchanged = logged('{"op":"insert","record":{"id":1,"v":1e999},"old":null,"unchanged":[]}').environment()
    assert (data["op"], data["record"]["id"], unchanged) == ("insert", 1, [])
    with pytest.raises(FilterError, match="a value that CEL cannot hold"):
        logged('{"record":').environment()
