"""Numbers reach the user of a client as PostgreSQL has them."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from cdcbridge.errors import UnreadableData
from tests.sql.queue import StoreQueue as Store

EXACT: dict[str, Any] = {
    "big": 9007199254740993,
    "tenth": Decimal("0.1"),
    "price": Decimal("10.50"),
    "digits": Decimal("12345678901234567890.12345678901234567890"),
    "whole": 123456789012345678901234567890,
    "list": [Decimal("-1.10"), {"exponent": Decimal("1E+400")}],
    "text": "1.5",
    "none": None,
    "long": Decimal("9" * 5000),
}
TEXT = (
    '{"big": 9007199254740993, "tenth": 0.1, "price": 10.50, "digits": 12345678901234567890.12345678901234567890,'
    ' "whole": 123456789012345678901234567890, "list": [-1.10, {"exponent": 1E400}], "text": "1.5", "none": null,'
    f' "long": {"9" * 5000}}}'
)


@pytest.mark.parametrize("consumer", ["c", "f", "s"])
def test_every_digit_arrives_with_parse_float(consumer: str, store: Store, opened: Callable[..., Any]) -> None:
    client = opened(consumer, parse_float=Decimal)
    store.session.execute("select cdcbridge.publish('t', null, %s)", (TEXT,))
    store.session.execute("select cdcbridge.publish('t', null, %s)", ('{"n": 1e99999999999999999999}',))
    got = client.receive() if consumer != "s" else client.read(wait=10).messages
    record = got[0].data["record"]
    assert record == EXACT
    assert str(record["price"]) == "10.50"
    with pytest.raises(UnreadableData, match="cannot be converted to Python values"):
        _ = got[1].data


def test_numbers_are_pythons_own_without_it(store: Store, opened: Callable[..., Any]) -> None:
    client = opened("c")
    store.session.execute("select cdcbridge.publish('t', null, '[9007199254740993, 10.50]')")
    (message,) = client.receive()
    assert message.data["record"] == [9007199254740993, 10.5]
    assert message.raw.startswith('{"op":"message","record":[9007199254740993, 10.50]')
