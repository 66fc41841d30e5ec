"""publish() of the Python clients: delays, times and duplicates."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from cdcbridge.errors import UsageError
from tests.sql.queue import StoreQueue as Store


def test_a_duplicate_can_be_told_and_the_seq_is_a_number(store: Store, opened: Callable[..., Any]) -> None:
    client = opened()
    first = client.publish("t", 1, dedup_id="x")
    again = client.publish("t", 1, dedup_id="x")
    other = client.publish("t", 2)
    assert (first, again, other) == (1, 1, 2)
    assert (first.duplicate, again.duplicate, other.duplicate) == (False, True, False)
    assert json.dumps(first) == orjson.dumps(first).decode() == f"{first:d}" == "1"
    assert store.value("select %s + 1", again) == 2, "psycopg sends it as a number"


def test_a_message_waits_for_a_delay_or_for_a_time(store: Store, opened: Callable[..., Any]) -> None:
    client = opened()
    client.publish("t", 1, delay=300)
    client.publish("t", 1, delay="5m")
    client.publish("t", 1, deliver_at=datetime.now(UTC) + timedelta(minutes=5))
    waits = store.all(
        "select extract(epoch from visible_at - now()) as s from cdcbridge_internal.delayed where consumer_id = 1"
    )
    assert [280 < row["s"] <= 300 for row in waits] == [True] * 3
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"delay": "soon"}, "delay: 'soon' is not a duration"),
        ({"delay": -1}, "delay is -1, but must be at least 0 seconds"),
        ({"delay": 1, "deliver_at": datetime.now(UTC)}, "both are given"),
        ({"deliver_at": datetime(2030, 1, 1)}, "has no time zone"),  # noqa: DTZ001 - that is what is refused
    )
    for named, message in refused:
        with pytest.raises(UsageError, match=message):
            client.publish("t", 1, **named)
