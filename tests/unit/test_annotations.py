"""An annotation is added to `data`, or refused."""

from __future__ import annotations

import orjson
import pytest

from cdcbridge.routing.annotations import PLAIN, annotating, read_annotation


def test_data_has_it_as_its_last_member() -> None:
    encode, malformed = read_annotation(b' {"reverts":\n{"seqs": [1.50]}} ')
    data = encode("insert", {"id": 1}, None, ())
    assert malformed is None and data.endswith(b',"annotation":{"reverts": {"seqs": [1.50]}}}')
    assert {**orjson.loads(data), "annotation": 0} == {
        **orjson.loads(PLAIN("insert", {"id": 1}, None, ())),
        "annotation": 0,
    }
    assert annotating(b"1")("delete", None, None, ()) == PLAIN("delete", None, None, ())[:-1] + b',"annotation":1}'


@pytest.mark.parametrize("content", [b"", b"{no", b"NaN", b"\xff", b"1 2", b"[" * 100000])
def test_content_that_is_not_json_is_refused(content: bytes) -> None:
    encode, malformed = read_annotation(content)
    assert encode is PLAIN and malformed is not None and malformed.startswith("not JSON")
