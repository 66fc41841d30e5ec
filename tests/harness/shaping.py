"""Messages of the log in the form in which a sink delivers them, for unit tests."""

from __future__ import annotations

import json
from typing import Any

from cdcbridge.config import Consumer
from cdcbridge.routing.subscription import Subscription
from cdcbridge.sinks.log_row import LogRow
from cdcbridge.sinks.message import Origin, SinkMessage
from cdcbridge.sinks.reading import judge
from cdcbridge.sinks.shaper import Names, Shaper
from cdcbridge.store.consumers import stored_config

ORIGIN = Origin("7412", "shop", "slot", [0], [1])
INSERT = (
    '{"op":"insert","record":{"id":7,"total":12345678901234567890.10,"email":"a@b.example"},"old":null,"unchanged":[]}'
)
LSN = 0x16B3748
TIME = 830_944_800_123_456  # 2026-05-01T10:00:00.123456+00:00


def row(data: str = INSERT, seq: int = 5, **changes: Any) -> LogRow:
    made = LogRow(seq, "public.orders", "7", 3, data, None, LSN, 2, 900, TIME, TIME, None)
    return made._replace(**changes)


def consumer(mode: str = "stream", **settings: Any) -> Consumer:
    given = settings.pop("sink", {})
    sink = given if "type" in given else {"type": "file", "path": "out", **given}
    return Consumer.model_validate({"name": "events", "mode": mode, "tables": ["public.*"], "sink": sink, **settings})


def shaped(one: LogRow, prefix: str | None = None, **settings: Any) -> Any:
    chosen = consumer(**settings)
    wanted = Subscription.from_config(1, "events", chosen.mode, stored_config(chosen))
    said = judge(one, wanted, ORIGIN, projected=chosen.columns is not None)
    return Shaper(chosen, Names("shop", "shopdb"), prefix).shape(said) if isinstance(said, SinkMessage) else said


def body(one: LogRow, **settings: Any) -> Any:
    (outgoing,) = shaped(one, **settings)
    return json.loads(outgoing.body)
