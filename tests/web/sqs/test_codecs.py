"""Bodies, attributes and both protocols: what is written is read again."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree as ET

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from moto.sqs.models import Message

from cdcbridge.errors import StoreUnavailable, UsageError
from cdcbridge.web.problems import RequestRefused
from cdcbridge.web.sqs.answers import json_error, xml_answer, xml_error
from cdcbridge.web.sqs.attributes import (
    check_body,
    md5_of_attributes,
    safe_for_xml,
    sent_attributes,
    sent_trace,
    size_of,
    wanted,
)
from cdcbridge.web.sqs.directory import name_in_arn, name_in_url
from cdcbridge.web.sqs.errors import BAD_VALUE, SqsError, sqs_error
from cdcbridge.web.sqs.managing import _policy, _token, _whole
from cdcbridge.web.sqs.receiving import body_of
from cdcbridge.web.sqs.requests import Given, from_json, from_query
from cdcbridge.web.sqs.sending import Sending, message_id

XML = "{http://queue.amazonaws.com/doc/2012-11-05/}"
# The characters that a message may have.
TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffe\uffff").filter(
        lambda one: one >= " " or one in "\t\n\r"
    ),
    min_size=1,
    max_size=40,
)
NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,10}", fullmatch=True)
STRINGS = st.fixed_dictionaries({"DataType": st.sampled_from(["String", "String.x"]), "StringValue": TEXT})
NUMBERS = st.fixed_dictionaries(
    {"DataType": st.just("Number"), "StringValue": st.one_of(st.integers(), st.floats(-1e9, 1e9)).map(str)}
)
BINARIES = st.fixed_dictionaries(
    {
        "DataType": st.sampled_from(["Binary", "Binary.gif"]),
        "BinaryValue": st.binary(min_size=1, max_size=20).map(lambda data: base64.b64encode(data).decode()),
    }
)
ATTRIBUTES = st.dictionaries(NAMES, st.one_of(STRINGS, NUMBERS, BINARIES), max_size=5)


def sending(body: str, attributes: Any = None, **named: Any) -> Sending:
    return Sending(body, attributes or {}, **{"trace": None, "key": None, "dedup_id": None, "delay": None, **named})


def stored(message: Sending) -> str:
    """The data as append_published() writes it."""
    return f'{{"op":"message","record":{message.record},"old":null,"unchanged":[],"sqs":{message.kept}}}'


@given(body=st.one_of(TEXT, st.recursive(TEXT, st.lists, max_leaves=4).map(json.dumps)), attributes=ATTRIBUTES)
@example(body=',"old":null,"unchanged":[],"sqs":{}', attributes={})
@example(body='[",\\"old\\":null,\\"unchanged\\":[],\\"sqs\\":"]', attributes={})
@example(body='{"a":1,"old":null,"unchanged":[],"sqs":{}}', attributes={})
@example(body="{", attributes={})
def test_a_body_is_stored_as_json_and_comes_back(body: str, attributes: Any) -> None:
    check_body(body)
    data = stored(sending(body, sent_attributes(attributes)))
    json.loads(data)
    assert body_of(data) == (body, {"attributes": attributes} if attributes else {})


def test_what_was_not_sent_through_sqs_is_its_data() -> None:
    for data in (
        '{"op":"insert","record":{"id": 1},"old":null,"unchanged":[]}',
        '{"op":"message","record":"hello","old":null,"unchanged":[]}',
        '{"op" : "insert", "record" : {"text": ",\\"sqs\\":"}}',
        '{"op":"message","record":{"a":1,"old":null,"unchanged":[],"sqs":{}},"old":null,"unchanged":[]}',
    ):
        assert body_of(data) == (data, None)
    assert body_of('{"op":"insert","record":"\ufffe"}')[0] == '{"op":"insert","record":"\\ufffe"}'


@given(ATTRIBUTES)
def test_the_sum_of_attributes_is_that_of_moto(attributes: Any) -> None:
    message = Message("id", "body")
    message.message_attributes = {
        name: {**value, **({"BinaryValue": base64.b64decode(value["BinaryValue"])} if "BinaryValue" in value else {})}
        for name, value in attributes.items()
    }
    assert md5_of_attributes(sent_attributes(attributes)) == message.attribute_md5


def test_a_sum_that_aws_computed() -> None:
    attributes = {"timestamp": {"DataType": "Number", "StringValue": "1493147359900"}}
    assert md5_of_attributes(attributes) == "235c5c510d26fb653d073faed50ae77c"
    assert size_of("ä", attributes) == 2 + 9 + 6 + 13


@pytest.mark.parametrize("body", ["\x00", "a\x1f", "\ufffe", "\uffff"])
def test_characters_that_xml_does_not_know(body: str) -> None:
    with pytest.raises(SqsError, match=r"U\+"):
        check_body(body)


@pytest.mark.parametrize("number", ["", "one", "1.2.3", "0x1", "1e", "NaN", "١"])
def test_a_number_that_is_none(number: str) -> None:
    with pytest.raises(SqsError):
        sent_attributes({"n": {"DataType": "Number", "StringValue": number}})


@given(attributes=ATTRIBUTES, body=TEXT)
def test_the_query_protocol_is_read_as_the_json_protocol(attributes: Any, body: str) -> None:
    form = [("Action", "SendMessageBatch"), ("QueueUrl", "http://x/000000000000/q"), ("Version", "2012-11-05")]
    entry = "SendMessageBatchRequestEntry.1."
    form += [(f"{entry}Id", "a"), (f"{entry}MessageBody", body), (f"{entry}DelaySeconds", "5")]
    for number, (name, value) in enumerate(attributes.items(), 1):
        form.append((f"{entry}MessageAttribute.{number}.Name", name))
        form += [(f"{entry}MessageAttribute.{number}.Value.{field}", text) for field, text in value.items()]
    action, values = from_query("", urlencode(form).encode())
    assert action == "SendMessageBatch" and values["QueueUrl"] == "http://x/000000000000/q"
    expected = {"Id": "a", "MessageBody": body, "DelaySeconds": "5"}
    assert values["Entries"] == [{**expected, "MessageAttributes": attributes} if attributes else expected]
    ((_, found),) = Given(values).entries()
    assert found.number("DelaySeconds", 0, 900) == 5 and found.text("MessageBody") == body


def test_lists_and_maps_of_the_query_protocol() -> None:
    query = "Action=X&AttributeName.2=b&AttributeName.10=c&AttributeName.1=a&MessageAttributeName=All"
    form = b"Attribute.1.Name=VisibilityTimeout&Attribute.1.Value=1&Attribute.2.Name=Policy&Attribute.2.Value="
    assert from_query(query, form) == (
        "X",
        {
            "AttributeNames": ["a", "b", "c"],
            "MessageAttributeNames": ["All"],
            "Attributes": {"VisibilityTimeout": "1", "Policy": ""},
        },
    )


@pytest.mark.parametrize(
    "form",
    [b"\xff=1", b"a=1&a.b=2", b".".join([b"a"] * 9) + b"=1", b"&".join(b"a%d=1" % n for n in range(1001)), b"a=%ff"],
)
def test_a_form_that_cannot_be_read(form: bytes) -> None:
    with pytest.raises(SqsError) as caught:
        from_query("", form)
    assert caught.value.code.old == "MalformedInput"


@given(st.binary(max_size=60))
def test_no_form_and_no_json_fails_in_another_way(data: bytes) -> None:
    for read in (partial(from_query, "", data), partial(from_json, "AmazonSQS.X", data)):
        try:
            _, values = read()
        except SqsError:
            continue
        call = Given(values)
        asks: list[partial[Any]] = [
            partial(call.entries),
            partial(call.names, "AttributeNames"),
            partial(call.map, "Attributes"),
            partial(call.number, "a", 0, 1),
            partial(call.text, "a"),
        ]
        for ask in asks:
            with suppress(SqsError):
                ask()


@pytest.mark.parametrize(
    "values",
    [
        {"n": "x"}, {"n": 11}, {"n": -1}, {"n": 1.5}, {"n": True}, {"n": []}, {"n": "9" * 5000},
    ],
)  # fmt: skip
def test_a_number_outside_its_limits(values: dict[str, Any]) -> None:
    with pytest.raises(SqsError):
        Given(values).number("n", 0, 10)


@given(TEXT)
def test_xml_keeps_a_text(text: str) -> None:
    answer = {"Messages": [{"MessageId": "1", "Body": text, "Attributes": {"SenderId": text}}]}
    document = ET.fromstring(xml_answer("ReceiveMessage", answer, "r"))
    (message,) = document.findall(f"{XML}ReceiveMessageResult/{XML}Message")
    assert message.findtext(f"{XML}Body") == text
    assert message.findtext(f"{XML}Attribute/{XML}Value") == text
    assert document.findtext(f"{XML}ResponseMetadata/{XML}RequestId") == "r"


def test_errors_in_both_protocols() -> None:
    error = SqsError(BAD_VALUE, 'a < "b"')
    content, headers = json_error(error)
    assert orjson.loads(content) == {"__type": "com.amazonaws.sqs#InvalidParameterValueException", "message": 'a < "b"'}
    assert headers == {"x-amzn-query-error": "InvalidParameterValue;Sender"}
    found = ET.fromstring(xml_error(error, "r")).find(f"{XML}Error")
    assert found is not None
    assert [found.findtext(f"{XML}{name}") for name in ("Type", "Code", "Message")] == [
        "Sender",
        "InvalidParameterValue",
        'a < "b"',
    ]


def test_errors_of_the_api_and_of_the_store() -> None:
    cases = [
        (RequestRefused(403, "no", hint="Do."), "AccessDenied", 403),
        (RequestRefused(429, "often"), "RequestThrottled", 429),
        (RequestRefused(413, "large"), "RequestEntityTooLarge", 413),
        (StoreUnavailable("away"), "ServiceUnavailable", 503),
        (UsageError("odd"), "ServiceUnavailable", 503),
    ]
    for error, code, status in cases:
        found = sqs_error(error)
        assert (found.code.old, found.code.status) == (code, status)
    assert str(sqs_error(cases[0][0])) == "no Do."
    assert b"Receiver" in xml_error(sqs_error(StoreUnavailable("away")), "r")


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["All"], True), ([".*"], True), (["a.*"], True), (["a.b"], True), (["a"], False), (["b.*"], False), ([], False)],
)
def test_names_that_are_wanted(names: list[str], expected: bool) -> None:
    assert wanted(names, "a.b") is expected


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.text("0123456789+/=-_. é١"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(ANYTHING, st.sampled_from(["String", "Number", "Binary", "Binary.x"]))
@example("é", "Binary")
@example("a===", "Binary")
def test_no_value_fails_in_another_way(value: Any, kind: str) -> None:
    typed = {"DataType": kind, "StringValue": value, "BinaryValue": value}
    given_ = Given({"x": value})
    calls: list[Callable[[], object]] = [
        lambda: sent_attributes(value),
        lambda: md5_of_attributes(sent_attributes({"a": typed})),
        lambda: size_of("x", sent_attributes({"a": typed})),
        lambda: sent_trace({"AWSTraceHeader": typed}),
        lambda: given_.optional("x"),
        lambda: given_.number("x", 0, 10),
        lambda: given_.names("x"),
        lambda: given_.map("x"),
        lambda: Given({"Entries": value}).entries(),
        lambda: _whole("x", value if isinstance(value, str) else "", 0, 10),
        lambda: _policy(value if isinstance(value, str) else ""),
        lambda: _token(value if isinstance(value, str) else ""),
        lambda: name_in_url(str(value)),
        lambda: name_in_arn(str(value)),
    ]
    for call in calls:
        with suppress(SqsError):
            call()


@given(st.text())
def test_xml_is_always_well_formed(text: str) -> None:
    assert ET.fromstring(xml_error(SqsError(BAD_VALUE, text), "1")) is not None
    assert safe_for_xml(safe_for_xml(text)) == safe_for_xml(text)


def test_ids_of_messages_are_uuids() -> None:
    assert re.fullmatch(r"0{8}-0{4}-0{4}-0{4}-[0-9a-f]{12}", message_id(17))
