"""Receive messages, delete them, and change how long they are invisible.

The body of a message that was sent through SQS is the text that was sent. The body of any other message is its data, as
JSON. A caller that disconnects before the answer is sent gives its messages back. Never keeps a message.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

import orjson

from cdcbridge.web.calls import Polled
from cdcbridge.web.sqs.attributes import md5, md5_of_attributes, safe_for_xml, wanted
from cdcbridge.web.sqs.calls import SqsAnswer, SqsCall
from cdcbridge.web.sqs.deliveries import ANY_ORDER, IN_ORDER, LETTERS, DeliveryStatements
from cdcbridge.web.sqs.directory import NamedQueue
from cdcbridge.web.sqs.errors import BAD_ATTRIBUTE_NAME, BAD_RECEIPT, BAD_VALUE, MISSING, NOT_IN_FLIGHT, SqsError
from cdcbridge.web.sqs.requests import Given, failed_entry, sorted_out
from cdcbridge.web.sqs.sending import message_id, sequence_number

_MOST: Final = 10  # messages of a request
_LONGEST_WAIT: Final = 20  # seconds
_LONGEST: Final = 43_200  # seconds that a message is invisible
_KNOWN: Final = {
    "All",
    "ApproximateFirstReceiveTimestamp",
    "ApproximateReceiveCount",
    "AWSTraceHeader",
    "DeadLetterQueueSourceArn",
    "MessageDeduplicationId",
    "MessageGroupId",
    "SenderId",
    "SentTimestamp",
    "SequenceNumber",
}
_OP: Final = re.compile(r'\s*\{\s*"op"\s*:\s*"([a-z]+)"')
_BEFORE: Final = '{"op":"message","record":'  # as append_published() writes it
_AFTER: Final = ',"old":null,"unchanged":[],"sqs":'
_RECEIPT: Final = re.compile("[0-9]{1,18}-[0-9]{1,18}")
_PLAIN: Final = str.maketrans("-_+/", "+/  ")  # handles have the alphabet of URLs
_DEAD: Final = "select seq from dead_messages where consumer_id = %s and seq = any (%s::bigint[])"
_SEQS: Final = "select seq from consumer_messages where consumer_id = %s and seq = any (%s::bigint[])"


class Delivered(NamedTuple):
    """One row of receive(), or of read_letters()."""

    receipt: str
    seq: int
    topic: str
    key: str | None
    data: str
    deliver_count: int
    commit_lsn: str | None
    sent_at: int


def statements_of(queue: NamedQueue) -> DeliveryStatements:
    """Return the statements for a queue."""
    if queue.letters:
        return LETTERS
    return IN_ORDER if queue.fifo else ANY_ORDER


async def receive_message(call: SqsCall) -> SqsAnswer:
    """Receive messages, and wait for the first one."""
    queue, given = await call.queue("deliver"), call.given
    most = given.number("MaxNumberOfMessages", 1, _MOST) or 1
    wait = given.number("WaitTimeSeconds", 0, _LONGEST_WAIT) or 0
    timeout = given.number("VisibilityTimeout", 0, _LONGEST)
    names = given.names("MessageAttributeNames")
    system = given.names("AttributeNames", "MessageSystemAttributeNames")
    if unknown := set(system) - _KNOWN:
        raise SqsError(BAD_ATTRIBUTE_NAME, f"Unknown Attribute {min(unknown)}.")
    found = await _poll(call, queue, (most, timeout), float(wait))
    if not found:
        return {}
    return {"Messages": [_shown(call, queue, one, names, system) for one in _grouped(queue, found)]}


def _grouped(queue: NamedQueue, found: list[Delivered]) -> list[Delivered]:
    """Return the messages of a fifo queue group by group, as clients of SQS are used to."""
    if not queue.fifo:
        return found
    first: dict[str | None, int] = {}
    for place, one in enumerate(found):
        first.setdefault(one.key, place)
    return sorted(found, key=lambda one: first[one.key])


async def _poll(call: SqsCall, queue: NamedQueue, values: tuple[Any, ...], wait: float) -> list[Delivered]:
    statements, name, services = statements_of(queue), queue.consumer, call.services
    room = f"{name} {statements.kind}" if queue.letters else name
    polled = Polled(statements.receive, (services.config.api.max_answer, name, *values), statements.due, room)
    rows = await services.poll(polled, name, wait, call.gone)
    kept = await services.sent(rows, call.gone, statements.give_back, name, receipt=0, document=4)
    return [Delivered(*row) for row in kept]


def _shown(call: SqsCall, queue: NamedQueue, one: Delivered, names: list[str], system: list[str]) -> dict[str, Any]:
    body, kept = body_of(one.data)
    found: dict[str, Any] = {
        "MessageId": message_id(one.seq),
        "ReceiptHandle": handle_of(queue, one.receipt),
        "MD5OfBody": md5(body),
        "Body": body,
    }
    if system:
        values = _system_attributes(call, queue, one, kept or {})
        if shown := {name: value for name, value in values.items() if wanted(system, name)}:
            found["Attributes"] = shown
    if names:
        sent = (kept or {}).get("attributes", {})
        # The sender's attributes arrive unchanged: those of cdcbridge join them only where they are named.
        own = {name: value for name, value in _own_attributes(one).items() if not sent or name in names}
        if attributes := {name: value for name, value in {**own, **sent}.items() if wanted(names, name)}:
            found["MD5OfMessageAttributes"] = md5_of_attributes(attributes)
            found["MessageAttributes"] = attributes
    return found


def body_of(data: str) -> tuple[str, Mapping[str, Any] | None]:
    """Return the body of a message, and its field `sqs`, or None if it was not sent through SQS.

    For example, {"op":"message","record":"hello","old":null,"unchanged":[],"sqs":{}} has the body hello.

    Args:
        data: The data of the message, as JSON.
    """
    if data.startswith(_BEFORE) and (end := data.rfind(_AFTER)) > 0:
        # Where the record of a published message contains these keys, no complete document follows.
        with suppress(orjson.JSONDecodeError):
            kept = orjson.loads(data[end + len(_AFTER) : -1])
            record = data[len(_BEFORE) : end]
            return (orjson.loads(record) if record.startswith('"') else record), kept
    return safe_for_xml(data), None


def _own_attributes(one: Delivered) -> dict[str, dict[str, str]]:
    op = _OP.match(one.data)
    found = {"topic": one.topic, "op": op[1] if op else None, "commit_lsn": one.commit_lsn}
    texts = {name: {"DataType": "String", "StringValue": safe_for_xml(value)} for name, value in found.items() if value}
    return {**texts, "seq": {"DataType": "Number", "StringValue": str(one.seq)}}


def _system_attributes(call: SqsCall, queue: NamedQueue, one: Delivered, kept: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "SenderId": "cdcbridge",
        "SentTimestamp": str(one.sent_at),
        "ApproximateReceiveCount": str(one.deliver_count),
        # The store keeps the time of the last delivery alone.
        "ApproximateFirstReceiveTimestamp": str(int(time.time() * 1000)),
    }
    if one.key:
        found["MessageGroupId"] = safe_for_xml(one.key)
    if queue.fifo:
        found["SequenceNumber"] = sequence_number(one.seq)
        found["MessageDeduplicationId"] = kept.get("dedup_id") or str(one.seq)
    if "trace" in kept:
        found["AWSTraceHeader"] = kept["trace"]
    if queue.letters:
        found["DeadLetterQueueSourceArn"] = call.arn(queue.source)
    return found


def handle_of(queue: NamedQueue, receipt: str) -> str:
    """Return the receipt handle of a receipt, which is valid for this queue alone."""
    kind = statements_of(queue).kind
    return base64.urlsafe_b64encode(f"{kind}:{queue.consumer}:{receipt}".encode()).decode()


def receipt_of(queue: NamedQueue, given: Given) -> str:
    """Return the receipt in the parameter ReceiptHandle.

    Raises:
        SqsError: It is not a handle of this queue.
    """
    handle = given.text("ReceiptHandle")
    try:
        text = binascii.a2b_base64(handle.translate(_PLAIN), strict_mode=True).decode("ascii")
    except ValueError:
        text = ""
    owner, _, receipt = text.rpartition(":")
    if owner != f"{statements_of(queue).kind}:{queue.consumer}" or not _RECEIPT.fullmatch(receipt):
        raise SqsError(BAD_RECEIPT, f'The input receipt handle "{handle[:200]}" is not a valid receipt handle.')
    return receipt


async def delete_message(call: SqsCall) -> SqsAnswer:
    """Delete a message that was received."""
    queue = await call.queue("deliver")
    receipt = receipt_of(queue, call.given)
    if await _delete(call, queue, [receipt]):
        raise _expired(call.given.text("ReceiptHandle"))
    return {}


async def delete_message_batch(call: SqsCall) -> SqsAnswer:
    """Delete up to ten messages."""
    queue = await call.queue("deliver")
    right, failed = sorted_out(call.given.entries(), lambda given: (receipt_of(queue, given), given))
    rest = await _delete(call, queue, [receipt for _, (receipt, _) in right]) if right else frozenset[str]()
    failed += [
        failed_entry(id_, _expired(given.text("ReceiptHandle"))) for id_, (receipt, given) in right if receipt in rest
    ]
    return {"Successful": [{"Id": id_} for id_, (receipt, _) in right if receipt not in rest], "Failed": failed}


async def _delete(call: SqsCall, queue: NamedQueue, receipts: list[str]) -> frozenset[str]:
    """Delete messages, and return the receipts of those that could not be deleted.

    A message that was deleted before counts as deleted. In any order, so does one that was received again since. One
    that became a dead letter does not: it stays there, so nobody may believe that it is gone.
    """
    values = (queue.consumer, sorted(receipts, key=_place))
    done = await call.store.value(statements_of(queue).delete, values)
    if done == len(receipts) or queue.letters:
        return frozenset()
    seqs = [_place(receipt)[1] for receipt in receipts]
    left = await call.store.rows(_DEAD, (queue.id, seqs))
    if queue.fifo:
        left += await call.store.rows(_SEQS, (queue.id, seqs))
    return frozenset(receipt for receipt, seq in zip(receipts, seqs, strict=True) if (seq,) in left)


def _expired(handle: str) -> SqsError:
    return SqsError(
        BAD_VALUE,
        f"Value {handle} for parameter ReceiptHandle is invalid. Reason: The receipt handle has expired, and the"
        " message is in the queue again, or is a dead letter.",
    )


async def change_message_visibility(call: SqsCall) -> SqsAnswer:
    """Keep a message invisible for longer or shorter, counted from now."""
    queue = await call.queue("deliver")
    change = _change(queue, call.given)
    (done,) = await _extend(call, queue, [change])
    if not done:
        raise await _not_in_flight(call, queue, change[0])
    return {}


async def change_message_visibility_batch(call: SqsCall) -> SqsAnswer:
    """Do the same for up to ten messages."""
    queue = await call.queue("deliver")
    right, failed = sorted_out(call.given.entries(), lambda given: _change(queue, given))
    done = await _extend(call, queue, [change for _, change in right]) if right else []
    successful: list[dict[str, Any]] = []
    for (id_, (receipt, _)), extended in zip(right, done, strict=True):
        if extended:
            successful.append({"Id": id_})
        else:
            failed.append(failed_entry(id_, await _not_in_flight(call, queue, receipt)))
    return {"Successful": successful, "Failed": failed}


def _change(queue: NamedQueue, given: Given) -> tuple[str, int]:
    receipt = receipt_of(queue, given)
    timeout = given.number("VisibilityTimeout", 0, _LONGEST)
    if timeout is None:
        raise SqsError(MISSING, "The request must contain the parameter VisibilityTimeout.")
    return receipt, timeout


async def _extend(call: SqsCall, queue: NamedQueue, changes: list[tuple[str, int]]) -> list[bool]:
    # Two batches that lock the same messages in different orders would wait for each other.
    order = sorted(range(len(changes)), key=lambda n: _place(changes[n][0]))
    receipts, timeouts = [changes[n][0] for n in order], [changes[n][1] for n in order]
    rows = await call.store.rows(statements_of(queue).extend, (receipts, timeouts, queue.consumer))
    done = dict(zip(order, (row[0] for row in rows), strict=True))
    if 0 in timeouts:  # the store notifies nobody of it, and other processes may have polls that wait
        await call.store.rows("select pg_notify(store_schema(), %s)", (str(queue.id),))
    else:
        call.services.arrivals.tell(queue.consumer)
    return [done[n] for n in range(len(changes))]


def _place(receipt: str) -> tuple[int, int]:
    """Return the place of a receipt in the order in which batches lock messages: by claim, and then by seq."""
    seq, _, claim = receipt.partition("-")
    return int(claim), int(seq)


async def _not_in_flight(call: SqsCall, queue: NamedQueue, receipt: str) -> SqsError:
    """Return the error for a message that is not in flight under this receipt: it waits, or it is gone."""
    seq = _place(receipt)[1]
    if queue.letters or await call.store.rows(_SEQS, (queue.id, [seq])):
        return SqsError(NOT_IN_FLIGHT, "The message referred to isn't in flight.")
    return SqsError(
        BAD_VALUE,
        f"Value {handle_of(queue, receipt)} for parameter ReceiptHandle is invalid. Reason: Message does not exist or"
        " is not available for visibility timeout change.",
    )
