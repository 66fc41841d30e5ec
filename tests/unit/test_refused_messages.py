"""What is told of messages that were not delivered: each kind once a minute, with all that were counted."""

from __future__ import annotations

from collections import Counter

import pytest
from structlog.testing import capture_logs

from cdcbridge.routing.batch import AppendBatch
from cdcbridge.routing.refused_messages import Refused

ONE, OTHER = ("published.unlisted", "news", "no consumer lists the topic"), ("published.malformed", "news", "not JSON")


def test_a_kind_is_told_once_a_minute_with_all_that_came_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    told = Refused()
    with capture_logs() as lines:
        for seconds, counted in (
            (0, {ONE: 2}),
            (30, {ONE: 3, OTHER: 1}),
            (29, {}),
            (1, {ONE: 5}),
            (59, {ONE: 1}),
            (1, {ONE: 1}),
        ):
            now[0] += seconds
            told.tell(AppendBatch(refused=Counter(counted)))
    assert [(line["event"], line["topic"], line["messages"]) for line in lines] == [
        ("published.unlisted", "news", 2), ("published.malformed", "news", 1), ("published.unlisted", "news", 8),
        ("published.unlisted", "news", 2),
    ]  # fmt: skip
    assert lines[0]["reason"] == ONE[2] and lines[0]["log_level"] == "warning"
