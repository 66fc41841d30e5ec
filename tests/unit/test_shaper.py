"""The form of a message as `sinks test` shows it."""

from __future__ import annotations

import orjson

from cdcbridge.sinks.shaper import as_json
from tests.harness.shaping import row, shaped


def test_the_trial_shows_what_is_sent() -> None:
    (outgoing,) = shaped(row())
    shown = orjson.loads(orjson.dumps(as_json(outgoing)))
    assert shown["body"]["key"] == "7" and shown["destination"] == "out"
    assert shown["headers"]["cdcbridge-id"] == shown["id"] == shown["body"]["id"]
