"""Send messages: publish them to the first topic of the consumer.

A body that is a JSON object or array becomes the record of the message as it is, and any other body becomes a JSON
string. The rest, such as message attributes, is kept in the field `sqs` of the message's data. For example, the body
"hello" is {"op": "message", "record": "hello", …, "sqs": {}}. All messages of a batch are published in one statement.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Final, NamedTuple

import orjson

from cdcbridge.web.sqs.attributes import (
    MOST_BYTES,
    Attributes,
    check_body,
    md5,
    md5_of_attributes,
    sent_attributes,
    sent_trace,
    size_of,
)
from cdcbridge.web.sqs.calls import SqsAnswer, SqsCall
from cdcbridge.web.sqs.directory import NamedQueue
from cdcbridge.web.sqs.errors import BAD_VALUE, LONG_BATCH, MISSING, UNSUPPORTED, SqsError
from cdcbridge.web.sqs.requests import Given, sorted_out

_LONGEST_DELAY: Final = 900  # seconds
_ID: Final = re.compile(r"[!-~]{1,128}")  # a group or a deduplication id
_AROUND: Final = len('{"op":"message","record":,"old":null,"unchanged":[],"sqs":}')
_SEND: Final = "select unnest(publish_batch(%s, %s::text[], %s::text[], %s::text[], %s::text[], %s::float8[]))"


class Sending(NamedTuple):
    """A message to send.

    Attributes:
        key: The group, or None.
        trace: The header of AWS X-Ray, or None.
        delay: Seconds, or None.
    """

    body: str
    attributes: Attributes
    trace: str | None
    key: str | None
    dedup_id: str | None
    delay: int | None

    @property
    def record(self) -> str:
        """The record of the message's data, as JSON."""
        return self.body if _is_document(self.body) else orjson.dumps(self.body).decode()

    @property
    def kept(self) -> str:
        """The field `sqs` of the message's data, as JSON."""
        found: dict[str, Any] = {"attributes": self.attributes, "dedup_id": self.dedup_id, "trace": self.trace}
        return orjson.dumps({name: value for name, value in found.items() if value}).decode()


def message_id(seq: int) -> str:
    """Return the seq in the form of a UUID. It is the same for each delivery, and for a duplicate."""
    digits = f"{seq:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def sequence_number(seq: int) -> str:
    """Return the seq as clients compare it, as a text."""
    return f"{seq:020d}"


async def send_message(call: SqsCall) -> SqsAnswer:
    """Publish a message."""
    queue = await call.queue("publish")
    message = _checked(queue, call.given)
    (seq,) = await _publish(call, queue, [message])
    return _sent(queue, message, seq)


async def send_message_batch(call: SqsCall) -> SqsAnswer:
    """Publish up to ten messages."""
    queue = await call.queue("publish")
    right, failed = sorted_out(call.given.entries(), lambda given: _checked(queue, given))
    if sum(size_of(one.body, one.attributes) for _, one in right) > MOST_BYTES:
        raise SqsError(LONG_BATCH, f"Batch requests cannot be longer than {MOST_BYTES} bytes.")
    seqs = await _publish(call, queue, [one for _, one in right]) if right else []
    sent = [{"Id": id_, **_sent(queue, one, seq)} for (id_, one), seq in zip(right, seqs, strict=True)]
    return {"Successful": sent, "Failed": failed}


async def _publish(call: SqsCall, queue: NamedQueue, messages: list[Sending]) -> list[int]:
    columns: tuple[list[Any], ...] = (
        [one.key for one in messages],
        [one.record for one in messages],
        [one.kept for one in messages],
        [one.dedup_id for one in messages],
        [one.delay for one in messages],
    )
    return [seq for (seq,) in await call.store.rows(_SEND, (_topic(queue), *columns))]


def _topic(queue: NamedQueue) -> str:
    topics = queue.config.get("topics")
    if queue.letters:
        raise SqsError(UNSUPPORTED, f"{queue.name} holds the dead letters of {queue.consumer}, and takes no messages.")
    if not topics:
        raise SqsError(
            UNSUPPORTED,
            f"The consumer {queue.consumer!r} takes the changes of tables, and no published messages."
            " Give it `topics` in the configuration file.",
        )
    return str(topics[0])


def _sent(queue: NamedQueue, message: Sending, seq: int) -> dict[str, Any]:
    found = {"MessageId": message_id(seq), "MD5OfMessageBody": md5(message.body)}
    if message.attributes:
        found["MD5OfMessageAttributes"] = md5_of_attributes(message.attributes)
    if message.trace:
        trace = {"AWSTraceHeader": {"DataType": "String", "StringValue": message.trace}}
        found["MD5OfMessageSystemAttributes"] = md5_of_attributes(trace)
    if queue.fifo:
        found["SequenceNumber"] = sequence_number(seq)
    return found


def _checked(queue: NamedQueue, given: Given) -> Sending:
    """Return the message of a request or of an entry of a batch.

    Raises:
        SqsError: It cannot be sent to this queue.
    """
    _topic(queue)
    body = given.text("MessageBody")
    check_body(body)
    attributes = sent_attributes(given.map("MessageAttributes"))
    group, dedup_id = _id(given, "MessageGroupId"), _id(given, "MessageDeduplicationId")
    delay = given.number("DelaySeconds", 0, _LONGEST_DELAY)
    if queue.fifo:
        if group is None:
            raise SqsError(MISSING, "The request must contain the parameter MessageGroupId.")
        if dedup_id is None:  # ContentBasedDeduplication
            dedup_id = hashlib.sha256(body.encode()).hexdigest()
        if delay:
            raise SqsError(
                BAD_VALUE,
                f"Value {delay} for parameter DelaySeconds is invalid. Reason: The request include parameter that is"
                " not valid for this queue type.",
            )
    found = Sending(body, attributes, sent_trace(given.map("MessageSystemAttributes")), group, dedup_id, delay)
    # The data of a message is longer than the body, and counts for the consumer's max_message_bytes.
    data = len(found.record.encode()) + len(found.kept.encode()) + _AROUND
    if size_of(body, attributes) > queue.most_bytes or data > queue.config["max_message_bytes"]:
        raise SqsError(
            BAD_VALUE,
            f"One or more parameters are invalid. Reason: Message must be shorter than {queue.most_bytes} bytes.",
        )
    return found


def _id(given: Given, name: str) -> str | None:
    value = given.optional(name)
    if value is not None and not _ID.fullmatch(value):
        raise SqsError(
            BAD_VALUE,
            f"Value {value} for parameter {name} is invalid. Reason: {name} can only include alphanumeric and"
            " punctuation characters. 1 to 128 in length.",
        )
    return value


def _is_document(body: str) -> bool:
    """Return whether a body is a JSON object or array, without space around it, which the store would not keep."""
    if body[0] not in "{[" or body[-1] not in "}]":
        return False
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True
