"""Requests as they are on the wire: the query protocol, presigned URLs, and requests that must be refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree as ET

import httpx
import pytest
from botocore.auth import SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.harness.world import World, eventually
from tests.web.conftest import ADMIN, TOKENS, client, declare, listening, problem, serving
from tests.web.sqs.conftest import BILLING, OPS, REGION, SQS, refused

NS = "{http://queue.amazonaws.com/doc/2012-11-05/}"
FORM = "application/x-www-form-urlencoded"


class Wire:
    """Sends requests that botocore has signed, and returns the answers as they are."""

    def __init__(self, url: str, http: httpx.Client, key: tuple[str, str] = OPS) -> None:
        self.url = url
        self._http = http
        self._key = Credentials(*key)

    def send(self, method: str, path: str, data: bytes = b"", **headers: str) -> httpx.Response:
        request = AWSRequest(method, self.url + path, data=data, headers=headers)
        SigV4Auth(self._key, "sqs", REGION).add_auth(request)
        prepared = request.prepare()
        return self._http.request(method, self.url + path, content=data, headers=dict(prepared.headers))

    def form(self, path: str = "/", **fields: str) -> httpx.Response:
        named = {name.replace("__", "."): value for name, value in fields.items()}
        return self.send("POST", path, urlencode(named).encode(), **{"Content-Type": FORM})

    def json(self, action: str, path: str = "/", **fields: Any) -> httpx.Response:
        target = {"X-Amz-Target": f"AmazonSQS.{action}", "Content-Type": "application/x-amz-json-1.0"}
        return self.send("POST", path, json.dumps(fields).encode(), **target)

    def presigned(self, path: str = "/", lasts: int = 60, **fields: str) -> str:
        request = AWSRequest("GET", f"{self.url}{path}?{urlencode(fields)}")
        SigV4QueryAuth(self._key, "sqs", REGION, expires=lasts).add_auth(request)
        return str(request.prepare().url)


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with client(url) as made:
        yield made


@pytest.fixture
def wire(url: str, http: httpx.Client) -> Wire:
    return Wire(url, http)


def xml(answer: httpx.Response, path: str) -> list[str | None]:
    assert answer.headers["content-type"].startswith("text/xml"), answer.text
    return [one.text for one in ET.fromstring(answer.text).findall("/".join(f"{NS}{part}" for part in path.split("/")))]


def error(answer: httpx.Response, status: int) -> str:
    """The code of an error in either protocol."""
    assert answer.status_code == status, answer.text
    if "json" in answer.headers["content-type"]:
        assert answer.json()["__type"].startswith("com.amazonaws.sqs#") and answer.json()["message"]
        return answer.headers["x-amzn-query-error"].partition(";")[0]
    (code,), (message,) = xml(answer, "Error/Code"), xml(answer, "Error/Message")
    assert message
    return str(code)


def action_of(answer: httpx.Response) -> str:
    """The action that an answer of the query protocol names."""
    return ET.fromstring(answer.text).tag.removeprefix(NS).removesuffix("Response")


def test_the_query_protocol(wire: Wire) -> None:
    queue = f"{wire.url}/000000000000/billing"
    assert queue in xml(wire.form(Action="ListQueues"), "ListQueuesResult/QueueUrl")
    sent = wire.form(
        Action="SendMessage",
        QueueUrl=queue,
        MessageBody="a\r\nb",
        MessageAttribute__1__Name="n",
        MessageAttribute__1__Value__DataType="Number",
        MessageAttribute__1__Value__StringValue="1",
    )
    (message_id,) = xml(sent, "SendMessageResult/MessageId")
    assert xml(sent, "ResponseMetadata/RequestId") == [sent.headers["x-amzn-requestid"]]
    answer = wire.form(
        Action="ReceiveMessage", QueueUrl=queue, AttributeName__1="All", MessageAttributeName__1="All",
        WaitTimeSeconds="5", MaxNumberOfMessages="10",
    )  # fmt: skip
    assert xml(answer, "ReceiveMessageResult/Message/MessageId") == [message_id]
    assert xml(answer, "ReceiveMessageResult/Message/Body") == ["a\r\nb"]
    assert xml(answer, "ReceiveMessageResult/Message/MessageAttribute/Value/StringValue") == ["1"]
    assert "ApproximateReceiveCount" in xml(answer, "ReceiveMessageResult/Message/Attribute/Name")
    (handle,) = xml(answer, "ReceiveMessageResult/Message/ReceiptHandle")
    deleted = wire.form(
        Action="DeleteMessageBatch",
        QueueUrl=queue,
        DeleteMessageBatchRequestEntry__1__Id="a",
        DeleteMessageBatchRequestEntry__1__ReceiptHandle=str(handle),
        DeleteMessageBatchRequestEntry__2__Id="b",
        DeleteMessageBatchRequestEntry__2__ReceiptHandle="x",
    )
    assert xml(deleted, "DeleteMessageBatchResult/DeleteMessageBatchResultEntry/Id") == ["a"]
    assert xml(deleted, "DeleteMessageBatchResult/BatchResultErrorEntry/Code") == ["ReceiptHandleIsInvalid"]
    assert xml(deleted, "DeleteMessageBatchResult/BatchResultErrorEntry/SenderFault") == ["true"]
    for empty in (
        wire.form(Action="ReceiveMessage", QueueUrl=queue),
        wire.form(Action="ListQueues", QueueNamePrefix="none"),
        wire.form(Action="ListQueueTags", QueueUrl=queue),
    ):
        assert not xml(empty, f"{action_of(empty)}Result")[0]
    assert "Result" not in wire.form(Action="SetQueueAttributes", QueueUrl=queue).text


def test_a_request_to_the_url_of_the_queue(wire: Wire) -> None:
    path = "/000000000000/billing"
    assert wire.form(path, Action="SendMessage", MessageBody="x").status_code == 200
    other = f"{wire.url}/000000000000/search"
    named = wire.form(path, Action="GetQueueAttributes", QueueUrl=other, AttributeName__1="QueueArn")
    assert str(xml(named, "GetQueueAttributesResult/Attribute/Value")[0]).endswith(":search")
    assert xml(wire.form(path, Action="ReceiveMessage"), "ReceiveMessageResult/Message/Body") == ["x"]
    assert error(wire.form("/000000000000/none", Action="ReceiveMessage"), 400).endswith("NonExistentQueue")


def test_a_json_request_to_the_url_of_the_queue(wire: Wire) -> None:
    path = "/000000000000/billing"
    assert wire.json("SendMessage", path, MessageBody="x").status_code == 200
    (found,) = wire.json("ReceiveMessage", path).json()["Messages"]
    assert found["Body"] == "x"


def test_a_presigned_url(wire: Wire, http: httpx.Client) -> None:
    assert http.get(wire.presigned(Action="SendMessage", QueueUrl="billing", MessageBody="ä +&")).status_code == 200
    received = http.get(wire.presigned("/000000000000/billing", Action="ReceiveMessage"))
    assert xml(received, "ReceiveMessageResult/Message/Body") == ["ä +&"]
    changed = wire.presigned(Action="ListQueues").replace("ListQueues", "PurgeQueue")
    assert error(http.get(changed), 403) == "SignatureDoesNotMatch"
    assert error(http.get(wire.presigned(Action="ListQueues", lasts=604_801)), 400) == "IncompleteSignature"


def test_the_audit_log_has_no_signature(wire: Wire, http: httpx.Client, world18: World) -> None:
    url = wire.presigned("/000000000000/billing", Action="PurgeQueue", Other="x")
    assert http.get(url).status_code == 200
    wire.json("SetQueueAttributes", QueueUrl="billing", Attributes={"VisibilityTimeout": "9"}, Other="x" * 100_000)
    rows = world18.rows("select action, subject, details from cdcbridge.audit order by id")
    assert rows == [
        ("PurgeQueue", "billing", {"purged": 0}),
        ("SetQueueAttributes", "billing", {"visibility_timeout": 9}),
    ]


def test_actions_that_do_not_exist(wire: Wire) -> None:
    assert error(wire.form(Action="Foo"), 400) == error(wire.json("Foo"), 400) == "InvalidAction"
    assert error(wire.form(), 400) == "InvalidAction"
    assert error(wire.form(Action="SendMessage"), 400) == error(wire.json("SendMessage"), 400) == "MissingParameter"
    assert error(wire.json("TagQueue"), 400) == "AWS.SimpleQueueService.UnsupportedOperation"


@pytest.mark.parametrize("body", [b"{", b"[]", b"1", b'"x"', b"\xff"])
def test_json_that_is_none(wire: Wire, body: bytes) -> None:
    answer = wire.send("POST", "/", body, **{"X-Amz-Target": "AmazonSQS.ListQueues"})
    assert error(answer, 400) == "MalformedInput"


@pytest.mark.parametrize(
    ("action", "fields"),
    [
        ("SendMessage", {"MessageBody": 1}),
        ("SendMessage", {"MessageBody": "x", "MessageAttributes": []}),
        ("SendMessage", {"MessageBody": "x", "MessageAttributes": {"a": 1}}),
        ("SendMessage", {"MessageBody": "x", "MessageAttributes": {"a": {"DataType": 1}}}),
        ("SendMessage", {"MessageBody": "x", "MessageSystemAttributes": {"AWSTraceHeader": 1}}),
        ("SendMessage", {"MessageBody": "x", "MessageGroupId": 1}),
        ("SendMessage", {"MessageBody": "x", "DelaySeconds": 1.5}),
        ("SendMessageBatch", {"Entries": {"a": 1}}),
        ("SendMessageBatch", {"Entries": [1]}),
        ("ReceiveMessage", {"MaxNumberOfMessages": True}),
        ("ReceiveMessage", {"AttributeNames": "All"}),
        ("ReceiveMessage", {"MessageAttributeNames": [1]}),
        ("DeleteMessage", {"ReceiptHandle": {}}),
        ("ListQueues", {"NextToken": "ä"}),
        ("SetQueueAttributes", {"Attributes": [1]}),
    ],
)
def test_a_parameter_of_another_type(wire: Wire, action: str, fields: dict[str, Any]) -> None:
    assert error(wire.json(action, QueueUrl="billing", **fields), 400) in {"InvalidParameterValue", "MissingParameter"}


@pytest.mark.parametrize(
    ("action", "fields", "expected"),
    [
        ("GetQueueAttributes", {"QueueUrl": "http://["}, "AWS.SimpleQueueService.NonExistentQueue"),
        ("SetQueueAttributes", {"Attributes": {"VisibilityTimeout": "9" * 5000}}, "InvalidAttributeValue"),
        (
            "SetQueueAttributes",
            {"Attributes": {"RedrivePolicy": f'{{"maxReceiveCount": "{"9" * 5000}"}}'}},
            "InvalidAttributeValue",
        ),
        ("ReceiveMessage", {"MaxNumberOfMessages": "9" * 5000}, "InvalidParameterValue"),
        ("ReceiveMessage", {"MessageAttributeNames": ["x"] * 101}, "InvalidParameterValue"),
        (
            "SendMessage",
            {"MessageBody": "x", "MessageAttributes": {"b": {"DataType": "Binary", "BinaryValue": "é"}}},
            "InvalidParameterValue",
        ),
    ],
)
def test_a_value_that_cannot_be_read(wire: Wire, action: str, fields: dict[str, Any], expected: str) -> None:
    assert error(wire.json(action, **{"QueueUrl": "billing", **fields}), 400) == expected


def test_base64_that_is_none_fails_alone(wire: Wire) -> None:
    wrong = {"b": {"DataType": "Binary", "BinaryValue": "é"}}
    entries = [{"Id": "a", "MessageBody": "x", "MessageAttributes": wrong}, {"Id": "b", "MessageBody": "x"}]
    answer = wire.json("SendMessageBatch", QueueUrl="billing", Entries=entries).json()
    assert [one["Id"] for one in answer["Successful"]] == ["b"] and [one["Id"] for one in answer["Failed"]] == ["a"]


def test_a_date_beyond_the_last_year_is_a_failed_login(wire: Wire, http: httpx.Client) -> None:
    headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential={OPS[0]}/20270101/x/sqs/aws4_request,"
               f" SignedHeaders=host, Signature={'0' * 64}", "Date": "Fri, 31 Dec 9999 23:59:59 -1200"}  # fmt: skip
    answers = [http.post("/", headers=headers) for _ in range(11)]
    assert [one.status_code for one in answers] == [400] * 10 + [429]


def test_characters_that_xml_does_not_know(wire: Wire, world18: World) -> None:
    world18.execute("select cdcbridge.publish('t', e'\\x01\\x1f', '{}'::json)")
    answer = wire.form(Action="ReceiveMessage", QueueUrl="billing", AttributeName__1="MessageGroupId")
    assert xml(answer, "ReceiveMessageResult/Message/Attribute/Value") == ["\\u0001\\u001f"]
    assert error(wire.form(Action="\x01"), 400) == "InvalidAction"


def test_requests_are_counted(wire: Wire, http: httpx.Client) -> None:
    wire.json("ListQueues")
    wire.json("None1")
    found = http.get("/metrics", headers={"Authorization": f"Bearer {ADMIN}"}).text
    counted = [line for line in found.splitlines() if line.startswith("cdcbridge_api_request_seconds_count")]
    assert any('path="/ (SQS ListQueues)"' in line and 'status="200"' in line for line in counted)
    assert any('path="/ (SQS)"' in line and 'status="400"' in line for line in counted)
    assert "None1" not in found


def test_who_may_call(wire: Wire, http: httpx.Client, url: str) -> None:
    assert error(Wire(url, http, (OPS[0], "wrong")).json("ListQueues"), 403) == "SignatureDoesNotMatch"
    assert error(Wire(url, http, ("AKIANOBODY", "x")).json("ListQueues"), 403) == "InvalidClientTokenId"
    unsigned = http.post("/", content=b"{}", headers={"X-Amz-Target": "AmazonSQS.ListQueues"})
    assert error(unsigned, 403) == "MissingAuthenticationToken"
    bearer = {"X-Amz-Target": "AmazonSQS.ListQueues", "Authorization": f"Bearer {ADMIN}"}
    assert error(http.post("/", content=b"{}", headers=bearer), 400) == "IncompleteSignature"
    assert wire.json("ListQueues").status_code == 200
    assert error(Wire(url, http, BILLING).json("PurgeQueue", QueueUrl="search"), 403) == "AccessDenied"


def test_other_paths_belong_to_the_api(wire: Wire, http: httpx.Client) -> None:
    assert http.get("/live").status_code == 200
    assert http.get("/").headers["location"] == "/login?next=%2F", "the dashboard"
    assert problem(http.get("/api/consumers"), 401)
    assert http.get("/api/consumers", headers={"Authorization": f"Bearer {ADMIN}"}).status_code == 200


def test_a_host_that_cannot_be_read(wire: Wire, http: httpx.Client) -> None:
    signed = {"Authorization": "AWS4-HMAC-SHA256 x", "Host": "["}
    assert error(http.post("/", headers=signed), 400) == "IncompleteSignature"


def test_failed_signatures_are_slowed_down(wire: Wire, http: httpx.Client, url: str) -> None:
    stranger = Wire(url, http, (OPS[0], "wrong"))
    answers = [stranger.json("ListQueues") for _ in range(11)]
    assert [one.status_code for one in answers] == [403] * 10 + [429]
    assert error(answers[-1], 429) == "RequestThrottled"
    assert wire.json("ListQueues").status_code == 200, "a right signature is always accepted"


def test_a_request_that_is_too_large(wire: Wire, world18: World, url: str) -> None:
    with serving(world18, tokens=TOKENS, sqs=SQS, max_body="1kB") as small, client(small) as http:
        answer = Wire(small, http).json("SendMessage", QueueUrl="billing", MessageBody="x" * 2000)
        assert error(answer, 413) == "RequestEntityTooLarge"


def test_the_log_has_the_action_and_no_secret(wire: Wire, world18: World, http: httpx.Client) -> None:
    wire.json("SendMessage", QueueUrl="billing", MessageBody="confidential")
    http.get(wire.presigned(Action="ListQueues"))
    log = eventually(lambda: "action=ListQueues" in world18.log("serve.log") and world18.log("serve.log"))
    assert "action=SendMessage" in log and "caller=ops" in log
    assert OPS[1] not in log and "confidential" not in log and "Signature" not in log


def test_no_endpoint_without_keys(world18: World) -> None:
    declare(world18)
    with serving(world18, tokens=TOKENS) as url, client(url) as http:
        assert problem(Wire(url, http).json("ListQueues"), 405)


def test_a_key_of_an_unknown_token_is_refused(world18: World) -> None:
    declare(world18)
    keys = [{"id": "A", "secret": "x", "token": "nobody"}]
    world18.top_settings = {"api": {"listen": "127.0.0.1:0", "tokens": TOKENS, "sqs": {"access_keys": keys}}}
    done = world18.run_program("serve")
    assert done.returncode == 2 and "nobody" in done.stderr
    world18.top_settings["api"]["sqs"] = {"access_keys": [{"id": "A", "secret": "x", "token": "ops"}] * 2}
    done = world18.run_program("serve")
    assert done.returncode == 2 and "same id" in done.stderr


def test_a_poll_ends_with_the_process(world18: World, sqs: Any, billing: str) -> None:
    found: list[Any] = []
    poll = threading.Thread(target=lambda: found.append(sqs.receive_message(QueueUrl=billing, WaitTimeSeconds=20)))
    poll.start()
    eventually(lambda: "next_visible" in str(world18.rows("select query from pg_stat_activity")), "it waits")
    world18._processes[-1].terminate()
    poll.join(10)
    assert len(found) == 1 and "Messages" not in found[0]


def test_a_store_that_is_away(world18: World, sqs: Any, billing: str) -> None:
    world18.execute("alter schema cdcbridge rename to elsewhere")
    try:
        told = refused("ServiceUnavailable", sqs.receive_message, QueueUrl=billing)
    finally:
        world18.execute("alter schema elsewhere rename to cdcbridge")
    assert told
    assert listening(world18)
