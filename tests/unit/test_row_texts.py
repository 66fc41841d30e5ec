"""Keys and differences of rows that are JSON texts."""

from __future__ import annotations

import pytest

from cdcbridge.mirrors.row_texts import array, differing, identity, row_key

ROW = '{"id":7,"part":"a\\"b","v":1.50,"big":1e400,"none":null}'


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        (["id"], "7"),
        (["part"], 'a"b'),
        (["v"], "1.50"),
        (["big"], "1e400"),
        (["id", "part"], '["7","a\\"b"]'),
        (["id", "none"], '["7",null]'),
    ],
)
def test_the_key_is_that_of_the_log(columns: list[str], key: str) -> None:
    assert row_key(ROW, columns) == key
    assert row_key(identity(key, columns), columns) == key


def test_values_differ_as_they_are_written() -> None:
    assert differing('{"a":1,"b":"x"}', '{"a":1.0,"b":"x"}') == ("a",)
    assert differing('{"a":1}', '{"a":1,"b":null}') == ("b",)
    assert differing(ROW, ROW) == ()


def test_rows_become_one_array() -> None:
    assert array(['{"a":1}', '{"a":2}']) == '[{"a":1},{"a":2}]'
