"""Judging the answers of a webhook: pure functions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import standardwebhooks

from cdcbridge.sinks.targets import http_answer
from cdcbridge.sinks.targets.http_answer import WebhookAnswer

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_the_library_of_standard_webhooks_accepts_the_signature() -> None:
    key = http_answer.signing_key(SECRET)
    timestamp = str(int(datetime.now(UTC).timestamp()))
    for body in (b'{"name": "\xc3\xa4"}', b"[]"):
        made = http_answer.signature(key, "7412/1/0/A/0", timestamp, body)
        headers = {"webhook-id": "7412/1/0/A/0", "webhook-timestamp": timestamp, "webhook-signature": made}
        standardwebhooks.Webhook(SECRET).verify(body, headers)
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook(SECRET).verify(body, {**headers, "webhook-id": "7412/1/0/B/0"})
    assert http_answer.signing_key(SECRET.removeprefix("whsec_")) == key


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_hush!", "päss", "abc"])
def test_a_secret_that_cannot_sign_is_not_repeated(secret: str) -> None:
    with pytest.raises(ValueError, match="Base64") as refused:
        http_answer.signing_key(secret)
    assert not secret.removeprefix("whsec_") or secret.removeprefix("whsec_") not in str(refused.value)


@pytest.mark.parametrize(
    ("template", "values", "url"),
    [
        ("https://x.com/h?k=1", (), "https://x.com/h?k=1"),
        ("https://x.com/{table}", ("orders",), "https://x.com/orders"),
        ("https://x.com/{table}/z", ("a/b",), "https://x.com/a%2Fb/z"),
        ("https://x.com/{table}", ("../admin?x#y",), "https://x.com/..%2Fadmin%3Fx%23y"),
        ("https://x.com/{table}", ("..",), None),
        ("https://x.com/{schema}.{table}?k={key}", ("public", "ä", "1&2=%2F +"), "https://x.com/public.%C3%A4?k=1%262%3D%252F%20%2B"),
        ("https://{key}.x.com/", ("evil.com/",), "https://evil.com%2F.x.com/"),
        ("https://x.com/{key}", ("a\nb",), "https://x.com/a%0Ab"),
    ],
)  # fmt: skip
def test_a_value_stays_in_its_place_of_the_url(template: str, values: tuple[str, ...], url: str | None) -> None:
    destination = template
    for value in values:
        before, _, rest = destination.partition("{")
        destination = before + value + rest.partition("}")[2]
    address = http_answer.addresses(template)
    assert address(destination) == url
    assert address(destination) == url  # from the cache


def test_headers_have_printable_ascii() -> None:
    assert http_answer.header_value("public.orders") == "public.orders"
    assert http_answer.header_value('a "b" 100%\r\nx: ä') == "a%20%22b%22%20100%25%0D%0Ax:%20%C3%A4"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:hush@x.com:8443/T0/B0?token=hush", "https://x.com:8443"),
        ("http://[::1]:80/hush", "http://[::1]:80"),
        ("https://x.com:hush/", "the webhook"),
    ],
)
def test_only_the_origin_of_a_url_is_shown(url: str, shown: str) -> None:
    assert http_answer.origin(url) == shown


def test_secrets_in_a_url() -> None:
    found = http_answer.secrets_in("https://shop:h%40sh@x.com/T0/{table}/B0?token=hush&k={key}")
    assert {"shop", "h%40sh", "T0/", "/B0", "hush", "c2hvcDpoQHNo"} <= set(found)
    assert "hush" in " ".join(http_answer.secrets_in("https://[hush"))


def test_secrets_in_an_answer_are_masked() -> None:
    mask = http_answer.masker(["Bearer hush-hush", "s%2Fecret", "a"])
    assert mask("no: Bearer hush-hush, hush-hush, s/ecret, s%2Fecret, a") == "no: ***, ***, ***, ***, a"
    assert http_answer.masker([])("text") == "text"


@pytest.mark.parametrize(
    ("status", "for_good"),
    [(300, True), (302, True), (400, True), (403, True), (404, True), (413, True), (422, True),
     (408, False), (425, False), (429, False), (500, False), (501, False), (503, False), (599, False)],
)  # fmt: skip
def test_which_answers_are_for_good(status: int, for_good: bool) -> None:
    failure = http_answer.failure(WebhookAnswer(status, None, None, b"<p>\n no  way"), str)
    assert failure.for_good is for_good
    assert failure.reason == (f"HTTP {status}: <p> no way" if status >= 400 else
                              f"HTTP {status}: a redirect to nowhere, which is not followed")  # fmt: skip


def test_the_answer_is_shown_in_part() -> None:
    assert http_answer.failure(WebhookAnswer(400, None, None, b"x" * 1000), str).reason == f"HTTP 400: {'x' * 200}"
    assert http_answer.failure(WebhookAnswer(400, None, None, b"\xff"), str).reason == "HTTP 400: �"
    assert http_answer.failure(WebhookAnswer(400, None, None, b""), str).reason == "HTTP 400"
    moved = http_answer.failure(WebhookAnswer(301, None, "https://y.com/h?token=1", b""), str)
    assert moved.reason == "HTTP 301: a redirect to https://y.com/h, which is not followed"


def test_retry_after() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 90 < (http_answer.seconds(soon) or 0) <= 100
    assert http_answer.seconds("Fri, 31 Dec 1999 23:59:59 GMT") == 0
    assert [http_answer.seconds(text) for text in ("7", " 1.5 ", "999999999", "0")] == [7, 1.5, 86400, 0]
    assert [http_answer.seconds(text) for text in (None, "", "soon", "-1", "1e9", "nan", "٣")] == [None] * 7


def test_an_answer_to_a_batch() -> None:
    ids = ["a", "b"]
    for body in (b"", b"ok", b"{}", b"[]", b'"failed"', b'{"failed": null}', b'{"failed": []}', b"[" * 100_000):
        assert http_answer.failed_ids(body, ids) == set()
    assert http_answer.failed_ids(b'{"failed": ["b"]}', ids) == {"b"}
    assert http_answer.failed_ids(b'{"failed": "b"}', ids) == "the answer's `failed` is not a list of ids"
    assert http_answer.failed_ids(b'{"failed": [1]}', ids) == "the answer's `failed` is not a list of ids"
    assert http_answer.failed_ids(b'{"failed": ["c", "b"]}', ids) == "the answer's `failed` has an id that was not sent: 'c'"  # fmt: skip
