"""Judge the answers of a webhook, and make its addresses and signatures.

This module is pure. Never sends a request, and never repeats a secret in words for people.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from cdcbridge.sinks.target import Failure

_SHOWN: Final = 200  # characters of an answer
_LONGEST_WAIT: Final = 86400.0  # seconds; a webhook that asks for more is tried once a day
_AGAIN: Final = frozenset({408, 425, 429})  # and all from 500 on
_SECRET: Final = "whsec_"  # noqa: S105 - the prefix of every secret
_UNSAFE: Final = re.compile(r"[^!#$&-~]")


class WebhookAnswer(NamedTuple):
    """The answer to a request: its status, its headers of interest, and the beginning of its body."""

    status: int
    retry_after: str | None
    location: str | None
    body: bytes


def signing_key(secret: str) -> bytes:
    """Return the key of a secret of Standard Webhooks, for example `whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw`.

    Raises:
        ValueError: The secret is not Base64. The message does not contain it.
    """
    try:
        key = base64.b64decode(secret.removeprefix(_SECRET), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        raise ValueError("it is not `whsec_` and a text in Base64")
    return key


def signature(key: bytes, one: str, timestamp: str, body: bytes) -> str:
    """Return the value of `webhook-signature` for a message.

    Args:
        key: The key of the secret.
        one: The value of `webhook-id`.
        timestamp: The value of `webhook-timestamp`.
        body: The body of the request.
    """
    made = hmac.digest(key, f"{one}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(made).decode()}"


def header_value(value: str) -> str:
    """Return a text as a header can have it. Characters that a header cannot have become %XX, as in CloudEvents."""
    return _UNSAFE.sub(lambda one: quote(one[0], safe=""), value) if _UNSAFE.search(value) else value


def addresses(template: str) -> Callable[[str], str | None]:
    """Return a function that makes a URL from a filled-in template. It returns None for a value of `.` or `..`.

    A value stays within its place. For example, the table `a/b` becomes a%2Fb in https://example.com/{table}.
    """
    literals = re.split(r"\{[^{}]*\}", template)
    if len(literals) == 1:
        return lambda destination: destination
    pattern = re.compile("(.*?)".join(map(re.escape, literals)), re.DOTALL)

    @functools.lru_cache(maxsize=4096)
    def address(destination: str) -> str | None:
        found = pattern.fullmatch(destination)
        if found is None or not {".", ".."}.isdisjoint(found.groups()):
            return None
        values = [*(quote(value, safe="") for value in found.groups()), ""]
        return "".join(text for pair in zip(literals, values, strict=True) for text in pair)

    return address


def origin(url: str) -> str:
    """Return scheme, host and port of a URL. The rest can have secrets: a user, a path, a query."""
    try:
        parts = urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
        host = parts.hostname or ""
    except ValueError:
        return "the webhook"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"


def secrets_in(url: str) -> list[str]:
    """Return the parts of a URL that can be secret: user and password, the path, and the values of its query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return [url]
    user = parts.netloc.rpartition("@")[0]
    basic = base64.b64encode(unquote(user).encode()).decode()
    path = re.split(r"\{[^{}]*\}", parts.path.strip("/"))
    values = [value for _, value in parse_qsl(parts.query, keep_blank_values=True)]
    return [user, *user.split(":"), basic, *path, parts.query, *values]


def masker(secrets: Iterable[str]) -> Callable[[str], str]:
    """Return a function that replaces secrets by ***, because a webhook may answer with what it was sent."""
    words = {form for secret in secrets for word in (secret, *secret.split()) for form in (word, unquote(word))}
    found = sorted((word for word in words if len(word) > 3), key=len, reverse=True)
    if not found:
        return str
    pattern = re.compile("|".join(map(re.escape, found)))
    return lambda text: pattern.sub("***", text)


def is_delivered(answer: WebhookAnswer) -> bool:
    """Return True if the webhook has accepted the request."""
    return 200 <= answer.status < 300


def failure(answer: WebhookAnswer, mask: Callable[[str], str]) -> Failure:
    """Return what an answer other than 2xx means for a message."""
    text = mask(" ".join(answer.body.decode(errors="replace").split())[:_SHOWN])
    reason = f"HTTP {answer.status}{f': {text}' if text else ''}"
    if 300 <= answer.status < 400:
        where = mask((answer.location or "nowhere").partition("?")[0])[:_SHOWN]
        return Failure(f"HTTP {answer.status}: a redirect to {where}, which is not followed", for_good=True)
    if answer.status in _AGAIN or answer.status >= 500:
        return Failure(reason, retry_after=seconds(answer.retry_after))
    return Failure(reason, for_good=True)


def seconds(retry_after: str | None) -> float | None:
    """Return the seconds of a header `Retry-After`, which has a number of seconds or a date."""
    if retry_after is None:
        return None
    text = retry_after.strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        return min(float(text), _LONGEST_WAIT)
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return min(max(0.0, (when - datetime.now(UTC)).total_seconds()), _LONGEST_WAIT)


def failed_ids(body: bytes, ids: Sequence[str]) -> set[str] | str:
    """Return the ids that an answer to a batch lists in `{"failed": [ids]}`, or why the answer makes no sense.

    Any other answer means that the webhook has all messages.
    """
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        return set()
    listed = found.get("failed") if isinstance(found, dict) else None
    if listed is None:
        return set()
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        return "the answer's `failed` is not a list of ids"
    if unknown := set(listed).difference(ids):
        return f"the answer's `failed` has an id that was not sent: {min(unknown)[:_SHOWN]!r}"
    return set(listed)
