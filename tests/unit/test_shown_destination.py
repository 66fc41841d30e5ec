"""The address of a webhook is shown without its secrets: user, path and query can be some."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cdcbridge.config.sink import shown_destination
from cdcbridge.sinks.shaper import Unshaped
from cdcbridge.words import without_path
from tests.harness.shaping import consumer, row, shaped

SECRET = "https://user:hush@hooks.example.com/services/T0S3CRET/{schema}?key=hush#hush"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (SECRET, "https://hooks.example.com/***/***/{schema}?***"),
        ("https://h.example", "https://h.example"),
        ("https://h.example/", "https://h.example/"),
        ("http://[::1]:8080/a{topic}b", "http://[::1]:8080/***{topic}***"),
        ("https://h.example?key=hush", "https://h.example?***"),
        ("hush", "***"),
    ],
)
def test_an_address_without_its_secrets(address: str, shown: str) -> None:
    assert without_path(address) == shown


def test_a_sink_shows_no_secret_of_its_address() -> None:
    sink = {"type": "http", "url": SECRET}
    assert shown_destination(consumer(sink=sink).needed_sink) == "https://hooks.example.com/***/***/{schema}?***"
    found = shaped(row(topic="published"), sink=sink)
    assert isinstance(found, Unshaped) and "{schema}" in found.reason
    assert "hush" not in found.reason and "T0S3CRET" not in found.reason


@pytest.mark.parametrize(
    ("url", "settings"), [(SECRET, {"topics": ["a"]}), (SECRET + "{", {})], ids=["topics", "a brace"]
)
def test_an_error_of_the_configuration_shows_no_secret(url: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        consumer(sink={"type": "http", "url": url}, **settings)
    (error,) = raised.value.errors()
    assert "{schema}" in error["msg"] and "T0S3CRET" not in error["msg"]
