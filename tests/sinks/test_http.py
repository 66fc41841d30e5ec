"""The webhook sink: order of keys, answers of all kinds, faults, secrets."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import standardwebhooks

from cdcbridge import __version__
from cdcbridge.sinks.target import Failure, Lane, Outgoing, TargetAway, TargetGone, Unusable
from cdcbridge.sinks.targets import http_answer
from cdcbridge.sinks.targets.hold_back import WAITS
from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.http import Answer, HttpTarget, Request
from tests.harness.brokers.server import free_port
from tests.harness.proxy import Proxy
from tests.sinks.messages import LANE, message, opened, target

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
both = pytest.mark.parametrize("lane", [LANE, None], ids=["lane", "claims"])


@pytest.fixture
def hook(http_target: HttpTarget) -> HttpTarget:
    return http_target


def some(count: int, url: str, **changes: Any) -> list[Outgoing]:
    """Return messages of different keys."""
    return [message(n, to=url, key=f"k{n}", **changes) for n in range(1, count + 1)]


async def send(server: HttpTarget, given: list[Outgoing], lane: Lane | None = LANE, **sink: Any) -> dict[int, Failure]:
    async with opened(lane, **{"type": "http", "url": server.url, **sink}) as http:
        return dict(await http.deliver(given))


def seqs(requests: list[Request]) -> list[int]:
    """Return the seqs in their order, from requests with one message and from those with an array."""
    bodies = [json.loads(one.body) for one in requests]
    return [one["seq"] for body in bodies for one in (body if isinstance(body, list) else [body])]


@both
def test_a_message_is_a_signed_request(hook: HttpTarget, lane: Lane | None) -> None:
    (one,) = batch = some(1, hook.url)
    assert asyncio.run(send(hook, batch, lane, secret=SECRET, headers={"X-Shop": "7"})) == {}
    (request,) = hook.requests
    assert request.method == "POST" and request.body == one.body
    assert request.headers["webhook-id"] == one.id == request.headers["cdcbridge-id"]
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"] == f"cdcbridge/{__version__}"
    assert request.headers["x-shop"] == "7"
    standardwebhooks.Webhook(SECRET).verify(request.body, dict(request.headers))


def test_content_types_and_headers(hook: HttpTarget) -> None:
    sink: dict[str, Any]
    described = {"ce-id": "1", "ce-subject": 'ä "b"', "content-type": "application/json"}
    batch = some(1, hook.url, headers=described)
    for sink in (
        {"format": "cloudevents", "content_mode": "binary"},
        {"format": "cloudevents", "headers": {"Content-Type": "text/x-mine", "ce-id": "2"}},
    ):
        assert asyncio.run(send(hook, batch, **sink)) == {}
    plain = some(1, hook.url, headers={})
    for sink in ({"format": "cloudevents"}, {"format": "cloudevents", "batch": {}}, {"batch": {}}):
        assert asyncio.run(send(hook, plain, **sink)) == {}
    assert [one.headers["content-type"] for one in hook.requests] == [
        "application/json", "text/x-mine", "application/cloudevents+json", "application/cloudevents-batch+json",
        "application/json",
    ]  # fmt: skip
    assert [one.headers.get("ce-id") for one in hook.requests] == ["1", "2", None, None, None]
    assert hook.requests[0].headers["ce-subject"] == "%C3%A4%20%22b%22"


def test_a_batch_is_an_array_with_a_stable_id(hook: HttpTarget) -> None:
    batch = some(3, hook.url)
    for _ in range(2):
        assert asyncio.run(send(hook, batch, batch={}, secret=SECRET)) == {}
    first, again = hook.requests
    assert seqs([first]) == [1, 2, 3]
    assert first.headers["webhook-id"] == again.headers["webhook-id"] == f"{batch[0].id}:{batch[2].id}:3"
    assert "cdcbridge-id" not in first.headers
    standardwebhooks.Webhook(SECRET).verify(first.body, dict(first.headers))
    assert asyncio.run(send(hook, [*batch[:2], message(5, body=None), batch[2]], batch={}, format="debezium")) == {}
    wrapped = [{"id": one.id, "seq": one.seq, "data": json.loads(one.body or b"")} for one in batch]
    assert json.loads(hook.requests[2].body) == wrapped  # without the tombstone


def test_a_tombstone_is_not_sent(hook: HttpTarget) -> None:
    assert asyncio.run(send(hook, [message(1, to=hook.url, body=None)])) == {}
    assert hook.requests == []


# Order


@both
def test_keys_are_sent_at_the_same_time_and_messages_of_a_key_one_by_one(hook: HttpTarget, lane: Lane | None) -> None:
    hook.otherwise = Answer(delay=0.05)
    batch = [message(10 * n + m, to=hook.url, key=f"k{n}") for m in range(3) for n in range(40)]
    started = time.monotonic()
    assert asyncio.run(send(hook, batch, lane)) == {}
    assert time.monotonic() - started < 120 * 0.05 / 2  # one by one would take the whole
    by_key: dict[int, list[Request]] = {}
    for request in hook.requests:
        by_key.setdefault(seqs([request])[0] // 10, []).append(request)
    assert len(by_key) == 40
    for requests in by_key.values():
        assert [one % 10 for one in seqs(requests)] == [0, 1, 2]
        assert all(later.at - earlier.at >= 0.05 for earlier, later in pairwise(requests))


def test_never_more_than_32_requests_at_once(hook: HttpTarget) -> None:
    hook.pause()

    async def main() -> None:
        async with opened(None, type="http", url=hook.url) as http:
            tasks = [asyncio.create_task(http.deliver(some(30, hook.url))) for _ in range(3)]
            await asyncio.to_thread(hook.wait, 32)
            await asyncio.sleep(0.2)  # nothing more may arrive in this time
            assert len(hook.requests) == 32
            hook.resume()
            assert await asyncio.gather(*tasks) == [{}] * 3
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert len(hook.requests) == 90


def test_the_timeout_does_not_count_the_wait_for_other_requests(hook: HttpTarget) -> None:
    hook.otherwise = Answer(delay=1)

    async def main() -> None:
        async with opened(None, type="http", url=hook.url, timeout="3s") as http:
            assert await asyncio.gather(*(http.deliver(some(32, hook.url)) for _ in range(4))) == [{}] * 4

    asyncio.run(main())


@both
@pytest.mark.parametrize("status", [400, 500])
def test_no_message_overtakes_a_failed_one_of_its_key(hook: HttpTarget, lane: Lane | None, status: int) -> None:
    batch = [message(n, to=hook.url, key="ab"[n % 2]) for n in range(6)]
    hook.otherwise = lambda request: Answer(status if seqs([request]) == [2] else 200)
    failures = asyncio.run(send(hook, batch, lane))
    assert failures.keys() == {2, 4}
    assert failures[2] == Failure(f"HTTP {status}", for_good=status == 400)
    assert failures[4] == WAITS
    assert set(seqs(hook.requests)) == {0, 1, 2, 3, 5}


def test_a_key_with_two_addresses_stays_in_order_in_batches(hook: HttpTarget) -> None:
    urls = [f"{hook.url}{one}" for one in "cud"]
    batch = [message(n, to=urls[n % 3], key="k") for n in range(5)] + [message(9, to=urls[0], key="other")]
    sink: dict[str, Any] = {"url": f"{hook.url}{{op}}", "batch": {}}
    assert asyncio.run(send(hook, batch, **sink)) == {}
    assert seqs(hook.requests) == [0, 1, 2, 3, 4, 9]
    hook.answer(Answer(), Answer(500))
    assert asyncio.run(send(hook, batch, **sink)).keys() == {1, 2, 3, 4}


# Answers


@both
def test_a_batch_answer_fails_the_named_ones_alone(hook: HttpTarget, lane: Lane | None) -> None:
    batch = some(4, hook.url)
    hook.answer(Answer(body=json.dumps({"failed": [batch[1].id, batch[3].id]}).encode()))
    failures = asyncio.run(send(hook, batch, lane, batch={}))
    assert failures.keys() == {1, 3} and not failures[1].for_good
    hook.answer(Answer(body=b'{"failed": ["unknown"]}'))
    assert asyncio.run(send(hook, batch, lane, batch={})).keys() == {0, 1, 2, 3}


@both
def test_the_one_refused_message_of_a_batch_is_found(hook: HttpTarget, lane: Lane | None) -> None:
    """A webhook that checks all and takes none refuses the whole request. The others arrive once, in order."""
    accepted: list[int] = []

    def check(request: Request) -> Answer:
        if 7 in seqs([request]):
            return Answer(422, b"total must be positive")
        accepted.extend(seqs([request]))
        return Answer()

    hook.otherwise = check
    batch = [message(n, to=hook.url, key="k" if n in {7, 9} else None) for n in range(1, 21)]
    failures = asyncio.run(send(hook, batch, lane, batch={}))
    assert failures == {
        6: Failure("HTTP 422: total must be positive", for_good=True),
        8: WAITS,
    }
    assert accepted == [n for n in range(1, 21) if n not in {7, 9}]
    assert len(hook.requests) < 12


@both
def test_410_ends_the_delivery(hook: HttpTarget, lane: Lane | None) -> None:
    hook.otherwise = Answer(410, b"closed")
    with pytest.raises(TargetGone, match="answered HTTP 410: closed; it wants no more"):
        asyncio.run(send(hook, some(200, hook.url), lane))
    assert len(hook.requests) <= 32
    (problem,) = asyncio.run(target(lane, type="http", url=hook.url).check())
    assert problem.code == "sink_unusable"


@both
@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_webhook_that_asks_to_wait_gets_nothing_more(hook: HttpTarget, lane: Lane | None, status: int) -> None:
    hook.otherwise = Answer(status, headers={"Retry-After": "7"})
    batch = [message(n, to=hook.url) for n in range(9)]
    with pytest.raises(TargetAway, match=f"answered HTTP {status}") as away:
        asyncio.run(send(hook, batch, lane))
    assert away.value.retry_after == 7
    assert len(hook.requests) == 1
    with pytest.raises(TargetAway):
        asyncio.run(send(hook, some(200, hook.url), lane))
    assert len(hook.requests) <= 1 + 32
    before = len(hook.requests)
    hook.answer(Answer(), Answer())
    failures = asyncio.run(send(hook, batch, lane))
    assert failures.keys() == set(range(2, 9)) and failures[2] == Failure(f"HTTP {status}", retry_after=7)
    assert len(hook.requests) == before + 3


def test_a_message_that_alone_makes_an_error_is_not_a_webhook_that_is_away(hook: HttpTarget) -> None:
    hook.otherwise = Answer(500, b"bug")
    assert asyncio.run(send(hook, some(1, hook.url), None)) == {0: Failure("HTTP 500: bug")}


def test_a_refused_message_is_known_although_the_webhook_then_asks_to_wait(hook: HttpTarget) -> None:
    hook.otherwise = Answer(503)
    hook.answer(Answer(400))
    failures = asyncio.run(send(hook, [message(1, to=hook.url, key="a"), message(2, to=hook.url, key="b")]))
    assert sorted(one.for_good for one in failures.values()) == [False, True]


def test_redirects_are_not_followed(hook: HttpTarget) -> None:
    hook.otherwise = Answer(302, headers={"Location": f"{hook.url}other?token=hush"})
    failures = asyncio.run(send(hook, some(1, hook.url)))
    assert failures == {0: Failure(f"HTTP 302: a redirect to {hook.url}other, which is not followed", for_good=True)}
    assert len(hook.requests) == 1


def test_a_huge_answer_is_read_in_part(hook: HttpTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    hook.otherwise = Answer(400, b"x" * (8 << 20))
    real, sizes = http_answer.failure, []

    def judge(answer: http_answer.WebhookAnswer, mask: Callable[[str], str]) -> Failure:
        sizes.append(len(answer.body))
        return real(answer, mask)

    monkeypatch.setattr(http_answer, "failure", judge)
    failures = asyncio.run(send(hook, some(2, hook.url)))
    assert failures[0].reason == failures[1].reason == f"HTTP 400: {'x' * 200}"
    assert max(sizes) < 2 << 20


# Faults


@both
@pytest.mark.parametrize("cut", ["before", "middle"])
def test_an_answer_that_is_cut_off_is_none(hook: HttpTarget, lane: Lane | None, cut: Any) -> None:
    hook.answer(Answer(body=b"fine", cut=cut))
    with pytest.raises(TargetAway, match=hook.url.rstrip("/")):
        asyncio.run(send(hook, some(1, hook.url), lane))
    assert asyncio.run(send(hook, some(1, hook.url), lane)) == {}
    assert hook.requests[0].headers["webhook-id"] == hook.requests[1].headers["webhook-id"]


@both
def test_a_connection_that_is_cut_in_the_middle_of_a_batch(hook: HttpTarget, lane: Lane | None) -> None:
    batch = [message(n, to=hook.url) for n in range(9)]
    with Proxy(hook.port) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/"

        def cut(_: Request) -> Answer:
            proxy.away = True
            return Answer()

        async def main() -> dict[int, Failure]:
            async with opened(lane, type="http", url=url) as http:
                hook.answer(Answer(), Answer(), Answer(), cut)
                failures = await http.deliver([one._replace(destination=url) for one in batch])
                assert failures.keys() == set(range(3, 9)) and not any(one.for_good for one in failures.values())
                with pytest.raises(TargetAway):
                    await http.deliver([batch[3]._replace(destination=url)])
                proxy.away = False
                return dict(await http.deliver([batch[n]._replace(destination=url) for n in failures]))

        assert asyncio.run(main()) == {}
    assert seqs(hook.requests) == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]


@both
def test_a_webhook_that_is_killed_and_comes_back(hook: HttpTarget, lane: Lane | None) -> None:
    async def main() -> None:
        async with opened(lane, type="http", url=hook.url) as http:
            assert await http.deliver(some(3, hook.url)) == {}
            await asyncio.to_thread(hook.kill)
            for _ in range(2):
                with pytest.raises(TargetAway, match=r"127\.0\.0\.1"):
                    await http.deliver(some(200, hook.url))
            await asyncio.to_thread(hook.restart)
            assert await http.deliver(some(3, hook.url)) == {}

    asyncio.run(main())


@both
def test_a_webhook_that_does_not_answer(hook: HttpTarget, lane: Lane | None) -> None:
    hook.pause()
    started = time.monotonic()
    with pytest.raises(TargetAway, match=r"did not answer within 0.2 s \(`timeout`\)"):
        asyncio.run(send(hook, some(200, hook.url), lane, timeout="200ms"))
    assert time.monotonic() - started < 5  # and not 200 / 32 times the timeout
    hook.resume()


def test_a_cancelled_delivery_leaves_nothing_behind(hook: HttpTarget) -> None:
    hook.pause()

    async def main() -> None:
        http = target(type="http", url=hook.url)
        await http.open()
        delivery = asyncio.create_task(http.deliver(some(50, hook.url)))
        await asyncio.to_thread(hook.wait, 32)
        delivery.cancel()
        with pytest.raises(asyncio.CancelledError):
            await delivery
        await http.close()
        await http.close()
        assert len(asyncio.all_tasks()) == 1
        with pytest.raises(TargetAway, match="is closed"):
            await http.deliver(some(1, hook.url))

    asyncio.run(main())
    hook.resume()


# Secrets, TLS, what only a person can repair


def test_secrets_are_never_in_errors(hook: HttpTarget) -> None:
    def echo(request: Request) -> Answer:
        return Answer(400, f"{request.headers['authorization']} {request.path} {SECRET}".encode())

    hook.otherwise = echo
    base = hook.url.replace("//", "//user:hush-user@") + "hush-path?token=hush-token"

    async def main() -> dict[int, Failure]:
        async with opened(type="http", url=base, secret=SECRET) as http:
            with_user = await http.deliver([message(1, to=base)])
        sink: dict[str, Any] = {
            "type": "http",
            "url": f"{hook.url}hush-path",
            "headers": {"Authorization": "Bearer hush-header"},
        }
        async with opened(**sink, secret=SECRET) as http:
            return {**with_user, 1: (await http.deliver([message(1, to=sink["url"])]))[0]}

    failures = asyncio.run(main())
    assert "***" in failures[1].reason
    code = base64.b64encode(b"user:hush-user").decode()
    for failure in failures.values():
        assert "hush" not in failure.reason and SECRET not in failure.reason and code not in failure.reason
    nobody = f"http://user:hush-user@127.0.0.1:{free_port()}/hush-path"
    with pytest.raises(TargetAway) as away:
        asyncio.run(send(hook, [message(1, to=nobody)], headers={}))
    assert "hush" not in str(away.value)


def test_credentials_that_are_refused() -> None:
    with HttpTarget(token="right") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            with pytest.raises(Unusable, match="answered HTTP 401") as refused:
                asyncio.run(send(server, some(9, server.url), headers=headers))
            assert "`headers`" in str(refused.value.hint)
            (problem,) = asyncio.run(target(type="http", url=server.url, headers=headers).check())
            assert (problem.code, problem.severity) == ("sink_unusable", "error")
        good = {"Authorization": "Bearer right"}
        assert asyncio.run(send(server, some(9, server.url), headers=good)) == {}
        assert asyncio.run(target(type="http", url=server.url, headers=good).check()) == []
        assert {one.method for one in server.requests[-1:]} == {"HEAD"}


def test_check_reaches_the_webhook(hook: HttpTarget) -> None:
    hook.otherwise = Answer(405)  # many webhooks know nothing but POST
    assert asyncio.run(target(type="http", url=f"{hook.url}hooks/{{table}}").check()) == []
    assert [(one.method, one.path) for one in hook.requests] == [("HEAD", "/")]
    hook.kill()
    (problem,) = asyncio.run(target(type="http", url=hook.url).check())
    assert problem.code == "sink_unreachable"


@pytest.mark.parametrize(
    ("sink", "reason"),
    [
        ({"secret": "hush!"}, "`secret` of the sink cannot sign"),
        ({"headers": {"X-A": "hush\r\nX-B: 1"}}, "has a x-a with a line break"),
        ({"format": "cloudevents", "content_mode": "binary", "batch": {}}, "binary mode"),
        ({"tls": {"ca": "/none/ca.pem"}}, "a file of `tls` cannot be read"),
        ({"url": "http://127.0.0.1:hush/"}, "`url` of the sink is not an address"),
    ],
)
def test_what_only_a_person_can_repair(hook: HttpTarget, sink: dict[str, Any], reason: str) -> None:
    async def main() -> None:
        made: dict[str, Any] = {"type": "http", "url": hook.url, **sink}
        async with opened(**made) as http:
            await http.deliver(some(1, made["url"]))

    with pytest.raises(Unusable, match=reason) as refused:
        asyncio.run(main())
    assert refused.value.hint and "hush" not in f"{refused.value}{refused.value.hint}"


def test_tls(certificates: Certificates) -> None:
    made = certificates
    with HttpTarget(tls=made) as server:
        assert asyncio.run(send(server, some(3, server.url), tls={"ca": str(made.ca)})) == {}
        for tls in (None, {"ca": str(made.other_ca)}):
            with pytest.raises(Unusable, match=r"certificate of https://127\.0\.0\.1:.* is not trusted") as refused:
                asyncio.run(send(server, some(3, server.url), tls=tls))
            assert "tls: {ca: FILE}" in str(refused.value.hint)


def test_no_proxy_of_the_environment(hook: HttpTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert asyncio.run(send(hook, some(1, hook.url))) == {}


def test_a_placeholder_that_would_leave_its_place(hook: HttpTarget) -> None:
    async def main() -> None:
        async with opened(None, type="http", url=f"{hook.url}hooks/{{key}}") as http:
            batch = [message(n, to=f"{hook.url}hooks/{key}", key=key) for n, key in enumerate(["..", "a/../b?c", "ä"])]
            failures = await http.deliver(batch)
            assert failures.keys() == {0} and failures[0].for_good and "not sent" in failures[0].reason

    asyncio.run(main())
    assert {one.path for one in hook.requests} == {"/hooks/a%2F..%2Fb%3Fc", "/hooks/%C3%A4"}
