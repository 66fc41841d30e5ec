"""Values of PostgreSQL as JSON: arrays, numbers, times."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.changes.pgtypes import ARRAYS, PgType, Types, parse_array, text

elements = st.none() | st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def array_text(value: object, mark: str = ",") -> str:
    """An array as array_out writes it, quoting everything."""
    if isinstance(value, list):
        return "{" + mark.join(array_text(v, mark) for v in value) + "}"
    return "NULL" if value is None else '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(st.lists(elements) | st.lists(st.lists(elements, min_size=2, max_size=2), min_size=1))
def test_an_array_survives_its_text(value: list[object]) -> None:
    assert parse_array(array_text(value).encode(), text) == value
    assert parse_array(b"[0:9]=" + array_text(value).encode(), text) == value


@given(
    st.lists(elements) | st.lists(st.lists(elements, min_size=2, max_size=2), min_size=1),
    st.characters(min_codepoint=1, max_codepoint=126, exclude_characters='"{}'),
)
def test_an_array_may_have_any_delimiter(value: list[object], mark: str) -> None:
    assert parse_array(array_text(value, mark).encode(), text, mark.encode()) == value


@given(st.binary(max_size=30), st.sampled_from([b",", b":", b"\\", b"]", b"^", b"-"]))
def test_what_is_no_array_is_a_value_error(rubbish: bytes, mark: bytes) -> None:
    try:
        assert isinstance(parse_array(rubbish, lambda value: value, mark), list)
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("oid", "value", "expected"),
    [
        (16, "t", "true"), (16, "f", "false"), (23, "-5", "-5"), (20, "9223372036854775807", "9223372036854775807"), (26, "7", '"7"'),
        (1700, "1.50", "1.50"), (1700, "NaN", '"NaN"'), (701, "-Infinity", '"-Infinity"'), (701, "1e-07", "1e-07"), (25, "1.50", '"1.50"'),
        (17, "\\x00ff", '"\\\\x00ff"'), (1082, "2024-02-29", '"2024-02-29"'), (1114, "infinity", '"infinity"'),
        (1114, "0044-03-15 12:00:00 BC", '"0044-03-15T12:00:00 BC"'), (1184, "2024-02-29 12:00:00.5+00", '"2024-02-29T12:00:00.5+00:00"'),
        (1184, "0044-03-15 12:00:00+00 BC", '"0044-03-15T12:00:00+00:00 BC"'), (3802, '{"a": 1.0}', '{"a": 1.0}'), (114, '{"a":\n1}', '{"a": 1}'),
        (1007, "{{1,2},{3,NULL}}", "[[1,2],[3,null]]"), (1231, "{1.10,NaN}", '[1.10,"NaN"]'), (1009, '{"a,b",NULL,"NULL"}', '["a,b",null,"NULL"]'),
        (1020, "{(1,1),(0,0);(2,2),(1,1)}", '["(1,1),(0,0)","(2,2),(1,1)"]'), (22, "1 2", "[1,2]"), (9999, "whatever", '"whatever"'), (99999, "gone", '"gone"'),
    ],
)  # fmt: skip
def test_a_value_is_what_to_jsonb_gives(oid: int, value: str, expected: str) -> None:
    assert orjson.dumps(Types().converter(oid)(value.encode())).decode() == expected


def test_types_of_the_catalogue_are_looked_up_once() -> None:
    asked: list[int] = []
    known = {
        20000: PgType(base=20001),
        20001: PgType(base=23),
        20002: PgType(element=20000),
        20003: PgType(element=25, delimiter="|"),
    }

    def lookup(oid: int) -> PgType | None:
        asked.append(oid)
        return known.get(oid)

    types = Types(lookup)
    for _ in range(2):
        assert types.converter(20002)(b"{1,NULL}") == [1, None], "an array of a domain over a domain"
        assert types.converter(20003)(b"{a|b}") == ["a", "b"]
        assert types.converter(20004)(b"{a}") == "{a}", "nobody knows it"
    assert sorted(asked) == [20000, 20001, 20002, 20003, 20004]


def test_an_array_type_has_one_element_type() -> None:
    assert len(set(ARRAYS.values())) == len(ARRAYS) and not set(ARRAYS) & set(ARRAYS.values())
