"""Verify signatures of AWS, version 4: in the header `Authorization`, or in the query of a presigned URL.

This module is pure. Never logs or returns a secret. A signature covers the body, the query, and the headers that it
lists. It is valid for 15 minutes, and that of a presigned URL for the time that the URL names.

Source: "AWS Signature Version 4 for API requests" in the reference of AWS Identity and Access Management.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from cdcbridge.web.sqs.errors import INCOMPLETE, NO_SIGNATURE, OTHER_SIGNATURE, SqsError

ALGORITHM: Final = "AWS4-HMAC-SHA256"
SERVICE: Final = "sqs"
_SKEW: Final = timedelta(minutes=15)
_LONGEST: Final = 7 * 24 * 3600  # seconds for which a presigned URL is valid at most
_TIME: Final = "%Y%m%dT%H%M%SZ"
_ISO_TIME: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z")
_HEADER: Final = re.compile(
    rf"{ALGORITHM}\s+Credential=(?P<credential>[^,\s]+)\s*,\s*SignedHeaders=(?P<headers>[^,\s]+)\s*,\s*"
    r"Signature=(?P<signature>[0-9a-f]{64})"
)
_NEVER_SIGNED: Final = "X-Amz-Signature"


class SignedRequest(NamedTuple):
    """The parts of a request that a signature covers.

    Attributes:
        method: For example POST.
        path: The path as it was sent, with its escapes.
        query: The query as it was sent, without the question mark.
        headers: The names, in lower case, and the values.
        body: The body.
    """

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    body: bytes = b""


class Signature(NamedTuple):
    """A signature, with the time and the scope for which it was made.

    Attributes:
        key_id: The access key id.
        region: The region of the scope. Each is accepted.
        headers: The names of the headers that it covers.
        time: The time when the request was signed.
        stamp: The same as AWS writes it, for example 20270131T235900Z.
        value: The signature.
        lasts: Seconds for which a presigned URL is valid, or None for a header.
    """

    key_id: str
    region: str
    headers: tuple[str, ...]
    time: datetime
    stamp: str
    value: str
    lasts: int | None

    @property
    def day(self) -> str:
        """The day of the credential's scope, for example 20270131."""
        return self.stamp[:8]


def is_signed(query: str, authorization: str | None) -> bool:
    """Return whether a request carries a signature of AWS."""
    return (authorization or "").startswith("AWS4-") or "X-Amz-Algorithm=AWS4-" in query


def signature_of(request: SignedRequest) -> Signature:
    """Return the signature of a request.

    Raises:
        SqsError: The request has none, or one that cannot be read.
    """
    found = _in_query(request) if "X-Amz-Algorithm=" in request.query else _in_header(request)
    needed = {"host", *(name for name, _ in request.headers if name.startswith("x-amz-"))}
    if missing := needed - set(found.headers):
        raise SqsError(OTHER_SIGNATURE, f"the signature does not cover the header {min(missing)}")
    return found


def verify(request: SignedRequest, signature: Signature, secret: str, now: datetime) -> None:
    """Raise SqsError if the signature was not made with this secret for this request, or is too old.

    Args:
        request: The request, with its body.
        signature: What signature_of() returned for it.
        secret: The secret access key.
        now: The present time, with a time zone.
    """
    digest = hashlib.sha256(request.body).hexdigest()
    if dict(request.headers).get("x-amz-content-sha256", digest) != digest:
        raise SqsError(OTHER_SIGNATURE, "the header X-Amz-Content-SHA256 is not the hash of the body")
    key, text = _signing_key(secret, signature.day, signature.region), _text_to_sign(request, signature, digest)
    expected = hmac.digest(key, text, "sha256").hex()
    if not hmac.compare_digest(expected.encode(), signature.value.encode(errors="replace")):
        raise SqsError(
            OTHER_SIGNATURE,
            "The request signature we calculated does not match the signature you provided."
            " Check your AWS Secret Access Key and signing method.",
        )
    _refuse_old(signature, now)


def _in_header(request: SignedRequest) -> Signature:
    headers = dict(request.headers)
    given = headers.get("authorization")
    if given is None:
        raise SqsError(NO_SIGNATURE, "Request is missing Authentication Token")
    if (found := _HEADER.fullmatch(given.strip())) is None:
        raise SqsError(INCOMPLETE, f"the header Authorization is not a signature of {ALGORITHM}")
    try:
        if "x-amz-date" in headers:
            stamp = headers["x-amz-date"]
        else:
            stamp = f"{parsedate_to_datetime(headers['date']).astimezone(UTC):{_TIME}}"
        return _signature(found["credential"], found["headers"], stamp, found["signature"], None)
    except (KeyError, ValueError, OverflowError):
        raise SqsError(INCOMPLETE, "the header X-Amz-Date is missing, or is not a time") from None


def _in_query(request: SignedRequest) -> Signature:
    given = dict(_pairs(request.query))
    try:
        if given["X-Amz-Algorithm"] != ALGORITHM:
            raise ValueError("X-Amz-Algorithm")
        lasts = int(given["X-Amz-Expires"])
        if not 1 <= lasts <= _LONGEST:
            raise ValueError("X-Amz-Expires")
        return _signature(
            given["X-Amz-Credential"], given["X-Amz-SignedHeaders"], given["X-Amz-Date"], given[_NEVER_SIGNED], lasts
        )
    except (KeyError, ValueError) as error:
        raise SqsError(INCOMPLETE, f"the parameters of the presigned URL are incomplete: {error}") from None


def _signature(credential: str, headers: str, stamp: str, value: str, lasts: int | None) -> Signature:
    time = _time(stamp)
    key_id, *scope = credential.rsplit("/", 4)
    if len(scope) != 4 or scope[2:] != [SERVICE, "aws4_request"] or scope[0] != stamp[:8]:
        raise SqsError(
            OTHER_SIGNATURE,
            f"the scope of the credential is {'/'.join(scope)!r}, but must be"
            f" {stamp[:8]}/REGION/{SERVICE}/aws4_request",
        )
    return Signature(key_id, scope[1], tuple(headers.split(";")), time, stamp, value, lasts)


def _refuse_old(signature: Signature, now: datetime) -> None:
    lasts = _SKEW if signature.lasts is None else timedelta(seconds=signature.lasts)
    # The age is compared, because a time plus a duration may be beyond the last year.
    if now - signature.time > lasts:
        raise SqsError(
            OTHER_SIGNATURE,
            f"Signature expired: it was valid for {lasts} from {signature.stamp}, and now it is {now:{_TIME}}",
        )
    if signature.time - now > _SKEW:
        raise SqsError(
            OTHER_SIGNATURE, f"Signature not yet current: it is of {signature.stamp}, now it is {now:{_TIME}}"
        )


def _text_to_sign(request: SignedRequest, signature: Signature, digest: str) -> bytes:
    text = _canonical(request, signature.headers, digest)
    canonical = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    scope = f"{signature.day}/{signature.region}/{SERVICE}/aws4_request"
    return f"{ALGORITHM}\n{signature.stamp}\n{scope}\n{canonical}".encode(errors="replace")


def _canonical(request: SignedRequest, names: Sequence[str], digest: str) -> str:
    """Return the request in the canonical form of AWS.

    Args:
        request: The request.
        names: The names of the headers that the signature covers.
        digest: The SHA-256 sum of the body, in hexadecimal.
    """
    query = "&".join(
        f"{name}={value}"
        for name, value in sorted(
            (quote(name, safe="-_.~"), quote(value, safe="-_.~"))
            for name, value in _pairs(request.query)
            if name != _NEVER_SIGNED
        )
    )
    values: dict[str, str] = {}
    for name, value in request.headers:
        text = " ".join(value.split())
        values[name] = f"{values[name]},{text}" if name in values else text
    headers = "".join(f"{name}:{values.get(name, '')}\n" for name in names)
    return "\n".join((request.method, _canonical_path(request.path), query, headers, ";".join(names), digest))


def _canonical_path(path: str) -> str:
    """Return the path without empty and relative segments, and escaped once more."""
    if path == "/":
        return path
    kept: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            del kept[-1:]
        elif segment not in {"", "."}:
            kept.append(segment)
    slash = "/" if kept and path.endswith("/") else ""
    return quote("/" + "/".join(kept) + slash, safe="/-_.~")


def _pairs(query: str) -> list[tuple[str, str]]:
    parts = (part.partition("=") for part in query.split("&") if part)
    return [(unquote(name), unquote(value)) for name, _, value in parts]


def _time(text: str) -> datetime:
    if not _ISO_TIME.fullmatch(text):
        raise ValueError(f"not a time: {text!r}")
    return datetime.fromisoformat(text)


@lru_cache(maxsize=64)
def _signing_key(secret: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (day, region, SERVICE, "aws4_request"):
        key = hmac.new(key, part.encode(errors="replace"), hashlib.sha256).digest()
    return key
