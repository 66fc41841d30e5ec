"""Values of PostgreSQL as JSON: arrays, numbers, times."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.changes.pgtypes import parse_array, text

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
