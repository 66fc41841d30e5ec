"""List queues, show and change their attributes, empty them, and move dead letters back.

A queue is declared in the configuration file. CreateQueue therefore finds a queue and never makes one, and
SetQueueAttributes changes the two settings that SQS knows as well, until the file is applied again.
"""

from __future__ import annotations

import asyncio
import base64
import math
import re
from collections.abc import Mapping
from time import monotonic
from typing import Any, Final

import orjson

from cdcbridge.config import Config
from cdcbridge.database import connect_store, store_errors
from cdcbridge.store.redrive import PAGE, Redriven, chosen_letters, redrive_page
from cdcbridge.web.sqs.calls import SqsAnswer, SqsCall
from cdcbridge.web.sqs.directory import NamedQueue, name_in_arn
from cdcbridge.web.sqs.errors import (
    BAD_ATTRIBUTE_NAME,
    BAD_ATTRIBUTE_VALUE,
    BAD_VALUE,
    BUSY,
    IN_PROGRESS,
    NO_RESOURCE,
    NO_SUCH_QUEUE,
    OTHER_ATTRIBUTES,
    UNSUPPORTED,
    SqsError,
)

_MOST_QUEUES: Final = 1000  # in an answer
_PURGED_AT_ONCE: Final = 1000  # rows, which may have several messages each
_PAUSE: Final = 0.1  # seconds between two looks at rows that another session has locked
_LONGEST: Final = 15.0  # seconds for a purge or a move
_PURGE: Final = "select purged, rest from purge_messages(%s, %s)"
_PURGE_LETTERS: Final = "select purged, rest from purge_all_letters(%s, %s)"
_WHOLE: Final = re.compile("[0-9]{1,9}")
_COUNTS: Final = "select pending, in_flight, delayed from consumer_lag(%s)"
_LETTERS: Final = "select count(*) from dead_messages where consumer_id = %s"
_READ: Final = "select count(*) from dead_messages where consumer_id = %s and not_visible_until > now()"
# What a bridge counted last, if that is less than two minutes old.
_SAMPLED: Final = """
    select (figures ->> 'pending')::bigint, (figures ->> 'in_flight')::bigint,
           coalesce((figures ->> 'delayed')::bigint, 0), (figures ->> 'dead')::bigint
    from samples where subject = %s and minute > now() - interval '2 minutes' order by minute desc limit 1"""
_MANY: Final = 100_000  # messages, from which on they are not counted anew
_COUNTED: Final = (
    "ApproximateNumberOfMessages",
    "ApproximateNumberOfMessagesNotVisible",
    "ApproximateNumberOfMessagesDelayed",
)
# Attributes that are known, and that a queue may be without.
_UNSET: Final = {
    "KmsDataKeyReusePeriodSeconds",
    "KmsMasterKeyId",
    "Policy",
    "RedriveAllowPolicy",
    "RedrivePolicy",
}
_CHANGE: Final = "update consumers set config = config || %s::jsonb, updated_at = now() where id = %s"


async def list_queues(call: SqsCall) -> SqsAnswer:
    """List the queues that the caller sees, with those of dead letters."""
    call.caller.refuse("look")
    given = call.given
    prefix, most = given.optional("QueueNamePrefix") or "", given.number("MaxResults", 1, _MOST_QUEUES)
    after = _token(given.optional("NextToken"))
    names = [
        one.name
        for one in await call.directory.queues()
        if call.caller.sees(one.consumer) and one.name.startswith(prefix) and one.name > after
    ]
    return _page(call, "QueueUrls", names, most)


async def list_dead_letter_source_queues(call: SqsCall) -> SqsAnswer:
    """Return the queue whose dead letters the given queue holds."""
    queue = await call.queue("look")
    return {"queueUrls": [call.url(queue.source)] if queue.letters else []}


def _page(call: SqsCall, field: str, names: list[str], most: int | None) -> SqsAnswer:
    shown = names[: most or _MOST_QUEUES]
    answer: dict[str, Any] = {field: [call.url(name) for name in shown]} if shown else {}
    if most is not None and len(names) > len(shown):
        answer["NextToken"] = base64.urlsafe_b64encode(shown[-1].encode()).decode()
    return answer


def _token(token: str | None) -> str:
    try:
        return base64.b64decode((token or "").encode("ascii"), altchars=b"-_", validate=True).decode()
    except ValueError:
        raise SqsError(BAD_VALUE, "Invalid or expired next token.") from None


async def get_queue_url(call: SqsCall) -> SqsAnswer:
    """Return the URL of a queue."""
    queue = await call.named(call.given.text("QueueName"), "look")
    return {"QueueUrl": call.url(queue.name)}


async def create_queue(call: SqsCall) -> SqsAnswer:
    """Return the URL of a queue that exists with the given attributes."""
    name = call.given.text("QueueName")
    try:
        queue = await call.named(name, "look")
    except SqsError as error:
        if error.code is not NO_SUCH_QUEUE:
            raise
        raise SqsError(UNSUPPORTED, f"The queue {name!r} cannot be created here. Declare a consumer with this name in"
                       f" the configuration file, and run `cdcbridge consumers apply`. {error}") from None  # fmt: skip
    has = _attributes(call, queue)
    for attribute, value in _given(call, has).items():
        if not _equal(attribute, value, has.get(attribute)):
            raise SqsError(
                OTHER_ATTRIBUTES,
                f"A queue already exists with the same name and a different value for attribute {attribute}:"
                f" {has.get(attribute)!r}, declared in the configuration file, and not {value!r}.",
            )
    return {"QueueUrl": call.url(queue.name)}


async def get_queue_attributes(call: SqsCall) -> SqsAnswer:
    """Show attributes of a queue."""
    queue = await call.queue("look")
    names = set(call.given.names("AttributeNames"))
    found = _attributes(call, queue)
    if unknown := names - found.keys() - _UNSET - {"All", *_COUNTED}:
        raise SqsError(BAD_ATTRIBUTE_NAME, f"Unknown Attribute {min(unknown)}.")
    if "All" in names or names & set(_COUNTED):
        found |= zip(_COUNTED, map(str, await _counts(call, queue)), strict=True)
    shown = {name: value for name, value in found.items() if "All" in names or name in names}
    return {"Attributes": shown} if shown else {}


async def set_queue_attributes(call: SqsCall) -> SqsAnswer:
    """Change the visibility timeout and the number of deliveries, until the configuration file is applied again."""
    queue = await call.queue("look")
    has = _attributes(call, queue)
    changes: dict[str, int] = {}
    for name, value in _given(call, has).items():
        if _equal(name, value, has.get(name)):
            continue
        if name == "VisibilityTimeout" and not queue.letters:
            most = min(43_200, int(call.services.config.store.max_retention))
            changes["visibility_timeout"] = _whole(name, value, 0, most)
        elif name == "RedrivePolicy" and not queue.letters and _own_target(value, has[name]):
            changes["max_deliveries"] = _whole("maxReceiveCount", _policy(value).get("maxReceiveCount", ""), 1, 1000)
        else:
            raise SqsError(
                BAD_ATTRIBUTE_VALUE,
                f"Invalid value for the parameter {name}: it is {has.get(name)!r}, and only the configuration file"
                " can change it.",
            )
    if changes:
        call.caller.refuse("operate", queue.consumer)
        async with call.audited(queue, changes), call.store.session() as session:
            await session.execute(_CHANGE.encode(), (orjson.dumps(changes).decode(), queue.id))
        call.directory.forget()
    return {}


async def _counts(call: SqsCall, queue: NamedQueue) -> tuple[int, int, int]:
    """Return how many messages are visible, in flight, and delayed.

    Few messages are counted. If there are many, the figures are those of the last measurement of the bridge.
    """
    sampled = await call.store.rows(_SAMPLED, (queue.consumer,))
    pending, in_flight, delayed, dead = sampled[0] if sampled else (0, 0, 0, 0)
    if queue.letters:
        letters = dead if dead > _MANY else await call.store.value(_LETTERS, (queue.id,))
        read = await call.store.value(_READ, (queue.id,))
        return max(0, letters - read), read, 0
    if pending + in_flight <= _MANY:
        pending, in_flight, delayed = (await call.store.rows(_COUNTS, (queue.consumer,)))[0]
    return pending - delayed, in_flight, delayed


def _attributes(call: SqsCall, queue: NamedQueue) -> dict[str, str]:
    """Return the attributes that need no look at the messages."""
    config = queue.config
    found = {
        "QueueArn": call.arn(queue.name),
        "CreatedTimestamp": str(int(queue.created_at.timestamp())),
        "LastModifiedTimestamp": str(int(queue.updated_at.timestamp())),
        "VisibilityTimeout": str(math.ceil(config["visibility_timeout"])),
        "MaximumMessageSize": str(queue.most_bytes),
        "MessageRetentionPeriod": str(int(call.services.config.store.max_retention)),
        "DelaySeconds": "0",
        "ReceiveMessageWaitTimeSeconds": "0",
        "SqsManagedSseEnabled": "false",
    }
    if queue.fifo:
        found |= {
            "FifoQueue": "true",
            "ContentBasedDeduplication": "true",
            "DeduplicationScope": "queue",
            "FifoThroughputLimit": "perQueue",
        }
    if not queue.letters:
        policy = {"deadLetterTargetArn": call.arn(queue.dead), "maxReceiveCount": config["max_deliveries"]}
        found["RedrivePolicy"] = orjson.dumps(policy).decode()
    return found


def _given(call: SqsCall, has: Mapping[str, str]) -> dict[str, str]:
    """Return the parameter Attributes, without the attributes that are given as empty to unset them."""
    found = call.given.map("Attributes")
    for name, value in found.items():
        if name not in has and name not in _UNSET:
            raise SqsError(BAD_ATTRIBUTE_NAME, f"Unknown Attribute {name}.")
        if not isinstance(value, str):
            raise SqsError(BAD_ATTRIBUTE_VALUE, f"Invalid value for the parameter {name}.")
    return {name: value for name, value in found.items() if value}


def _equal(name: str, given: str, has: str | None) -> bool:
    if name == "RedrivePolicy":
        return has is not None and _policy(given).items() <= _policy(has).items()
    return given.lower() == (has or "").lower()


def _own_target(given: str, has: str) -> bool:
    """Return whether a redrive policy names the queue's own dead letters, or none."""
    own = _policy(has)["deadLetterTargetArn"]
    return _policy(given).get("deadLetterTargetArn", own) == own


def _policy(text: str) -> dict[str, str]:
    """Return a redrive policy with its numbers as texts."""
    try:
        found = orjson.loads(text)
        return {name: str(value) for name, value in found.items()}
    except (orjson.JSONDecodeError, AttributeError):
        raise SqsError(BAD_ATTRIBUTE_VALUE, "Invalid value for the parameter RedrivePolicy.") from None


def _whole(name: str, value: str, least: int, most: int) -> int:
    if not _WHOLE.fullmatch(value) or not least <= int(value) <= most:
        raise SqsError(
            BAD_ATTRIBUTE_VALUE,
            f"Invalid value for the parameter {name}. Reason: Must be a number between {least} and {most}.",
        )
    return int(value)


async def list_queue_tags(call: SqsCall) -> SqsAnswer:
    """Return no tags, because consumers have none."""
    await call.queue("look")
    return {}


async def purge_queue(call: SqsCall) -> SqsAnswer:
    """Finish all messages of a queue, or delete all its dead letters."""
    queue = await call.queue("deliver")
    async with call.audited(queue, {}) as result:
        result["purged"] = 0
        began = monotonic()
        while True:
            values = (queue.consumer, _PURGED_AT_ONCE)
            purged, rest = (await call.store.rows(_PURGE_LETTERS if queue.letters else _PURGE, values))[0]
            result["purged"] += purged
            if not rest:
                return {}
            if monotonic() - began > _LONGEST or call.services.arrivals.stopping:
                break
            if not purged:
                await asyncio.sleep(_PAUSE)
        reason = "" if purged else " Another session holds them in an open transaction, which pg_stat_activity shows."
        raise SqsError(
            IN_PROGRESS,
            f"{result['purged']} messages of {queue.name} are purged, and others are left.{reason}"
            " Call PurgeQueue again.",
        )


async def start_message_move_task(call: SqsCall) -> SqsAnswer:
    """Put the dead letters of a queue back. All are moved when the call returns."""
    name = name_in_arn(call.given.text("SourceArn"))
    if name is None:
        raise SqsError(
            BAD_VALUE,
            "You must use this format to specify the SourceArn: arn:<partition>:<service>:<region>:<account-id>:"
            "<resource-id>",
        )
    queue = await _source(call, name)
    target = call.given.optional("DestinationArn")
    if target is not None and name_in_arn(target) not in {queue.source, queue.consumer}:
        raise SqsError(UNSUPPORTED, f"Dead letters of {queue.source} can only be moved back to it.")
    async with call.audited(queue, {}) as result:
        done, left = await call.services.beside(_move, call.services.config, queue.consumer)
        result.update(redriven=done.redriven, not_wanted=done.not_wanted, undecidable=done.undecidable)
        if left:
            raise SqsError(
                BUSY,
                f"{left} dead letters of {queue.source} are left after {_LONGEST:g} s."
                " Call StartMessageMoveTask again.",
            )
    return {"TaskHandle": base64.urlsafe_b64encode(queue.name.encode()).decode()}


def _move(config: Config, name: str) -> tuple[Redriven, int]:
    """Put dead letters back for some seconds, and return the counts and how many are left. It blocks."""
    done, began = Redriven(), monotonic()
    with store_errors(), connect_store(config.store_dsn, config.store.schema_, "cdcbridge serve, redriving") as store:
        letters = chosen_letters(store, name, {"topic": None, "key": None, "reason": None})
        while letters and monotonic() - began < _LONGEST:
            redrive_page(store, name, letters[:PAGE], done)
            del letters[:PAGE]
    return done, len(letters)


async def _source(call: SqsCall, name: str) -> NamedQueue:
    try:
        queue = await call.named(name, "redrive")
    except SqsError as error:
        if error.code is not NO_SUCH_QUEUE:
            raise
        message = "The resource that you specified for the SourceArn parameter doesn't exist."
        raise SqsError(NO_RESOURCE, message) from None
    if not queue.letters:
        raise SqsError(BAD_VALUE, "Source queue must be configured as a Dead Letter Queue.")
    return queue
