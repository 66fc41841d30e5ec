"""Signatures that botocore makes are accepted, and whatever is changed afterwards is noticed."""

from __future__ import annotations

import string
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from botocore.auth import SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cdcbridge.web.sqs.errors import SqsError
from cdcbridge.web.sqs.signature import SignedRequest, _refuse_old, is_signed, signature_of, verify

KEY, SECRET = "AKIATEST", "a secret/with+signs"
NOW = datetime.now(UTC)
VISIBLE = st.text(string.ascii_letters + string.digits + string.punctuation, max_size=20)
PATHS = st.lists(st.text(string.ascii_letters + string.digits + "-_.~%", max_size=8), max_size=3).map(
    lambda parts: "/" + "/".join(parts)
)
QUERIES = st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=4)
HEADERS = st.dictionaries(st.text(string.ascii_lowercase, min_size=1, max_size=8).map("x-amz-meta-{}".format), VISIBLE)


def encoded(pairs: list[tuple[str, str]]) -> str:
    return "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in pairs)


def signed(
    method: str = "POST",
    path: str = "/",
    query: str = "",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    presigned: int = 0,
) -> SignedRequest:
    """A request as it is sent, with the signature of botocore."""
    url = f"http://127.0.0.1:9188{path}" + (f"?{query}" if query else "")
    request = AWSRequest(method=method, url=url, data=body, headers=headers or {})
    credentials = Credentials(KEY, SECRET)
    if presigned:
        SigV4QueryAuth(credentials, "sqs", "eu-central-1", expires=presigned).add_auth(request)
    else:
        SigV4Auth(credentials, "sqs", "eu-central-1").add_auth(request)
    prepared = request.prepare()
    parts = urlsplit(prepared.url)
    sent = [
        (name.lower(), value if isinstance(value, str) else value.decode()) for name, value in prepared.headers.items()
    ]
    return SignedRequest(method, parts.path, parts.query, [("host", parts.netloc), *sent], body)


def check(request: SignedRequest, secret: str = SECRET, now: datetime | None = None) -> None:
    verify(request, signature_of(request), secret, now or datetime.now(UTC))


def code(request: SignedRequest, **named: Any) -> str:
    with pytest.raises(SqsError) as caught:
        check(request, **named)
    return caught.value.code.old


@given(
    method=st.sampled_from(["GET", "POST"]),
    path=PATHS,
    query=QUERIES.map(encoded),
    headers=HEADERS,
    body=st.binary(max_size=50),
)
def test_a_signature_of_botocore_is_accepted(
    method: str, path: str, query: str, headers: dict[str, str], body: bytes
) -> None:
    check(signed(method, path, query, headers, body))


@given(path=PATHS, query=QUERIES.map(encoded), lasts=st.integers(1, 604_800))
def test_a_presigned_url_of_botocore_is_accepted(path: str, query: str, lasts: int) -> None:
    request = signed("GET", path, query, presigned=lasts)
    found = signature_of(request)
    check(request)
    check(request, now=found.time + timedelta(seconds=lasts))
    assert code(request, now=found.time + timedelta(seconds=lasts + 1)) == "SignatureDoesNotMatch"


@given(what=st.sampled_from(["method", "path", "query", "body", "header", "secret"]), other=VISIBLE)
def test_a_change_is_noticed(what: str, other: str) -> None:
    request = signed("POST", "/a/b", "c=d", {"x-amz-target": "AmazonSQS.SendMessage"}, b"body")
    secret = SECRET
    if what == "method":
        request = request._replace(method="PUT")
    elif what == "path":
        assume(other.strip("/") and "." not in other)
        request = request._replace(path=f"/a/b/{other}")
    elif what == "query":
        request = request._replace(query=f"c=d&e={len(other)}")
    elif what == "body":
        assume(other != "body")
        request = request._replace(body=other.encode())
    elif what == "header":
        assume(other.strip() != "AmazonSQS.SendMessage")
        changed = [(name, other if name == "x-amz-target" else value) for name, value in request.headers]
        request = request._replace(headers=changed)
    else:
        secret = f"x{other}"
    assert code(request, secret=secret) == "SignatureDoesNotMatch"


def test_a_signature_is_valid_for_a_quarter_of_an_hour() -> None:
    request = signed()
    time = signature_of(request).time
    for minutes in (-14.9, 0, 14.9):
        check(request, now=time + timedelta(minutes=minutes))
    for minutes in (-15.1, 15.1, 24 * 60):
        assert code(request, now=time + timedelta(minutes=minutes)) == "SignatureDoesNotMatch"


def without(request: SignedRequest, *names: str) -> list[tuple[str, str]]:
    return [header for header in request.headers if header[0] not in names]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: without(r, "authorization"), "MissingAuthenticationToken"),
        (lambda r: [*without(r, "authorization"), ("authorization", "Bearer x")], "IncompleteSignature"),
        (lambda r: [*without(r, "authorization"), ("authorization", "AWS4-HMAC-SHA256 x")], "IncompleteSignature"),
        (lambda r: without(r, "x-amz-date"), "IncompleteSignature"),
        (lambda r: [*without(r, "x-amz-date"), ("x-amz-date", "yesterday")], "IncompleteSignature"),
        (
            lambda r: [*without(r, "x-amz-date"), ("date", "Fri, 31 Dec 9999 23:59:59 -1200")],
            "IncompleteSignature",
        ),
        (lambda r: [*r.headers, ("x-amz-target", "AmazonSQS.PurgeQueue")], "SignatureDoesNotMatch"),
        (lambda r: [*without(r, "host"), ("host", "other")], "SignatureDoesNotMatch"),
    ],
)
def test_headers_that_are_wrong(change: Any, expected: str) -> None:
    request = signed()
    assert code(request._replace(headers=change(request))) == expected


# Of each kind of character that a header can have once it is decoded.
ANY = st.text(st.characters(max_codepoint=0x24F, exclude_characters="\r\n") | st.sampled_from("\udc80\udcff🐘١"))


@given(
    name=st.sampled_from(["authorization", "date", "x-amz-date", "host", "x-amz-content-sha256"]),
    value=ANY | st.builds(lambda zone: f"Fri, 31 Dec 9999 23:59:59 {zone:+05}", st.integers(-9999, 9999)),
)
@example("date", "Fri, 31 Dec 9999 23:59:59 -1200")
@example("authorization", f"AWS4-HMAC-SHA256 Credential={KEY}/\udc80, SignedHeaders=host, Signature={'0' * 64}")
def test_no_header_fails_in_another_way(name: str, value: str) -> None:
    request = signed()
    dropped = {name, "x-amz-date"} if name == "date" else {name}
    with suppress(SqsError):
        check(request._replace(headers=[*without(request, *dropped), (name, value)]))


@given(region=ANY.filter(lambda one: one and not set(one) & set("/, \t") and not one.isspace()))
@example("\udc80")
def test_no_region_fails_in_another_way(region: str) -> None:
    request = signed()
    changed = [(name, value.replace("eu-central-1", region)) for name, value in request.headers]
    assert code(request._replace(headers=changed)) in {"SignatureDoesNotMatch", "IncompleteSignature"}


@given(name=st.sampled_from(["Expires", "Date", "Credential", "SignedHeaders", "Signature"]), value=ANY)
@example("Signature", "é")
@example("Date", "99991231T235959Z")
def test_no_parameter_of_a_presigned_url_fails_in_another_way(name: str, value: str) -> None:
    request = signed("GET", presigned=60)
    given = quote(value.encode(errors="replace"))
    query = "&".join(f"X-Amz-{name}={given}" if part.startswith(f"X-Amz-{name}=") else part
                     for part in request.query.split("&"))  # fmt: skip
    with suppress(SqsError):
        check(request._replace(query=query))


def test_a_signature_of_the_last_year() -> None:
    found = signature_of(signed("GET", presigned=60))._replace(time=datetime.max.replace(tzinfo=UTC))
    with pytest.raises(SqsError, match="not yet current"):
        _refuse_old(found, datetime.now(UTC))


@pytest.mark.parametrize("name", ["X-Amz-Expires", "X-Amz-Date", "X-Amz-Credential", "X-Amz-Signature"])
def test_a_presigned_url_with_a_part_missing(name: str) -> None:
    request = signed("GET", presigned=60)
    kept = "&".join(part for part in request.query.split("&") if not part.startswith(f"{name}="))
    assert code(request._replace(query=kept)) == "IncompleteSignature"


def test_a_presigned_url_lasts_a_week_at_most() -> None:
    assert code(signed("GET", presigned=604_801)) == "IncompleteSignature"


def test_the_hash_of_the_body_is_checked() -> None:
    for claimed in ("UNSIGNED-PAYLOAD", "0" * 64):
        assert code(signed(headers={"x-amz-content-sha256": claimed}, body=b"x")) == "SignatureDoesNotMatch"


def test_a_signature_of_another_service() -> None:
    request = AWSRequest(method="POST", url="http://127.0.0.1/", data=b"", headers={})
    SigV4Auth(Credentials(KEY, SECRET), "s3", "eu-central-1").add_auth(request)
    headers = [("host", "127.0.0.1"), *((name.lower(), value) for name, value in request.headers.items())]
    assert code(SignedRequest("POST", "/", "", headers)) == "SignatureDoesNotMatch"


def test_the_host_must_be_signed() -> None:
    request = signed()
    changed = [(name, value.replace("SignedHeaders=host;", "SignedHeaders=")) for name, value in request.headers]
    with pytest.raises(SqsError, match="host"):
        check(request._replace(headers=changed))


def test_a_date_in_the_form_of_http() -> None:
    request = AWSRequest(method="POST", url="http://127.0.0.1:9188/", data=b"x", headers={})
    request.headers["Date"] = format_datetime(NOW, usegmt=True)
    SigV4Auth(Credentials(KEY, SECRET), "sqs", "eu-central-1").add_auth(request)
    headers = [("host", "127.0.0.1:9188"), *((name.lower(), value) for name, value in request.headers.items())]
    check(SignedRequest("POST", "/", "", headers, b"x"))


def test_what_is_signed() -> None:
    request = signed("GET", presigned=60)
    assert is_signed(request.query, None) and is_signed("", dict(signed().headers)["authorization"])
    assert not is_signed("", None) and not is_signed("a=b", "Bearer x")
