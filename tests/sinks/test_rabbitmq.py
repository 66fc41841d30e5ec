"""Streams and exchanges of a real RabbitMQ: what is stored, what is refused, and connections that end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr
from rstream.connection import Connection

from cdcbridge.config.sink import RabbitmqSink
from cdcbridge.sinks.target import Lane, TargetAway, Unusable
from cdcbridge.sinks.targets.hold_back import WAITS
from cdcbridge.sinks.targets.rabbitmq import RabbitmqTarget
from cdcbridge.sinks.targets.rabbitmq_exchange import _firsts
from cdcbridge.sinks.targets.rabbitmq_url import address_of
from tests.harness.brokers.amqp import channel
from tests.harness.brokers.rabbitmq import RabbitMQ
from tests.harness.world import eventually
from tests.sinks.cases.rabbitmq import RabbitmqExchangeCase, RabbitmqStreamCase
from tests.sinks.messages import message, messages
from tests.sinks.rabbit import ONE, QUEUE, deliver, error_of, name, seqs, sink_of, target
from tests.sinks.relay import Relay

TOPIC = "public.orders"
FRAME_MAX = 1_048_576  # stream.frame_max of a server without settings


@pytest.fixture
def stream(rabbitmq_server: RabbitMQ) -> Iterator[RabbitmqStreamCase]:
    case = RabbitmqStreamCase(rabbitmq_server, name())
    yield case
    case.close()


@pytest.fixture
def exchange(rabbitmq_server: RabbitMQ) -> Iterator[RabbitmqExchangeCase]:
    case = RabbitmqExchangeCase(rabbitmq_server, name())
    yield case
    case.close()


# Streams


def test_another_library_reads_the_messages_of_a_stream(stream: RabbitmqStreamCase) -> None:
    long = "k" * 300
    headers = {**message(7).headers, "content-type": "application/json"}
    batch = [
        message(7, "", key="ä", headers=headers),
        message(9, "", key=None, body=b"\x00\xff"),
        message(12, "", key=long, body=b""),
    ]
    assert asyncio.run(deliver(sink_of(stream), batch)) == 12
    first, second, third = asyncio.run(stream.messages())
    assert first.properties.message_id == batch[0].id.encode()
    assert first.properties.content_type == b"application/json"
    assert second.properties.content_type is None
    common = {b"cdcbridge-topic": b"public.orders"}
    assert first.application_properties == {
        **common, b"cdcbridge-id": batch[0].id.encode(), b"cdcbridge-key": "ä".encode()
    }  # fmt: skip
    assert second.application_properties == {**common, b"cdcbridge-id": batch[1].id.encode()}
    assert third.application_properties[b"cdcbridge-key"] == long.encode()
    assert [bytes(one.body) for one in (first, second, third)] == [one.body for one in batch]
    assert [one.key for one in stream.received()] == ["ä", None, long]


def test_a_stream_has_one_lane_and_an_exchange_has_all(
    stream: RabbitmqStreamCase, exchange: RabbitmqExchangeCase
) -> None:
    assert RabbitmqTarget.lanes(sink_of(stream), 8) == 1
    assert RabbitmqTarget.lanes(sink_of(exchange), 8) == 8
    assert RabbitmqTarget(sink_of(stream), ONE).remembers
    assert not RabbitmqTarget(sink_of(exchange), ONE).remembers


def test_what_a_stream_has_is_not_stored_again(stream: RabbitmqStreamCase) -> None:
    one = sink_of(stream)

    async def position() -> int | None:
        async with target(one) as target_:
            await target_.open()
            return await target_.position()

    assert asyncio.run(position()) == 0
    assert asyncio.run(deliver(one, messages(range(1, 6), ""))) == 5
    assert asyncio.run(position()) == 5
    assert asyncio.run(deliver(one, messages(range(3, 9), ""))) == 8
    assert seqs(stream) == list(range(1, 9))


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the large frames that are sent, each compared with the server's limit, which 3.10 does not enforce."""
    sizes = []
    send = Connection._write_frame_raw

    async def record(connection: Connection, data: bytes) -> None:
        if len(data) > 1000:
            sizes.append(len(data))
            assert sizes[-1] <= FRAME_MAX
        await send(connection, data)

    monkeypatch.setattr(Connection, "_write_frame_raw", record)
    return sizes


def test_a_batch_that_needs_several_frames_is_in_order(stream: RabbitmqStreamCase, frames: list[int]) -> None:
    batch = [message(seq, "", body=b"x" * 10_000) for seq in range(1, 301)]
    assert asyncio.run(deliver(sink_of(stream), batch)) == 300
    assert seqs(stream) == list(range(1, 301))
    assert len(frames) == 3


@pytest.mark.parametrize("place", [ONE, QUEUE])
def test_a_message_over_the_limit_of_a_stream_is_refused_for_good(
    stream: RabbitmqStreamCase, place: Lane | None
) -> None:
    large = message(3, "", key="b", body=b"x" * 1_048_500)
    batch = [message(1, "", key="a"), message(2, "", key="b"), large, message(4, "", key="a"), message(5, "", key="b")]

    async def run() -> Any:
        async with target(sink_of(stream), place) as one:
            await one.open()
            return await one.deliver(batch)

    failures = asyncio.run(run())
    assert failures[2].for_good and "1048" in failures[2].reason and "stream.frame_max" in failures[2].reason
    assert failures[4] == WAITS
    if place is ONE:
        assert failures[3] == WAITS and seqs(stream) == [1, 2]
    else:
        assert 3 not in failures and seqs(stream) == [1, 2, 4]


def test_the_largest_message_of_a_stream_is_taken(stream: RabbitmqStreamCase, frames: list[int]) -> None:
    async def run() -> None:
        async with target(sink_of(stream)) as one:
            await one.open()
            size = 1_048_000
            while not await one.deliver([message(size, "", body=b"x" * size)]):
                size += 50  # up to the first that is refused

    asyncio.run(run())
    assert FRAME_MAX - 100 < frames[-1] <= FRAME_MAX


def test_an_earlier_holder_of_a_lane_does_no_harm(stream: RabbitmqStreamCase) -> None:
    async def run() -> None:
        async with target(sink_of(stream)) as earlier, target(sink_of(stream)) as later:
            await earlier.open()
            assert await earlier.deliver(messages([1, 2], "")) == {}
            await later.open()
            assert await later.position() == 2
            assert await earlier.deliver(messages([3, 4], "")) == {}
            assert await later.deliver(messages([3, 4, 5], "")) == {}

    asyncio.run(run())
    assert seqs(stream) == [1, 2, 3, 4, 5]


def test_a_cut_in_the_middle_of_a_batch_is_filled_up(stream: RabbitmqStreamCase) -> None:
    async def run() -> None:
        async with Relay(stream.server.stream_port) as relay:
            one = sink_of(stream, port=relay.port)
            async with target(one) as broken:
                await broken.open()
                relay.limit = 1_500_000  # the first frame is stored
                with pytest.raises(TargetAway, match="closed"):
                    await broken.deliver([message(seq, "", body=b"x" * 10_000) for seq in range(1, 301)])
            async with target(one) as whole:
                await whole.open()
                last = await whole.position()
                assert last is not None and 50 < last < 300
                assert await whole.deliver(messages(range(last - 10, 401), "")) == {}

    asyncio.run(run())
    assert seqs(stream) == list(range(1, 401))


def test_a_batch_that_was_stored_without_an_answer_is_found(stream: RabbitmqStreamCase) -> None:
    async def run() -> None:
        async with Relay(stream.server.stream_port) as relay:
            one = sink_of(stream, port=relay.port)
            async with target(one) as broken:
                await broken.open()
                relay.deaf = True
                delivery = asyncio.create_task(broken.deliver(messages(range(1, 6), "")))
                await asyncio.to_thread(eventually, lambda: seqs(stream) == [1, 2, 3, 4, 5], "stored")
                relay.deaf = False
                relay.cut()
                with pytest.raises(TargetAway):
                    await delivery
            async with target(one) as whole:
                await whole.open()
                assert await whole.position() == 5
                assert await whole.deliver(messages(range(4, 8), "")) == {}

    asyncio.run(run())
    assert seqs(stream) == list(range(1, 8))


def test_a_stream_that_was_made_anew_has_no_position(stream: RabbitmqStreamCase) -> None:
    one = sink_of(stream)

    async def run() -> None:
        async with target(one) as target_:
            await target_.open()
            assert await target_.deliver(messages([1, 2], "")) == {}
            await stream._delete()
            with pytest.raises((TargetAway, Unusable)):
                for seq in range(3, 1000):
                    await target_.deliver(messages([seq], ""))

    asyncio.run(run())
    error = error_of(one, [])
    assert isinstance(error, Unusable) and "does not exist" in str(error)
    assert f"rabbitmqadmin declare queue name={stream.name}" in str(error.hint)
    asyncio.run(stream._declare())
    assert asyncio.run(deliver(one, messages([1, 2, 3], ""))) == 3
    assert seqs(stream) == [1, 2, 3]


def test_a_stream_whose_name_is_not_ascii_is_asked_for(stream: RabbitmqStreamCase) -> None:
    error = error_of(sink_of(stream, stream="läden"), [])
    assert isinstance(error, Unusable) and "läden: the stream does not exist" in str(error)


def test_several_claims_are_published_to_a_stream_at_once(stream: RabbitmqStreamCase) -> None:
    async def run() -> None:
        async with target(sink_of(stream), QUEUE) as one:
            await one.open()
            assert await one.position() is None
            batches = [messages(range(n, n + 10), "") for n in range(1, 101, 10)]
            assert await asyncio.gather(*map(one.deliver, batches)) == [{}] * 10
            assert await one.deliver(batches[0]) == {}

    asyncio.run(run())
    assert sorted(seqs(stream)) == sorted([*range(1, 101), *range(1, 11)])


# Exchanges


def test_a_queue_gets_the_messages_of_an_exchange(exchange: RabbitmqExchangeCase) -> None:
    batch = [
        message(1, TOPIC, key="ä", headers={**message(1).headers, "content-type": "application/json"}),
        message(2, TOPIC, key=None, body=b"x" * 300_000),
        message(3, TOPIC, body=b""),
    ]
    assert asyncio.run(deliver(sink_of(exchange), batch)) is None

    async def first() -> Any:
        async with channel(exchange.server.url) as one:
            return await one.basic_get(exchange.name)

    found = asyncio.run(first())
    properties = found.header.properties
    assert (properties.message_id, properties.content_type, properties.delivery_mode) == (
        batch[0].id,
        "application/json",
        2,
    )
    assert properties.headers == {
        "cdcbridge-id": batch[0].id, "cdcbridge-topic": TOPIC, "cdcbridge-key": "ä"
    }  # fmt: skip
    assert (found.exchange, found.routing_key, found.body) == (exchange.name, TOPIC, batch[0].body)
    received = exchange.received()
    assert [(one.id, one.key, one.body) for one in received] == [(one.id, one.key, one.body) for one in batch]


def test_a_message_that_no_queue_takes_is_refused_for_good(exchange: RabbitmqExchangeCase) -> None:
    async def run() -> Any:
        async with channel(exchange.server.url) as one:
            await one.queue_unbind(exchange.name, exchange.name, "#")
            await one.queue_bind(exchange.name, exchange.name, "public.*")
        async with target(sink_of(exchange)) as one:
            await one.open()
            batch = [message(1, "public.a", key="a"), message(2, "other.b", key="b", body=b"x" * 200_000)]
            batch += [message(3, "public.a", key="b"), message(4, "public.a", key="c"), message(5, "other.b", key=None)]
            return await one.deliver(batch)

    failures = asyncio.run(run())
    assert failures.keys() == {1, 2, 4} and failures[1].for_good and failures[4].for_good and failures[2] == WAITS
    assert "other.b" in failures[1].reason
    assert (
        f"rabbitmqadmin declare binding source={exchange.name} destination=QUEUE routing_key=other.b"
        in failures[1].reason
    )
    assert sorted(seqs(exchange)) == [1, 4]


def test_a_full_queue_refuses_and_the_key_waits(exchange: RabbitmqExchangeCase) -> None:
    limited = f"{exchange.name}-limited"

    async def run() -> Any:
        async with channel(exchange.server.url) as one:
            arguments: Any = {"x-max-length": 2, "x-overflow": "reject-publish"}
            await one.queue_declare(limited, durable=True, arguments=arguments)
        try:
            async with target(sink_of(exchange, exchange="")) as one:
                await one.open()
                batch = [message(seq, limited, key="a") for seq in (1, 2, 3, 4)]
                batch.append(message(5, exchange.name, key="b"))
                return await one.deliver(batch)
        finally:
            async with channel(exchange.server.url) as one:
                assert (await one.queue_declare(limited, passive=True)).message_count == 2
                await one.queue_delete(limited)

    failures = asyncio.run(run())
    assert failures.keys() == {2, 3} and "nack" in failures[2].reason and not failures[2].for_good
    assert failures[3] == WAITS
    assert seqs(exchange) == [5]


def test_the_default_exchange_needs_a_queue_with_the_routing_key(exchange: RabbitmqExchangeCase) -> None:
    async def run() -> Any:
        async with target(sink_of(exchange, exchange=""), QUEUE) as one:
            await one.open()
            return await one.deliver([message(1, "nobody"), message(2, exchange.name, key="b"), message(3, "k" * 256)])

    failures = asyncio.run(run())
    assert failures.keys() == {0, 2}
    assert failures[0].for_good and "rabbitmqadmin declare queue name=nobody" in failures[0].reason
    assert failures[2].for_good and "256 bytes" in failures[2].reason
    assert seqs(exchange) == [2]


def test_the_messages_of_a_key_are_in_order(exchange: RabbitmqExchangeCase) -> None:
    batch = [message(seq, TOPIC, key=str(seq % 3)) for seq in range(1, 31)]
    asyncio.run(deliver(sink_of(exchange), batch))
    received = exchange.received()
    for key in "012":
        assert [one.id for one in received if one.key == key] == [one.id for one in batch if one.key == key]


def test_only_the_first_of_each_key_is_on_its_way() -> None:
    batch = [message(seq, TOPIC, key=key) for seq, key in enumerate(["a", None, "b", "a", None, "a"])]
    assert _firsts(batch, range(6)) == [0, 1, 2, 4]
    assert _firsts(batch, [3, 5]) == [3]


def test_several_claims_are_published_to_an_exchange_at_once(exchange: RabbitmqExchangeCase) -> None:
    async def run() -> None:
        async with target(sink_of(exchange), QUEUE) as one:
            await one.open()
            batches = [[message(seq, TOPIC, key=None) for seq in range(n, n + 10)] for n in range(1, 101, 10)]
            assert await asyncio.gather(*map(one.deliver, batches)) == [{}] * 10
            assert await one.deliver(batches[0]) == {}

    asyncio.run(run())
    assert sorted(seqs(exchange)) == sorted([*range(1, 101), *range(1, 11)])
    assert len({one.id for one in exchange.received()}) == 100


def test_a_missing_exchange_names_the_command_that_makes_it(exchange: RabbitmqExchangeCase) -> None:
    async def removed() -> None:
        async with target(sink_of(exchange)) as one:
            await one.open()
            async with channel(exchange.server.url) as other:
                await other.exchange_delete(exchange.name)
            with pytest.raises(Unusable, match="NOT_FOUND") as caught:
                await one.deliver(messages([1], TOPIC))
            assert f"rabbitmqadmin declare exchange name={exchange.name}" in str(caught.value.hint)

    asyncio.run(removed())
    assert isinstance(error_of(sink_of(exchange), []), Unusable)


def test_a_batch_without_an_answer_is_delivered_again(exchange: RabbitmqExchangeCase) -> None:
    async def run() -> None:
        async with Relay(exchange.server.port) as relay:
            one = sink_of(exchange, port=relay.port)
            async with target(one) as broken:
                await broken.open()
                relay.limit = 100_000
                with pytest.raises(TargetAway, match="closed"):
                    await broken.deliver([message(seq, TOPIC, key=None, body=b"x" * 1000) for seq in range(1, 301)])
                assert not broken._publisher._all  # type: ignore[union-attr]
                assert await broken.deliver(messages([301], TOPIC)) == {}
            await deliver(one, [message(seq, TOPIC, key=None) for seq in range(1, 301)])

    asyncio.run(run())
    found = seqs(exchange)
    assert set(found) == set(range(1, 302)) and 301 < len(found) < 601, "a part arrived twice, with the same id"


# Both


@pytest.mark.parametrize("kind", ["stream", "exchange"])
def test_a_cancelled_delivery_leaves_no_task(kind: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(kind)
    port = case.server.stream_port if kind == "stream" else case.server.port

    async def run() -> None:
        async with Relay(port) as relay:
            async with target(sink_of(case, port=relay.port), QUEUE) as one:
                await one.open()
                relay.deaf = True
                delivery = asyncio.create_task(one.deliver(messages([1], TOPIC)))
                await asyncio.sleep(0)
                delivery.cancel()
                await asyncio.gather(delivery, return_exceptions=True)
                assert delivery.cancelled()
            relay.cut()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["stream", "exchange"])
def test_a_delivery_whose_connection_is_closed_under_it_has_failed(kind: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(kind)
    port = case.server.stream_port if kind == "stream" else case.server.port

    async def run() -> None:
        async with Relay(port) as relay, target(sink_of(case, port=relay.port), QUEUE) as one:
            await one.open()
            relay.deaf = True
            delivery = asyncio.create_task(one.deliver(messages([1], TOPIC)))
            await asyncio.to_thread(eventually, lambda: seqs(case) == [1], "stored, and not confirmed")
            await one.close()
            with pytest.raises(TargetAway):
                await delivery

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["stream", "exchange"])
def test_who_may_not_log_in_is_told_the_key(kind: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(kind)
    one = sink_of(case)
    url = one.url.get_secret_value()
    for wrong in (url.replace("secret", "guess"), f"{url}missing"):
        error = error_of(one.model_copy(update={"url": SecretStr(wrong)}), [])
        assert isinstance(error, Unusable) and "`url`" in str(error.hint) and "guess" not in str(error)
    error = error_of(one.model_copy(update={"url": SecretStr(url.replace(f":{address_of(one).port}", ":1"))}), [])
    assert isinstance(error, TargetAway) and "127.0.0.1:1" in str(error)


@pytest.mark.parametrize("kind", ["stream", "exchange"])
def test_a_user_without_rights_is_told_the_command(kind: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(kind)
    user = case.name
    case.server.control("add_user", user, "secret")
    try:
        case.server.control("set_permissions", user, "", "", "")
        one = sink_of(case)
        one = one.model_copy(update={"url": SecretStr(one.url.get_secret_value().replace("bridge:", f"{user}:"))})
        error = error_of(one, messages([1], TOPIC))
        assert isinstance(error, Unusable) and f"rabbitmqctl set_permissions {user} " in str(error.hint)
        command = str(error.hint).replace("'", "").split(" ")[1:]
        case.server.control(*command)
        asyncio.run(deliver(one, messages([1], TOPIC)))
    finally:
        case.server.control("delete_user", user)
    assert seqs(case) == [1]


@pytest.mark.parametrize("kind", ["stream", "exchange"])
def test_check_finds_what_is_missing(kind: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(kind)
    one = sink_of(case)
    assert asyncio.run(RabbitmqTarget(one, ONE).check()) == []
    missing = one.model_copy(update={kind: f"{case.name}-missing"})
    (problem,) = asyncio.run(RabbitmqTarget(missing, None).check())
    assert problem.code == "sink_unusable" and "rabbitmqadmin declare" in problem.fix
    url = one.url.get_secret_value().replace(f":{address_of(one).port}", ":1")
    (problem,) = asyncio.run(RabbitmqTarget(one.model_copy(update={"url": SecretStr(url)}), None).check())
    assert problem.code == "sink_unreachable" and "secret" not in problem.message


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("amqp://host", ("host", 5672, "guest", "guest", "/", False)),
        ("amqps://a%40b:p%3Aw@[::1]/v%2Fh", ("::1", 5671, "a@b", "p:w", "v/h", True)),
        ("rabbitmq-stream://u:secret@host:7/", ("host", 7, "u", "secret", "/", False)),
        ("rabbitmq-stream+tls://u:secret@host", ("host", 5551, "u", "secret", "/", True)),
    ],
)
def test_a_url_is_read(url: str, place: tuple[Any, ...]) -> None:
    kind = {"stream": "s"} if url.startswith("rabbitmq") else {"exchange": "e"}
    found = address_of(RabbitmqSink.model_validate({"type": "rabbitmq", "url": url, **kind}))
    assert found[:6] == place and "secret" not in str(found)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("amqp://u:secret@h", "stream"),
        ("rabbitmq-stream://u:secret@h", "exchange"),
        ("amqp://u:secret@h:x", "exchange"),
    ],
)
def test_a_url_that_does_not_fit_is_refused_without_its_secret(url: str, kind: str) -> None:
    sink = RabbitmqSink.model_validate({"type": "rabbitmq", "url": url, kind: "shop"})
    error = error_of(sink, [])
    assert isinstance(error, Unusable) and "`url`" in str(error.hint)
