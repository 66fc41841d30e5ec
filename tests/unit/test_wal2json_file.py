"""wal2json's output from a file: both formats, any layout, any options."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from cdcbridge.changes.wal2json_file import Decoded, decode_file
from cdcbridge.errors import DecodeError

INSERT: dict[str, Any] = {
    "kind": "insert", "schema": "public", "table": "t", "columnnames": ["id", "n"],
    "columntypes": ["integer", "numeric(9,2)"], "columnvalues": [1, 1.5],
}  # fmt: skip
UPDATE: dict[str, Any] = {
    **INSERT,
    "kind": "update",
    "oldkeys": {"keynames": ["id"], "keytypes": ["integer"], "keyvalues": [1]},
}
DELETE: dict[str, Any] = {
    "kind": "delete",
    "table": "t",
    "oldkeys": {"keynames": ["id"], "keytypes": ["integer"], "keyvalues": [7]},
}


def decoded(text: str) -> list[Decoded]:
    return list(decode_file(text.encode().splitlines(keepends=True)))


def told(text: str) -> list[tuple[Any, ...]]:
    """(topic, key, op, record, old, LSN, ordinal), the rows as JSON."""
    return [
        (d.topic, d.key, d.op, orjson.dumps(d.record).decode(), d.old and orjson.dumps(d.old).decode(), d.commit_lsn, d.ordinal)
        for d in decoded(text)
    ]  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1, "\t"])
def test_format_1_in_any_layout(indent: Any) -> None:
    text = json.dumps({"change": [INSERT, {"kind": "message"}, UPDATE, DELETE]}, indent=indent)
    assert told(f"\n{text}\n\n{text}\n") == 2 * [
        ("public.t", None, "insert", '{"id":1,"n":1.5}', None, None, 0),
        ("public.t", "1", "update", '{"id":1,"n":1.5}', None, None, 2),
        ("t", "7", "delete", '{"id":7}', None, None, 3),
    ]


def test_format_2_counts_within_its_transaction() -> None:
    column = '{"name":"id","type":"integer","value":1}'
    rows = [f'{{"action":"I","schema":"s","table":"t","columns":[{column}],"pk":[{{"name":"id"}}]}}'] * 2
    message = '{"action":"M","transactional":true,"prefix":"p","content":"c"}'
    text = "\n".join(['{"action":"B","lsn":"0/64"}', rows[0], message, rows[0], '{"action":"C"}', rows[0]])
    assert [(key, lsn, ordinal) for _, key, *_, lsn, ordinal in told(text)] == [
        ("1", "0/64", 0),
        ("1", "0/64", 2),
        ("1", None, None),
    ]


@pytest.mark.parametrize(
    ("type_name", "value", "text"),
    [
        ("numeric(30,2)", "12345678901234567890.10", "12345678901234567890.10"),
        ("bigint", "9223372036854775807", "9223372036854775807"),
        ("real", "1e-07", "1e-07"),
        ("integer[]", '"{1,NULL}"', "[1,null]"),
        ("numeric(9,2)[]", '"{1.10}"', "[1.10]"),
        ("jsonb", '"{\\"a\\": 1.0}"', '{"a": 1.0}'),
        ("bytea", '"00ff"', '"\\\\x00ff"'),
        ("oid", "26", '"26"'),
        ("boolean", "true", "true"),
        ("timestamp without time zone", '"2024-01-01 00:00:00"', '"2024-01-01T00:00:00"'),
        ("mood", '"sad"', '"sad"'),
        ("text", '"\\u0000 is a mark"', '"\\u0000 is a mark"'),
        ("text", "null", "null"),
        ("mood", "1.10", "1.10"),
    ],
)
def test_a_value_goes_by_the_name_of_its_type(type_name: str, value: str, text: str) -> None:
    document = '{"action":"I","table":"t","columns":[{"name":"a","type":"%s","value":%s}]}'
    (found,) = decoded(document % (type_name, value))
    assert orjson.dumps(found.record).decode() == f'{{"a":{text}}}'


@pytest.mark.parametrize(
    ("text", "said", "offset"),
    [
        ('{"change": [', "the input ends inside a document", 12),
        ("nonsense", "not JSON", 0),
        ("\n\nnonsense", "not JSON", 2),
        ("\n\n{} ", "neither a transaction of format 1 nor a message of format 2", 2),
        ("[1]", "a document that is no object", 0),
        ('{"action":"X"}', "unknown action 'X'", 0),
        ('{"change":[{"kind":"x"}]}', "unknown kind 'x'", 0),
        ('{"change":[{"kind":"insert","table":"t","columnnames":["a"]}]}', "1 columnnames and 0 columnvalues", 0),
        ('{"action":"I","table":"t","columns":[{"name":"a","value":[1]}]}', "a value that is an array", 0),
        ('{"action":"B","lsn":"64"}', "not an LSN", 0),
        ('{"action":"I","columns":[{"type":"a "b""}]}', "If a type name needs quotes", None),
    ],
)
def test_what_is_none_of_it_is_refused_with_its_offset(text: str, said: str, offset: int | None) -> None:
    with pytest.raises(DecodeError, match=said) as raised:
        decoded(text)
    assert offset is None or raised.value.offset == offset
