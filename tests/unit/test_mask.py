"""Hidden values of columns."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.sinks.mask import masked
from tests.harness.shaping import INSERT


@pytest.mark.parametrize(
    ("how", "email"),
    [("null", None), ("last4", "mple"), ("hash", hashlib.sha256(b"a@b.example").hexdigest()[:32])],
)
def test_a_mask_hides_a_column_and_nothing_else(how: str, email: str | None) -> None:
    found = masked(INSERT, {"email": how, "phone": "hash"})
    assert json.loads(found)["record"] == {"id": 7, "total": 12345678901234567890.10, "email": email}
    assert "12345678901234567890.10" in found and "a@b" not in found


@given(
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=5),
    st.sampled_from(["hash", "null", "last4"]),
)
def test_a_mask_hides_old_values_too_and_the_rest_stays(values: dict[str, Any], how: str) -> None:
    values["secret"] = "a secret of some length"
    data = json.dumps({"op": "update", "record": values, "old": values, "unchanged": []})
    found = masked(data, {"secret": how})
    assert "a secret of some" not in found
    for part in ("record", "old"):
        hidden = json.loads(found)[part]
        assert {**hidden, "secret": ""} == {**values, "secret": ""}


def test_a_short_value_is_not_shown_by_its_last_four_characters() -> None:
    assert json.loads(masked('{"op":"insert","record":{"pin":"1234"}}', {"pin": "last4"}))["record"] == {"pin": "****"}
