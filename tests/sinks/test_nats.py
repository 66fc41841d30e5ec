"""The NATS sink against real servers: order, each message once, and every way in which a server can fail."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import nats
import pytest

from cdcbridge.config.sink import NatsSink
from cdcbridge.sinks.target import Displaced, Lane, Outgoing, TargetAway, Unusable
from cdcbridge.sinks.targets.nats import NatsTarget
from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.nats import Nats, NatsCluster
from tests.sinks.cases.nats import NatsCase
from tests.sinks.relay import Relay

LANE = Lane("events", "7231", 0, 1)
_numbers = itertools.count(1)
both = pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "chained"])


@pytest.fixture(scope="module")
def server() -> Iterator[Nats]:
    with Nats() as running:
        yield running


@contextlib.contextmanager
def stream(server: Nats, **options: Any) -> Iterator[NatsCase]:
    case = NatsCase(server, f"S{next(_numbers)}", **options)
    try:
        yield case
    finally:
        case.close()


def target(case: NatsCase, lane: Lane | None = LANE, **keys: Any) -> NatsTarget:
    return NatsTarget(NatsSink(**{**case.sink(), **keys}), lane)


def some(case: NatsCase, seqs: Sequence[int], *, key: str | None = "k", body: bytes = b"{}") -> list[Outgoing]:
    return [Outgoing(i, f"7/1/0/{i}", key, 0, f"{case.name}.a", body, {"cdcbridge-id": f"7/1/0/{i}"}) for i in seqs]


def seqs(case: NatsCase) -> list[int]:
    """Return the numbers of our messages in the order of the stream."""
    return [int(headers["cdcbridge-id"].split("/")[-1]) for _, headers, _ in case.messages() if headers]


def run(made: Coroutine[Any, Any, None]) -> None:
    """Run a test, which must not leave a task."""

    async def watched() -> None:
        await made
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(watched())


@contextlib.asynccontextmanager
async def opened(made: NatsTarget) -> Any:
    try:
        await made.open()
        yield made
    finally:
        await made.close()


async def position_of(case: NatsCase, **keys: Any) -> int | None:
    async with opened(target(case, **keys)) as again:
        found: int | None = await again.position()
        return found


@both
def test_messages_are_in_order_and_once_and_a_restart_continues_after_them(server: Nats, atomic: bool) -> None:
    async def test() -> None:
        for first in (1, 1201):
            async with opened(target(case)) as sink:
                assert await sink.position() == first - 1
                assert await sink.deliver(some(case, range(first, first + 1200))) == {}
                assert await sink.position() == first + 1199

    with stream(server, allow_atomic=atomic) as case:
        run(test())
        assert seqs(case) == list(range(1, 2401))
        _, headers, _ = case.messages()[1]
        assert ("Nats-Batch-Id" in headers) == atomic
        assert headers["cdcbridge-lane"] == LANE.name


def test_without_atomic_batches_the_identity_is_the_message_id(server: Nats) -> None:
    async def test() -> None:
        async with opened(target(case)) as sink:
            assert await sink.deliver(some(case, [1, 2])) == {}

    with stream(server, allow_atomic=False) as case:
        run(test())
        assert [headers["Nats-Msg-Id"] for _, headers, _ in case.messages()] == ["7/1/0/1", "7/1/0/2"]


@both
def test_a_connection_that_is_cut_in_the_middle_of_a_batch(server: Nats, atomic: bool) -> None:
    async def test() -> None:
        async with Relay(server.port) as relay:
            case.url = f"nats://127.0.0.1:{relay.port}"
            async with opened(target(case)) as sink:
                await sink.position()
                assert await sink.deliver(some(case, range(1, 11))) == {}
                relay.limit = 20_000
                with pytest.raises(TargetAway, match="ended"):
                    await sink.deliver(some(case, range(11, 201)))
            async with opened(target(case)) as sink:
                last = await sink.position()
                assert last is not None and (last == 10 if atomic else 10 < last < 200), last
                assert await sink.deliver(some(case, range(last + 1, 301))) == {}

    with stream(server, allow_atomic=atomic) as case:
        run(test())
        assert seqs(case) == list(range(1, 301))


@both
def test_a_batch_that_was_stored_and_not_answered(server: Nats, atomic: bool) -> None:
    async def test() -> None:
        async with Relay(server.port) as relay:
            case.url = f"nats://127.0.0.1:{relay.port}"
            async with opened(target(case, timeout="3s")) as sink:
                await sink.position()
                relay.deaf = True
                with pytest.raises(TargetAway, match="not answered within 3 s"):
                    await sink.deliver(some(case, range(1, 101)))
            relay.deaf = False
            async with opened(target(case)) as sink:
                assert await sink.position() == 100
                assert await sink.deliver(some(case, range(101, 201))) == {}

    with stream(server, allow_atomic=atomic) as case:
        run(test())
        assert seqs(case) == list(range(1, 201))


@both
def test_a_server_that_is_killed_and_restarted(atomic: bool) -> None:
    async def test() -> None:
        async with opened(target(case)) as sink:
            await sink.position()
            assert await sink.deliver(some(case, range(1, 101))) == {}
            delivering = asyncio.create_task(sink.deliver(some(case, range(101, 1001), body=b"x" * 5000)))
            await asyncio.sleep(0)
            await asyncio.to_thread(server.kill)
            with pytest.raises(TargetAway):
                await delivering
            with pytest.raises(TargetAway, match="cannot reach NATS"):
                await sink.open()
            await asyncio.to_thread(server.restart)
            await sink.open()
            last = await sink.position()
            assert last is not None
            assert await sink.deliver(some(case, range(last + 1, 1101))) == {}

    with Nats() as server, stream(server, allow_atomic=atomic) as case:
        run(test())
        assert seqs(case) == list(range(1, 1101))


def test_a_server_that_does_not_answer(server: Nats) -> None:
    async def test() -> None:
        sink = target(case, timeout="3s")
        await sink.open()
        await sink.position()
        server.pause()
        try:
            started = time.monotonic()
            with pytest.raises(TargetAway, match="within 3 s"):
                await sink.deliver(some(case, range(1, 2001), body=b"x" * 10_000))
            await sink.close()
            with pytest.raises(TargetAway, match="within 3 s"):
                await sink.open()
            assert time.monotonic() - started < 15
        finally:
            server.resume()
        await sink.close()

    with stream(server) as case:
        run(test())


def test_nothing_is_sent_after_close(server: Nats) -> None:
    """A cancelled delivery whose bytes wait in the client for a server that is slow."""

    async def test() -> None:
        sink = target(case)
        await sink.open()
        await sink.position()
        server.pause()
        try:
            delivering = asyncio.create_task(sink.deliver(some(case, range(1, 1001), body=b"x" * 20_000)))
            await asyncio.sleep(0.1)
            delivering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await delivering
            await sink.close()
            await sink.close()
        finally:
            server.resume()
        for attempt in range(
            3
        ):  # bytes that the kernel had may arrive late, and the server then refuses the next holder
            async with opened(target(case)) as sink:
                last = await sink.position() or 0
                assert attempt or last < 1000
                with contextlib.suppress(Displaced):
                    assert await sink.deliver(some(case, range(last + 1, 1101))) == {}
                    break

    with stream(server, allow_atomic=False) as case:
        run(test())
        assert seqs(case) == list(range(1, 1101))


def test_a_sink_ends_while_a_batch_waits_behind_another_one(server: Nats) -> None:
    """nats-py still has the second batch, because the server is slow with the first one."""

    async def test() -> None:
        sink = target(case, None)
        await sink.open()
        client = sink._client._client
        server.pause()
        try:
            delivering = [asyncio.create_task(sink.deliver(some(case, range(1, 1001), body=b"x" * 20_000, key=None)))]
            for _ in range(3):  # steps of the event loop
                await asyncio.sleep(0)
            assert client.stats["out_bytes"] and not client.pending_data_size
            delivering.append(asyncio.create_task(sink.deliver(some(case, range(1001, 1011), key=None))))
            await asyncio.sleep(0)
            assert client.pending_data_size
            await sink.close()
            for result in await asyncio.gather(*delivering, return_exceptions=True):
                assert isinstance(result, TargetAway), result
        finally:
            server.resume()

    with stream(server) as case:
        run(test())
        assert max(seqs(case), default=0) <= 1000


@both
def test_a_stream_that_is_full(server: Nats, atomic: bool) -> None:
    async def test() -> None:
        async with opened(target(case)) as sink:
            await sink.position()
            assert await sink.deliver(some(case, range(1, 6))) == {}
            with pytest.raises(TargetAway, match="maximum messages exceeded"):
                await sink.deliver(some(case, range(6, 20)))
            await asyncio.to_thread(case.edit, max_msgs=100)
        async with opened(target(case)) as sink:
            last = await sink.position()
            assert last is not None
            assert await sink.deliver(some(case, range(last + 1, 31))) == {}

    with stream(server, allow_atomic=atomic, max_msgs=10, discard="new") as case:
        run(test())
        assert seqs(case) == list(range(1, 31))


@both
def test_a_message_that_is_larger_than_the_stream_takes(server: Nats, atomic: bool) -> None:
    async def test() -> None:
        async with opened(target(case)) as sink:
            await sink.position()
            batch = [*some(case, range(1, 6)), *some(case, [6], body=b"x" * 2000), *some(case, range(7, 10))]
            failures = await sink.deliver(batch)
            assert set(failures) == {5, 6, 7, 8}
            assert failures[5].for_good and "2000 bytes" in failures[5].reason and "1000" in failures[5].reason
            assert not failures[6].for_good
            assert await sink.deliver(some(case, range(7, 1100))) == {}

    with stream(server, allow_atomic=atomic, max_msg_size=1000) as case:
        run(test())
        assert seqs(case) == [*range(1, 6), *range(7, 1100)]


def test_a_message_that_is_larger_than_the_server_takes(server: Nats) -> None:
    async def test() -> None:
        for lane in (LANE, None):
            async with opened(target(case, lane)) as sink:
                batch = [*some(case, [1]), *some(case, [2], body=b"x" * (1 << 20), key="l"), *some(case, [3])]
                failures = await sink.deliver(batch)
                assert set(failures) == ({1, 2} if lane else {1})
                assert failures[1].for_good and "max_payload" in failures[1].reason
                await asyncio.to_thread(case.ask, f"STREAM.PURGE.{case.name}", {})

    with stream(server) as case:
        run(test())


def test_what_is_missing_is_named_with_the_command_that_creates_it(server: Nats) -> None:
    async def test() -> None:
        with pytest.raises(Unusable, match="no stream NONE") as raised:
            await target(case, stream="NONE").open()
        assert raised.value.hint == f"nats stream add NONE --subjects '{case.name}.>' --allow-batch --defaults"
        with pytest.raises(Unusable, match=r"takes the subjects S\d+.>, and not shop.>") as raised:
            await target(case, subject="shop.{table}").open()
        assert raised.value.hint == f"nats stream edit {case.name} --subjects '{case.name}.>,shop.>'"

    with stream(server) as case:
        run(test())


@both
def test_a_subject_that_the_stream_does_not_take(server: Nats, atomic: bool) -> None:
    async def test() -> None:
        async with opened(target(case, subject="{topic}")) as sink:
            await sink.position()
            for first, subject, reason, for_good in (
                (1, "other.a", "does not take the subject other.a", False),
                (11, f"{case.name}.a b", "is not a subject", True),
                (21, f"{other.name}.a", "NATS refuses the message: expected stream does not match", False),
            ):
                batch = some(case, range(first, first + 5))
                batch[2] = batch[2]._replace(destination=subject)
                failures = await sink.deliver(batch)
                assert set(failures) == {2, 3, 4} and reason in failures[2].reason, failures
                assert failures[2].for_good == for_good

    with stream(server, allow_atomic=atomic) as case, stream(server) as other:
        run(test())
        assert other.messages() == []


@both
def test_other_programs_write_to_the_stream(server: Nats, atomic: bool) -> None:
    async def test() -> None:
        async with await nats.connect(server.url) as client, opened(target(case)) as sink:
            foreign = client.jetstream()
            ended = asyncio.Event()

            async def write() -> None:
                while not ended.is_set():
                    await foreign.publish(f"{case.name}.foreign", b"")
                    await asyncio.sleep(0.003)

            writing = asyncio.create_task(write())
            await sink.position()
            for first in range(1, 301, 20):
                assert await sink.deliver(some(case, range(first, first + 20))) == {}
            ended.set()
            await writing
            for _ in range(600):
                await client.publish(f"{case.name}.foreign", b"")
            await client.flush()
            assert await position_of(case) == 300
            assert await position_of(case, subject=case.name + ".b") == 300

    with stream(server, allow_atomic=atomic) as case:
        run(test())
        assert seqs(case) == list(range(1, 301))
        assert len(case.messages()) > 900


@both
def test_two_consumers_share_a_stream(server: Nats, atomic: bool) -> None:
    async def test() -> None:
        async with opened(target(case)) as one, opened(target(case, Lane("others", "7231", 0, 1))) as other:
            for first in (1, 11, 21):
                for sink, offset in ((one, 0), (other, 1000)):
                    assert await sink.deliver(some(case, range(first + offset, first + offset + 10))) == {}
            assert await one.position() == 30
            assert await other.position() == 1030

    with stream(server, allow_atomic=atomic) as case:
        run(test())
        assert sorted(seqs(case)) == [*range(1, 31), *range(1001, 1031)]


@both
def test_an_earlier_holder_of_the_lane_is_displaced(server: Nats, atomic: bool) -> None:
    async def test() -> None:
        async with opened(target(case)) as old, opened(target(case)) as new:
            await old.position()
            assert await old.deliver(some(case, range(1, 11))) == {}
            assert await new.position() == 10
            assert await new.deliver(some(case, range(11, 21))) == {}
            held = old._last, old._place
            for batch in (range(11, 21), [11]):
                with pytest.raises(Displaced, match="another process has delivered messages up to 20"):
                    await old.deliver(some(case, batch))
                old._last, old._place = held

    with stream(server, allow_atomic=atomic) as case:
        run(test())
        assert seqs(case) == list(range(1, 21))


@both
def test_a_stream_that_was_restored_from_an_older_state(server: Nats, atomic: bool) -> None:
    async def test() -> None:
        async with opened(target(case)) as sink:
            await sink.position()
            assert await sink.deliver(some(case, range(1, 21))) == {}
            await asyncio.to_thread(case.close)
            await asyncio.to_thread(case.ask, f"STREAM.CREATE.{case.name}", case.config)
            async with opened(target(case)) as restored:
                assert await restored.deliver(some(case, range(1, 11))) == {}
            with pytest.raises(TargetAway, match="has lost its messages after 10, the last one was 20"):
                await sink.deliver(some(case, range(21, 31)))
        async with opened(target(case)) as sink:
            assert await sink.position() == 10
            assert await sink.deliver(some(case, range(11, 31))) == {}

    with stream(server, allow_atomic=atomic) as case:
        run(test())
        assert seqs(case) == list(range(1, 31))


def test_messages_that_were_removed_from_the_end_are_no_obstacle(server: Nats) -> None:
    async def test() -> None:
        async with opened(target(case)) as sink:
            await sink.position()
            assert await sink.deliver(some(case, range(1, 11))) == {}
            await asyncio.to_thread(case.ask, f"STREAM.MSG.DELETE.{case.name}", {"seq": 10})
            assert await sink.position() == 9
            assert await sink.deliver(some(case, range(10, 21))) == {}
            await asyncio.to_thread(case.ask, f"STREAM.PURGE.{case.name}", {})
            assert await sink.position() is None
            assert await sink.deliver(some(case, range(21, 31))) == {}

    with stream(server) as case:
        run(test())
        assert seqs(case) == list(range(21, 31))


def test_claims_are_delivered_at_the_same_time_and_repeated_ones_once(server: Nats) -> None:
    async def test() -> None:
        async with opened(target(case, None)) as sink:
            assert await sink.position() is None
            batches = [some(case, range(i, i + 50), key=None) for i in range(0, 500, 50)]
            for _ in range(2):
                assert await asyncio.gather(*(sink.deliver(batch) for batch in batches)) == [{}] * 10

    with stream(server) as case:
        run(test())
        assert sorted(seqs(case)) == list(range(500))


def test_no_later_message_of_a_key_passes_a_failed_one(server: Nats) -> None:
    async def test() -> None:
        async with opened(target(case, None)) as sink:
            batch = some(case, range(1, 9))
            keys = ["a", "b", "a", "b", "a", None, "b", None]
            batch = [one._replace(key=key) for one, key in zip(batch, keys, strict=True)]
            batch[2] = batch[2]._replace(body=b"x" * 2000)
            batch[5] = batch[5]._replace(body=b"x" * 2000)
            failures = await sink.deliver(batch)
            assert {i: failure.for_good for i, failure in failures.items()} == {2: True, 4: False, 5: True}
            assert await sink.deliver([batch[2]._replace(body=b""), batch[4]]) == {}

    with stream(server, max_msg_size=1000) as case:
        run(test())
        assert sorted(seqs(case)) == [1, 2, 3, 4, 5, 7, 8]
        found = seqs(case)
        assert [i for i in found if i in {1, 3, 5}] == [1, 3, 5]
        assert [i for i in found if i in {2, 4, 7}] == [2, 4, 7]


def test_a_full_stream_keeps_claims_waiting(server: Nats) -> None:
    async def test() -> None:
        async with opened(target(case, None)) as sink:
            with pytest.raises(TargetAway, match="maximum messages exceeded"):
                await sink.deliver(some(case, range(1, 21), key=None))
            await asyncio.to_thread(case.edit, max_msgs=100)
            assert await sink.deliver(some(case, range(1, 21), key=None)) == {}

    with stream(server, max_msgs=10, discard="new") as case:
        run(test())
        assert sorted(seqs(case)) == list(range(1, 21))


def test_two_consumers_cannot_hide_each_others_messages(server: Nats) -> None:
    """The stream takes an id once within its window, whatever the subject is."""

    async def test() -> None:
        async with opened(target(case, None)) as one, opened(target(case, None)) as other:
            assert await one.deliver(some(case, [1])) == {}
            failures = await other.deliver([some(case, [1])[0]._replace(destination=f"{case.name}.b")])
            assert "another message with this Nats-Msg-Id" in failures[0].reason

    with stream(server) as case:
        run(test())


def test_a_line_break_in_a_header_makes_no_header(server: Nats) -> None:
    async def test() -> None:
        async with opened(target(case)) as sink:
            batch = [
                one._replace(headers={**one.headers, "cdcbridge-key": "a\r\nNats-Rollup: all\nb"})
                for one in some(case, [1, 2])
            ]
            assert await sink.deliver(batch) == {}

    with stream(server) as case:
        run(test())
        assert [headers["cdcbridge-key"] for _, headers, _ in case.messages()] == ["a Nats-Rollup: all b"] * 2


@pytest.mark.parametrize("auth", ["user", "token", "creds"])
def test_credentials(auth: Any, tmp_path: Path) -> None:
    async def test() -> None:
        for given in ("wrong:hush", "hush", str(tmp_path / "none.creds"), None):
            with pytest.raises(Unusable) as raised:
                await target(case, credentials=given).open()
            assert "sink.credentials" in (raised.value.hint or "") and "hush" not in str(raised.value)
        async with opened(target(case, credentials=right)) as sink:
            assert await sink.deliver(some(case, [1, 2, 3])) == {}

    with Nats(auth=auth) as server, stream(server) as case:
        right = {"user": f"{server.user}:{server.password}", "token": server.token, "creds": str(server.credentials)}[
            auth
        ]
        run(test())
        assert seqs(case) == [1, 2, 3]


def test_credentials_in_the_address() -> None:
    async def test() -> None:
        case.url = f"nats://{server.user}:{server.password}@{server.address}"
        assert await position_of(case) == 0
        case.url = f"nats://{server.user}:hush@{server.address}"
        with pytest.raises(Unusable) as raised:
            await target(case).open()
        assert "hush" not in str(raised.value)

    with Nats(auth="user") as server, stream(server) as case:
        run(test())


def test_credentials_that_expire() -> None:
    async def test() -> None:
        async with opened(target(case, credentials="bridge:secret")) as sink:
            await sink.position()
            assert await sink.deliver(some(case, [1])) == {}
            server.settings["authorization"] = {"user": "bridge", "password": "another"}
            server.connection["password"] = "another"
            await asyncio.to_thread(server.restart)
            with pytest.raises(TargetAway):
                await sink.deliver(some(case, [2]))
            with pytest.raises(Unusable, match="Authorization Violation"):
                await sink.open()

    server = Nats(auth="user")
    server.settings["authorization"] = {"user": "bridge", "password": "secret"}
    with server:
        case = NatsCase(server, "EXPIRES")
        run(test())


def test_rights_that_are_missing() -> None:
    async def test() -> None:
        async with opened(target(case, None, credentials="writer:w")) as sink:
            batch = some(case, range(1, 4), key=None)
            batch[1] = batch[1]._replace(destination=f"{case.name}.secret")
            failures = await sink.deliver(batch)
            assert set(failures) == {1} and "may not publish to S" in failures[1].reason
        async with opened(target(case, credentials="writer:w")) as sink:
            failures = await sink.deliver(batch)
            assert failures[1].reason.startswith("NATS refuses the message: the user may not publish")
        with pytest.raises(Unusable, match=r"STREAM\.INFO") as raised:
            await target(case, credentials="reader:r").open()
        assert raised.value.hint == f"grant the user publish to $JS.API.STREAM.INFO.{case.name}"

    may = ["S*.a", "*.a", "$JS.API.STREAM.INFO.*", "$JS.API.STREAM.MSG.GET.*"]
    users = [
        {"user": "bridge", "password": "secret"},
        {"user": "writer", "password": "w", "permissions": {"publish": may}},
        {"user": "reader", "password": "r", "permissions": {"publish": ["nothing"]}},
    ]
    server = Nats(auth="user")
    server.settings["authorization"] = {"users": users}
    with server, stream(server) as case:
        run(test())


def test_tls(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(target(case, tls={"ca": certificates.ca})) as sink:
            assert await sink.deliver(some(case, [1])) == {}
        with pytest.raises(Unusable, match="is not trusted") as raised:
            await target(case, tls={"ca": certificates.other_ca}).open()
        assert "sink.tls.ca" in (raised.value.hint or "")
        with pytest.raises(Unusable, match=r"a file of `tls` cannot be read"):
            await target(case, tls={"ca": tmp_path / "none"}).open()

    certificates = Certificates(tmp_path)
    with Nats(tls=certificates) as server:
        server.connection["tls"] = certificates.client_context()
        case = NatsCase(server, "TLS")
        run(test())
        assert seqs(case) == [1]


def test_credentials_are_not_sent_without_tls_where_tls_was_asked_for(server: Nats, tmp_path: Path) -> None:
    async def test() -> None:
        async with Relay(server.port) as relay:
            case.url = f"nats://127.0.0.1:{relay.port}"
            with pytest.raises(Unusable, match="has no TLS"):
                await target(case, tls={"ca": Certificates(tmp_path).ca}, credentials="a:b").open()
            case.url = f"tls://127.0.0.1:{relay.port}"
            with pytest.raises(Unusable, match="has no TLS"):
                await target(case).open()
            assert relay.sent == 0

    with stream(server) as case:
        run(test())


def test_a_server_that_offers_tls_is_not_spoken_to_in_clear_text(tmp_path: Path) -> None:
    """It also takes clients without TLS, which is all that nats-py looks at."""

    async def test() -> None:
        async with opened(target(case, tls={"ca": certificates.ca}, credentials="bridge:secret")) as sink:
            assert await sink.deliver(some(case, [1])) == {}
        with pytest.raises(Unusable, match="is not trusted"):
            await target(case, tls={"ca": certificates.other_ca}, credentials="bridge:secret").open()
        async with opened(target(case, credentials="bridge:secret")) as sink:
            assert await sink.position() == 1

    certificates = Certificates(tmp_path)
    server = Nats(auth="user", tls=certificates)
    server.settings["allow_non_tls"] = True
    with server:
        case = NatsCase(server, "OFFERS")
        case.url = f"nats://{server.address}"
        run(test())
        assert seqs(case) == [1]


def test_a_file_that_has_no_credentials(tmp_path: Path) -> None:
    """nats-py would look for them for ever."""

    async def test() -> None:
        for content in (b"", b"-----BEGIN NATS USER JWT-----\nhush\n", b"\xff"):
            file.write_bytes(content)
            with pytest.raises(Unusable, match=r"is not a readable \.creds file"):
                await target(case, credentials=str(file)).open()
        file.write_text("-----BEGIN NATS USER JWT-----\nhush\n------\n-----BEGIN USER NKEY SEED-----\nhush\n------\n")
        with pytest.raises(Unusable, match=r"refuses the user|is not valid") as raised:
            await target(case, credentials=str(file)).open()
        assert "hush" not in str(raised.value)

    file = tmp_path / "some.creds"
    with Nats(auth="creds") as strict:
        case = NatsCase(strict, "CREDS")
        run(test())


@both
def test_the_leader_of_a_cluster_is_killed(atomic: bool) -> None:
    async def test() -> None:
        sink = target(case, timeout="10s", servers=cluster.urls)
        sent = 0
        killed = False
        deadline = time.monotonic() + 60
        try:
            while sent < 2000 and time.monotonic() < deadline:
                with contextlib.suppress(TargetAway):
                    await sink.open()
                    sent = await sink.position() or 0
                    while sent < 2000:
                        end = min(sent + 100, 2000)
                        delivering = asyncio.create_task(sink.deliver(some(case, range(sent + 1, end + 1))))
                        if sent >= 1000 and not killed:
                            killed = True
                            await asyncio.to_thread(lambda: leader().kill())
                        assert await delivering == {}
                        sent = end
        finally:
            await sink.close()
        assert sent == 2000 and killed

    def leader() -> Nats:
        name = case.ask(f"STREAM.INFO.{case.name}", {})["cluster"]["leader"]
        found = next(node for node in cluster.nodes if name == f"node{node.port}")
        case.server = next(node for node in cluster.nodes if node is not found)
        return found

    with NatsCluster() as cluster, stream(cluster.nodes[0], num_replicas=3, allow_atomic=atomic) as case:
        run(test())
        assert seqs(case) == list(range(1, 2001))


def test_check_names_what_makes_a_stream_slow(server: Nats) -> None:
    async def test() -> None:
        assert await target(case).check() == []
        await asyncio.to_thread(case.edit, allow_atomic=False)
        (problem,) = await target(case).check()
        assert (problem.code, problem.severity) == ("sink_atomic", "warning")
        assert problem.fix == f"nats stream edit {case.name} --allow-batch --force"
        assert await target(case, None).check() == []
        (problem,) = await target(case, stream="NONE").check()
        assert (problem.code, problem.severity) == ("sink_unusable", "error")
        (problem,) = await target(case, servers=["nats://127.0.0.1:1"]).check()
        assert problem.code == "sink_unreachable"

    with stream(server) as case:
        run(test())
