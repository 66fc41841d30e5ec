"""Long polls are woken by messages, and by no more of them than can be served."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from cdcbridge.web.arrivals import Arrivals


class Messages:
    """A queue in memory, which counts how often somebody looks."""

    def __init__(self) -> None:
        self.left = 0
        self.looks = 0
        self.soon: float | None = None

    async def look(self) -> list[Any]:
        self.looks += 1
        await asyncio.sleep(0)
        if not self.left:
            return []
        self.left -= 1
        return ["message"]

    async def due(self) -> tuple[int, float | None]:
        await asyncio.sleep(0)
        return 7, self.soon


async def here() -> bool:
    return False


async def never() -> psycopg.AsyncConnection:
    raise AssertionError("nobody listens here")


@pytest.fixture
def arrivals() -> Arrivals:
    made = Arrivals(never, "cdcbridge")
    made._longest = 10
    return made


def test_one_message_wakes_one_poll_of_many(arrivals: Arrivals) -> None:
    async def test() -> None:
        queue = Messages()
        polls = [asyncio.create_task(arrivals.poll("c", 5, queue.look, queue.due, here)) for _ in range(100)]
        await asyncio.sleep(0.1)
        before = queue.looks
        queue.left = 1
        arrivals._tell("3,7")
        await asyncio.sleep(0.1)
        assert sum(poll.done() for poll in polls) == 1
        assert queue.looks - before <= 2, "the poll that got the message, and the one after it"
        arrivals._tell("70,8")
        await asyncio.sleep(0.05)
        assert queue.looks - before <= 2, "the messages of other consumers"
        queue.left = 99
        arrivals._tell()
        await asyncio.wait_for(asyncio.gather(*polls), 2)

    asyncio.run(test())


def test_a_message_between_the_look_and_the_wait_is_not_missed(arrivals: Arrivals) -> None:
    async def test() -> None:
        queue = Messages()
        await arrivals.poll("c", 0.01, queue.look, queue.due, here)  # makes the room

        async def due() -> tuple[int, float | None]:
            queue.left = 1
            arrivals._tell("7")
            return 7, None

        assert await asyncio.wait_for(arrivals.poll("c", 5, queue.look, due, here), 1) == ["message"]

    asyncio.run(test())


def test_a_poll_that_is_cancelled_when_it_is_woken_wakes_the_next_one(arrivals: Arrivals) -> None:
    async def test() -> None:
        queue = Messages()
        polls = [asyncio.create_task(arrivals.poll("c", 5, queue.look, queue.due, here)) for _ in range(3)]
        await asyncio.sleep(0.1)
        queue.left = 1
        arrivals._tell("7")
        polls[0].cancel()
        done, waiting = await asyncio.wait(polls, timeout=1)
        assert len(done) == 2 and [poll.result() for poll in done if not poll.cancelled()] == [["message"]]
        for poll in waiting:
            poll.cancel()

    asyncio.run(test())


def test_a_time_that_ends_wakes_a_poll(arrivals: Arrivals) -> None:
    async def test() -> None:
        queue = Messages()
        queue.soon = 0.2
        poll = asyncio.create_task(arrivals.poll("c", 5, queue.look, queue.due, here))
        await asyncio.sleep(0.1)
        queue.left = 1
        assert await asyncio.wait_for(poll, 1) == ["message"]

    asyncio.run(test())


def test_a_poll_whose_caller_has_gone_claims_nothing(arrivals: Arrivals) -> None:
    async def test() -> None:
        queue = Messages()

        async def gone() -> bool:
            return True

        left = asyncio.create_task(arrivals.poll("c", 5, queue.look, queue.due, gone))
        await asyncio.sleep(0.05)
        poll = asyncio.create_task(arrivals.poll("c", 5, queue.look, queue.due, here))
        await asyncio.sleep(0.05)
        queue.left = 1
        arrivals._tell("7")
        assert await asyncio.wait_for(poll, 1) == ["message"] and left.result() == []

    asyncio.run(test())


def test_a_poll_that_fails_wakes_the_next_one(arrivals: Arrivals) -> None:
    async def test() -> None:
        queue = Messages()
        calls = 0

        async def look() -> list[Any]:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise OSError
            return []

        fails = asyncio.create_task(arrivals.poll("c", 5, look, queue.due, here))
        await asyncio.sleep(0.05)
        poll = asyncio.create_task(arrivals.poll("c", 5, queue.look, queue.due, here))
        await asyncio.sleep(0.05)
        queue.left = 1
        arrivals._tell("7")
        assert await asyncio.wait_for(poll, 1) == ["message"]
        assert isinstance(fails.exception(), OSError)

    asyncio.run(test())


def test_a_poll_that_is_about_to_wait_ends_at_a_stop(arrivals: Arrivals) -> None:
    async def test() -> None:
        queue = Messages()
        await arrivals.poll("c", 0.01, queue.look, queue.due, here)

        async def due() -> tuple[int, float | None]:
            arrivals.stop()
            return 7, None

        assert await asyncio.wait_for(arrivals.poll("c", 5, queue.look, due, here), 1) == []

    asyncio.run(test())


def test_messages_that_cannot_be_claimed_cause_ten_looks_a_second(arrivals: Arrivals) -> None:
    async def test() -> None:
        queue = Messages()
        queue.soon = -5.0
        assert await arrivals.poll("c", 1, queue.look, queue.due, here) == []
        assert queue.looks < 15

    asyncio.run(test())


def test_stop_ends_all_polls(arrivals: Arrivals) -> None:
    async def test() -> None:
        queue = Messages()
        polls = [asyncio.create_task(arrivals.poll(str(n % 3), 5, queue.look, queue.due, here)) for n in range(9)]
        await asyncio.sleep(0.1)
        arrivals.stop()
        assert await asyncio.wait_for(asyncio.gather(*polls), 1) == [[]] * 9
        assert await arrivals.poll("0", 5, queue.look, queue.due, here) == []

    asyncio.run(test())


def test_an_idle_poll_ends_in_time_and_looks_rarely(arrivals: Arrivals) -> None:
    async def test() -> None:
        queue = Messages()
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await arrivals.poll("c", 0.5, queue.look, queue.due, here) == []
        assert 0.5 <= loop.time() - began < 2 and queue.looks <= 3

    asyncio.run(test())
