"""One consumer of the configuration: what goes together, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cdcbridge.config.consumer import Columns, Consumer

GOOD: dict[str, Any] = {"name": "c", "tables": ("public.t",)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tables": ()}, "a consumer needs tables or topics"),
        (
            {"tables": (), "topics": ("news",), "start": "snapshot"},
            "start: snapshot reads tables, and the consumer has none",
        ),
        ({"topics": ("a.b",)}, "'a.b' is not a topic"),
        ({"topics": ("",)}, "'' is not a topic"),
        ({"operations": ()}, "must not be empty"),
        ({"key": ()}, "must not be empty"),
        ({"filter": "record.a ="}, "not a CEL expression"),
        ({"columns": {}}, "give either include or exclude"),
        ({"columns": {"include": ("a",), "exclude": ("b",)}}, "give either include or exclude"),
        ({"mode": "stream", "filter": "true", "key": ("a",)}, "filter and key cannot be given"),
        ({"mode": "stream", "columns": {"include": ("a",)}}, "columns cannot be given"),
        ({"compact": True}, "compact works only in mode stream"),
        ({"mode": "stream", "compact": True, "operations": ("insert",)}, "which needs all operations"),
        ({"on_leave": "delete"}, "needs a filter"),
        ({"on_leave": "delete", "filter": "record.a == 1", "operations": ("insert",)}, "needs the operation update"),
        ({"on_leave": "delete", "filter": "old.a == 1"}, "this one reads `old`"),
        ({"max_deliveries": 0}, "greater than or equal to 1"),
        ({"visibility_timeout": "0s"}, "greater than 0"),
        ({"retry_delay": {"factor": 0.5}}, "greater than or equal to 1"),
        ({"colour": "red"}, "Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said.replace("`", ".")):
        Consumer(**{**GOOD, **given})


@pytest.mark.parametrize("name", ["a", "0", "a.b_c-d", "a" * 63])
def test_a_name(name: str) -> None:
    assert Consumer(name=name, topics=("t",)).name == name


@pytest.mark.parametrize("name", ["", "A", "a b", ".a", "-a", "é", "a" * 64, "a\n"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValidationError):
        Consumer(name=name, topics=("t",))


def test_the_defaults_are_those_of_the_contract() -> None:
    made = Consumer(**GOOD)
    assert (made.mode, made.start, made.on_leave, made.compact) == ("queue", "now", "none", False)
    assert (made.visibility_timeout, made.max_deliveries, made.max_in_flight) == (30.0, 5, 1000)
    assert (made.max_message_bytes, made.operations) == (1 << 20, ("insert", "update", "delete", "truncate"))
    assert (made.retry_delay.initial, made.retry_delay.factor, made.retry_delay.max) == (1.0, 2.0, 600.0)
    with pytest.raises(ValidationError, match="frozen"):
        made.name = "d"
    assert Columns(include=("a",)) != Columns(exclude=("a",))
