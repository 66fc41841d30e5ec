"""The names of a store's two schemas."""

from __future__ import annotations

import re

from cdcbridge import config, schemas


def test_a_store_has_two_schemas() -> None:
    assert schemas.internal("shop") == "shop_internal"
    assert schemas.both("shop") == ("shop", "shop_internal")


def test_the_longest_schema_leaves_room_for_the_suffix() -> None:
    """PostgreSQL cuts names after 63 bytes without an error."""
    longest = "s" * 54
    assert re.fullmatch(config._SCHEMA, longest) and not re.fullmatch(config._SCHEMA, longest + "s")
    assert len(schemas.internal(longest)) == 63
