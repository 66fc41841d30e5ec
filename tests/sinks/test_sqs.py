"""The SQS sink: order of keys, entries that fail alone, limits, faults."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from cdcbridge.sinks.target import Failure, Lane, Outgoing, TargetAway, Unusable
from cdcbridge.sinks.targets.hold_back import WAITS
from cdcbridge.sinks.targets.sqs import SqsTarget, entry_of, plain
from tests.harness.brokers.http import Answer, HttpTarget
from tests.harness.brokers.sqs import Ministack, Moto, SqsServer
from tests.harness.proxy import Proxy
from tests.sinks.cases.sqs import SqsCase
from tests.sinks.messages import LANE, message, opened, target

both = pytest.mark.parametrize("lane", [LANE, None], ids=["lane", "claims"])
_names = map("{}-{}".format, itertools.repeat(os.getpid()), itertools.count())


@pytest.fixture(autouse=True)
def own_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


@pytest.fixture(params=["moto_server", "ministack_server"])
def server(request: pytest.FixtureRequest) -> SqsServer:
    found: SqsServer = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["fifo", "standard"])
def case(request: pytest.FixtureRequest, server: SqsServer) -> Iterator[SqsCase]:
    made = SqsCase(server, f"shop{next(_names)}", fifo=request.param == "fifo")
    yield made
    made.close()


def scripted(answer: Callable[[list[dict[str, Any]]], dict[str, Any]], *, fifo: bool = True) -> SqsTarget:
    """Return a target whose queue answers as told, to the entries of each request."""

    class Client:
        async def send_message_batch(self, **given: Any) -> dict[str, Any]:
            await asyncio.sleep(0)
            return answer(given["Entries"])

    made: Any = target(type="sqs", queue_url=f"https://sqs.eu-central-1.amazonaws.com/1/shop{'.fifo' if fifo else ''}")
    made._client = Client()
    assert isinstance(made, SqsTarget)
    return made


def accepted(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"Successful": [{"Id": one["Id"]} for one in entries]}


def seq_of(entry: dict[str, Any]) -> int:
    return int(json.loads(entry["MessageBody"])["seq"])


def refusal(code: str, status: int = 400) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "x")


# Real servers


@both
def test_messages_arrive_once_and_in_order_of_their_key(case: SqsCase, lane: Lane | None) -> None:
    batch = [message(n, key=f"k{n % 5}") for n in range(1, 31)]
    if lane is None:
        batch.append(message(31, key=None))

    async def main() -> None:
        async with opened(lane, **case.sink()) as sqs:
            assert await sqs.position() is None
            assert await sqs.deliver(batch) == {}
            if case.queue.endswith(".fifo"):  # a repeat within 5 minutes is dropped
                assert await sqs.deliver(batch) == {}

    asyncio.run(main())
    found = case.received()
    assert case.received() == found
    assert sorted(one.id for one in found) == sorted(one.id for one in batch)
    assert {one.body for one in found} == {one.body for one in batch}
    if case.queue.endswith(".fifo"):
        for number in range(5):
            ids = [one.id for one in found if one.key == f"k{number}"]
            assert ids == [one.id for one in batch if one.key == f"k{number}"]


def test_two_deliveries_at_the_same_time(ministack_server: Ministack) -> None:
    case = SqsCase(ministack_server, f"shop{next(_names)}")

    async def main() -> None:
        async with opened(None, **case.sink()) as sqs:
            batches = [[message(100 * n + m, key=f"{n}-{m % 10}") for m in range(50)] for n in range(4)]
            assert await asyncio.gather(*map(sqs.deliver, batches)) == [{}] * 4
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert len(case.received()) == 200


@both
def test_a_message_over_the_limit_of_the_queue(server: SqsServer, lane: Lane | None) -> None:
    case = SqsCase(server, f"shop{next(_names)}")
    client = server.client()
    client.set_queue_attributes(QueueUrl=case.queue, Attributes={"MaximumMessageSize": "2048"})
    client.close()
    batch = [message(1), message(2, body=b'{"note": "%s"}' % (b"x" * 2048)), message(3), message(4, key="other")]

    async def main() -> None:
        async with opened(lane, **case.sink()) as sqs:
            failures = await sqs.deliver(batch)
        assert failures.keys() == {1, 2} and failures[1].for_good and not failures[2].for_good
        assert "bytes, and the queue takes 2048 (MaximumMessageSize)" in failures[1].reason

    asyncio.run(main())
    assert {one.id for one in case.received()} == {batch[0].id, batch[3].id}


def test_a_request_has_at_most_a_mebibyte(server: SqsServer) -> None:
    case = SqsCase(server, f"shop{next(_names)}")
    batch = [message(n, key=str(n), body=b'"%s"' % (b"x" * 200_000)) for n in range(12)]

    async def main() -> None:
        async with opened(**case.sink()) as sqs:
            assert await sqs.deliver(batch) == {}

    asyncio.run(main())
    assert len(case.received()) == 12


def test_a_missing_queue_is_named_with_the_command_that_creates_it(server: SqsServer) -> None:
    sink: dict[str, Any] = {"type": "sqs", "endpoint_url": server.url, "region": server.region}
    for name, more in (("none", ""), ("none.fifo", " --attributes FifoQueue=true")):
        (problem,) = asyncio.run(target(**sink, queue_url=f"{server.url}/123456789012/{name}").check())
        assert problem.code == "sink_unusable"
        assert problem.fix == f"aws sqs create-queue --queue-name {name}{more}"


def test_a_url_that_is_no_queue() -> None:
    with HttpTarget() as hook:
        hook.otherwise = Answer(404, b"<html>no such page")
        sink: dict[str, Any] = {
            "type": "sqs",
            "queue_url": f"{hook.url}1/q",
            "endpoint_url": hook.url,
            "region": "eu-central-1",
        }
        (problem,) = asyncio.run(target(**sink).check())
        assert problem.code == "sink_unusable" and "`queue_url`" in problem.fix


def test_a_queue_that_is_deleted_while_the_sink_runs(moto_server: Moto) -> None:
    case = SqsCase(moto_server, f"shop{next(_names)}")

    async def main() -> None:
        async with opened(**case.sink()) as sqs:
            assert await sqs.deliver([message(1)]) == {}
            await asyncio.to_thread(case.close)
            with pytest.raises(Unusable, match=r"NonExistentQueue|QueueDoesNotExist"):
                await sqs.deliver([message(2)])

    asyncio.run(main())


def test_credentials_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with Moto(check_keys=True) as server:
        case = SqsCase(server, "shop")

        async def main() -> None:
            async with opened(**case.sink()) as sqs:
                assert await sqs.deliver([message(1)]) == {}

        asyncio.run(main())
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
        for change in (dict[str, str](), {"AWS_ACCESS_KEY_ID": "AKIANOBODY"}):
            for name, value in change.items():
                monkeypatch.setenv(name, value)
            with pytest.raises(Unusable, match="SQS: ") as refused:
                asyncio.run(main())
            assert "AWS_ACCESS_KEY_ID" in str(refused.value.hint) and "hush" not in str(refused.value)


def test_no_credentials_and_no_region(moto_server: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SqsCase(moto_server, f"shop{next(_names)}")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    (problem,) = asyncio.run(target(**case.sink()).check())
    assert problem.code == "sink_unusable" and "sqs:SendMessage" in problem.fix
    (problem,) = asyncio.run(target(type="sqs", queue_url="https://queue.example.com/shop").check())
    assert problem.code == "sink_unusable" and "`region`" in problem.fix
    (problem,) = asyncio.run(target(**{**case.sink(), "endpoint_url": "nonsense"}).check())
    assert problem.code == "sink_unusable" and "`endpoint_url`" in problem.fix


def test_the_region_of_a_url_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    async def main(url: str, **sink: str) -> str:
        made: Any = target(LANE, type="sqs", queue_url=url, **sink)
        made._call = lambda *_, **__: asyncio.sleep(0, {})
        await made.open()
        name: str = made._client.meta.region_name
        await made.close()
        return name

    assert asyncio.run(main("https://sqs.eu-central-1.amazonaws.com/1/q")) == "eu-central-1"
    assert asyncio.run(main("https://sqs.cn-north-1.amazonaws.com.cn/1/q")) == "cn-north-1"
    assert asyncio.run(main("https://sqs.eu-central-1.amazonaws.com/1/q", region="eu-west-1")) == "eu-west-1"
    assert asyncio.run(main("https://queue.example.com/1/q")) == "us-east-1"


@both
def test_a_server_that_is_killed_and_comes_back(lane: Lane | None) -> None:
    with Ministack() as server:
        case = SqsCase(server, "shop")

        async def main() -> None:
            async with opened(lane, **case.sink()) as sqs:
                assert await sqs.deliver([message(1)]) == {}
                await asyncio.to_thread(server.kill)
                with pytest.raises(TargetAway):
                    await sqs.deliver([message(n, key=str(n)) for n in range(500)])
            (problem,) = await target(lane, **case.sink()).check()
            assert problem.code == "sink_unreachable"
            await asyncio.to_thread(server.restart)  # it has lost its queue
            (problem,) = await target(lane, **case.sink()).check()
            assert problem.code == "sink_unusable"
            await asyncio.to_thread(server.create_queue, "shop.fifo")
            async with opened(lane, **case.sink()) as sqs:
                assert await sqs.deliver([message(2)]) == {}

        asyncio.run(main())
        assert [one.id for one in case.received()] == [message(2).id]


@both
def test_a_connection_that_is_cut(ministack_server: Ministack, lane: Lane | None) -> None:
    with Proxy(ministack_server.port) as proxy:
        case = SqsCase(ministack_server, f"shop{next(_names)}", proxy=proxy)
        batch = [message(n, key=f"k{n % 7}") for n in range(200)]

        async def main() -> None:
            sqs: Any
            async with opened(lane, **case.sink()) as sqs:
                real, count = sqs.send, itertools.count(1)

                async def send(entries: Any) -> Any:
                    results = await real(entries)
                    proxy.away = proxy.away or next(count) == 5
                    return results

                sqs.send = send
                failures = await sqs.deliver(batch)
                assert failures and not any(one.for_good for one in failures.values())
                left = [batch[n] for n in failures]
                with pytest.raises(TargetAway):
                    await sqs.deliver(left)
                proxy.away = False
                assert await sqs.deliver(left) == {}

        asyncio.run(main())
        found = case.received()
        assert sorted(one.id for one in found) == sorted(one.id for one in batch)
        for number in range(7):
            ids = [one.id for one in found if one.key == f"k{number}"]
            assert ids == [one.id for one in batch if one.key == f"k{number}"]


@both
def test_a_server_that_does_not_answer(lane: Lane | None) -> None:
    with HttpTarget() as hook:
        hook.otherwise = Answer(body=b'{"Attributes": {}}', headers={"content-type": "application/x-amz-json-1.0"})
        sink: dict[str, Any] = {
            "type": "sqs",
            "queue_url": f"{hook.url}1/q",
            "endpoint_url": hook.url,
            "region": "eu-central-1",
        }

        async def main() -> None:
            async with opened(lane, **sink, timeout="3s") as sqs:
                hook.pause()
                with pytest.raises(TargetAway, match=r"did not answer within 3 s \(`timeout`\)"):
                    await sqs.deliver([message(n, key=str(n)) for n in range(500)])
                assert len(asyncio.all_tasks()) == 1
                hook.resume()

        asyncio.run(main())
        assert len(hook.requests) <= 1 + 16


def test_a_cancelled_delivery_leaves_nothing_behind() -> None:
    with HttpTarget() as hook:
        hook.otherwise = Answer(body=b'{"Attributes": {}}', headers={"content-type": "application/x-amz-json-1.0"})
        sink: dict[str, Any] = {
            "type": "sqs",
            "queue_url": f"{hook.url}1/q",
            "endpoint_url": hook.url,
            "region": "eu-central-1",
        }

        async def main() -> None:
            sqs = target(**sink)
            await sqs.open()
            hook.pause()
            delivery = asyncio.create_task(sqs.deliver([message(n, key=str(n)) for n in range(500)]))
            await asyncio.to_thread(hook.wait, 17)
            delivery.cancel()
            with pytest.raises(asyncio.CancelledError):
                await delivery
            assert len(asyncio.all_tasks()) == 1
            await sqs.close()
            await sqs.close()
            assert len(asyncio.all_tasks()) == 1
            with pytest.raises(TargetAway, match="is closed"):
                await sqs.deliver([message(1)])

        asyncio.run(main())
        hook.resume()


# A client that answers as told: what the test servers cannot do


def test_a_request_to_a_fifo_queue_has_one_message_of_a_key() -> None:
    """An entry can fail alone, and the later ones of its key would be stored before it."""
    requests: list[list[dict[str, Any]]] = []
    in_progress: set[str] = set()

    def answer(entries: list[dict[str, Any]]) -> dict[str, Any]:
        requests.append(entries)
        return accepted(entries)

    batch = [message(n, key="ab"[n % 2] if n < 20 else str(n)) for n in range(60)]
    assert asyncio.run(scripted(answer).deliver(batch)) == {}
    assert not in_progress
    for entries in requests:
        groups = [one["MessageGroupId"] for one in entries]
        assert len(groups) == len(set(groups)) <= 10
    for key in "ab":
        sent = [seq_of(one) for entries in requests for one in entries if one["MessageGroupId"] == key]
        assert sent == [n for n in range(20) if "ab"[n % 2] == key]
    requests.clear()
    assert asyncio.run(scripted(answer, fifo=False).deliver(batch)) == {}
    assert len(requests) == 6 and "MessageGroupId" not in requests[0][0]


def test_entries_that_fail_alone() -> None:
    def answer(entries: list[dict[str, Any]]) -> dict[str, Any]:
        failed = {
            2: {"Code": "InvalidMessageContents", "Message": "bad character", "SenderFault": True},
            3: {"Code": "InternalError", "Message": "later", "SenderFault": False},
            4: {"Code": "ThrottlingException", "Message": "slow down", "SenderFault": True},
        }
        return {
            "Successful": [{"Id": one["Id"]} for one in entries if seq_of(one) not in {*failed, 5}],
            "Failed": [{"Id": one["Id"], **failed[seq_of(one)]} for one in entries if seq_of(one) in failed],
        }

    batch = [message(n, key=str(n)) for n in range(7)] + [message(8, key="2"), message(9, key="0")]
    failures = asyncio.run(scripted(answer).deliver(batch))
    assert failures == {
        2: Failure("SQS: InvalidMessageContents: bad character", for_good=True),
        3: Failure("SQS: InternalError: later"),
        4: Failure("SQS: ThrottlingException: slow down"),
        5: Failure("SQS did not say what became of it"),
        7: WAITS,
    }


def test_a_request_that_is_refused_as_a_whole() -> None:
    sizes = []

    def answer(entries: list[dict[str, Any]]) -> dict[str, Any]:
        sizes.append(len(entries))
        if any(seq_of(one) == 6 for one in entries):
            raise refusal("InvalidParameterValue")
        return accepted(entries)

    failures = asyncio.run(scripted(answer).deliver([message(n, key=str(n)) for n in range(10)]))
    assert failures == {6: Failure("SQS: InvalidParameterValue: no", for_good=True)}
    assert len(sizes) < 10


@pytest.mark.parametrize("code", ["AWS.SimpleQueueService.NonExistentQueue", "ExpiredToken", "ExpiredTokenException",
                                  "InvalidClientTokenId", "AccessDeniedException", "KmsAccessDenied",
                                  "SignatureDoesNotMatch"])  # fmt: skip
def test_refusals_that_a_person_repairs(code: str) -> None:
    def answer(_: list[dict[str, Any]]) -> dict[str, Any]:
        raise refusal(code, 403)

    with pytest.raises(Unusable, match=code) as refused:
        asyncio.run(scripted(answer).deliver([message(1)]))
    assert refused.value.hint


@pytest.mark.parametrize(("code", "status"), [("ThrottlingException", 400), ("RequestThrottled", 403), ("Any", 500),
                                              ("ServiceUnavailable", 503), ("KmsThrottled", 400), ("Any", 429)])  # fmt: skip
def test_a_queue_that_is_busy(code: str, status: int) -> None:
    def answer(_: list[dict[str, Any]]) -> dict[str, Any]:
        raise refusal(code, status)

    with pytest.raises(TargetAway, match=code):
        asyncio.run(scripted(answer).deliver([message(1)]))


def test_what_arrived_before_the_queue_was_busy_is_delivered() -> None:
    count = 0

    def answer(entries: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count > 3:
            raise refusal("ThrottlingException")
        return accepted(entries)

    batch = [message(n, key=str(n % 100)) for n in range(400)]
    failures = asyncio.run(scripted(answer).deliver(batch))
    assert len(failures) == 400 - 30 and not any(one.for_good for one in failures.values())
    done = [one for index, one in enumerate(batch) if index not in failures]
    assert {one.seq for one in done} == set(range(30))
    assert count <= 20


def test_credentials_that_expire_while_the_sink_runs() -> None:
    def answer(_: list[dict[str, Any]]) -> dict[str, Any]:
        raise NoCredentialsError

    with pytest.raises(Unusable, match="credentials"):
        asyncio.run(scripted(answer).deliver([message(1)]))


# Entries


def sent(one: Outgoing, *, fifo: bool = True) -> dict[str, Any]:
    return entry_of(0, one, one.body or b"", fifo=fifo).fields


def test_ids_and_groups() -> None:
    one = message(1, key="a")
    assert sent(one)["MessageGroupId"] == "a"
    assert sent(one)["MessageDeduplicationId"] == one.id
    assert sent(one._replace(key=None))["MessageGroupId"] == one.id
    assert sent(one, fifo=False).keys() == {"MessageBody", "MessageAttributes"}
    allowed = "0az!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
    assert plain(allowed) == allowed and plain("x" * 128) == "x" * 128
    for text in ("", "x" * 129, "ä", "a b", "a\n"):
        assert len(plain(text)) == 64 and plain(text).isalnum()
    assert plain("x" * 129) != plain("x" * 130)


def test_at_most_ten_attributes() -> None:
    headers = {f"h{n}": str(n) for n in range(12)}
    assert sent(message(1, headers=headers))["MessageAttributes"].keys() == {f"h{n}" for n in range(10)}
    many = sent(message(1, headers={**headers, "cdcbridge-id": "7"}))["MessageAttributes"]
    assert len(many) == 10 and many["cdcbridge-id"] == {"DataType": "String", "StringValue": "7"}
    few = sent(message(1, headers={"a": "", "b": "x\0y"}))["MessageAttributes"]
    assert few == {"b": {"DataType": "String", "StringValue": "x�y"}}
    assert "MessageAttributes" not in sent(message(1, headers={}))


def test_characters_that_sqs_refuses() -> None:
    one = message(1, body=json.dumps({"note": "\uffff\ufffe ä"}, ensure_ascii=False).encode())
    assert sent(one)["MessageBody"] == '{"note": "\\uffff\\ufffe ä"}'


def test_the_size_counts_attributes() -> None:
    one = message(1, headers={"ab": "äc"}, body="ä".encode())
    assert entry_of(0, one, one.body or b"", fifo=True).size == 2 + 2 + len("String") + 3


def test_a_tombstone_is_not_sent() -> None:
    assert asyncio.run(scripted(accepted).deliver([message(1, body=None)])) == {}
