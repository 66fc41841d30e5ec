"""Names that a lane has in a target, for example its transactional id in Kafka."""

from __future__ import annotations

from cdcbridge.sinks.message import Origin
from cdcbridge.sinks.target import Lane


def lane(slot: str, number: int = 0) -> Lane:
    return Lane("events", Origin("7412", "shop", slot, [0], [1]).store, number, 4)


def test_two_stores_of_one_server_have_lanes_of_their_own() -> None:
    """Both have a consumer of one name, and deliver to one cluster."""
    assert lane("shop").name != lane("billing").name
    assert lane("shop").name != lane("shop", 1).name
    assert lane("shop").name == "cdcbridge/7412-shop/events/0"
    assert lane("shop").system == "7412"
