"""The body that an expression gives."""

from __future__ import annotations

import pytest

from cdcbridge.routing.filters import FilterError
from cdcbridge.routing.transform import Transform
from cdcbridge.sinks.shaper import Unshaped
from tests.harness.shaping import body, row, shaped


def test_a_transform_gives_the_body() -> None:
    assert body(row(), sink={"transform": "{'id': record.id, 'kind': op + '!'}"}) == {"id": 7, "kind": "insert!"}


def test_a_transform_sees_only_masked_values() -> None:
    settings = {"transform": "{'mail': record.email}", "mask": {"email": "null"}}
    assert body(row(), sink=settings) == {"mail": None}


@pytest.mark.parametrize(
    ("expression", "reason"),
    [("{'x': record.missing}", "transform failed"), ("record.id", "not a map"), ("{'x': 1 / 0}", "transform failed")],
)
def test_a_transform_that_fails_makes_a_dead_letter(expression: str, reason: str) -> None:
    found = shaped(row(), sink={"transform": expression})
    assert isinstance(found, Unshaped) and found.reason.startswith("sink: ") and reason in found.reason


def test_a_transform_with_an_unknown_variable_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="rekord"):
        Transform("{'x': rekord.id}")
    with pytest.raises(FilterError):
        Transform("{'x': record.nothing}").body(
            {"op": "insert", "topic": "t", "key": None, "record": {}, "old": None, "meta": {}}
        )
