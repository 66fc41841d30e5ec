"""Published data as JSON, and the texts beside it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from cdcbridge.client._contents import json_text, refuse_bad_text
from cdcbridge.errors import UsageError


@dataclasses.dataclass
class Price:
    amount: float


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (math.nan, "data is nan"),
        ({"a": [1, {"b": math.inf}]}, r"data\['a'\]\[1\]\['b'\] is inf"),
        ({"p": Price(-math.inf)}, r"data\['p'\]\.amount is -inf"),
        ([(0.0, math.nan)], r"data\[0\]\[1\] is nan"),
    ],
)
def test_a_number_that_json_does_not_have_is_refused_with_its_place(data: Any, place: str) -> None:
    with pytest.raises(UsageError, match=place):
        json_text(data)


def test_json_keeps_what_it_has_in_every_encoding() -> None:
    data = {"null": None, "é": "☃ 😀 \\ \0", "n": 1.5e300}
    assert json.loads(json_text(data)) == data
    escaped = json_text(data, ascii_only=True)
    assert escaped.isascii() and json.loads(escaped) == data


def test_texts_that_postgresql_cannot_hold_are_named() -> None:
    refuse_bad_text(topic="t", key=None, dedup_id="é😀")
    with pytest.raises(UsageError, match="key is"):
        refuse_bad_text(key="a\0")
    with pytest.raises(UsageError, match=r"dedup_id is .*surrogate"):
        refuse_bad_text(dedup_id="\udcff")
