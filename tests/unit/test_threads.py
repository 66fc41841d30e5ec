"""The base of every thread, and the mailbox between two."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from cdcbridge.backfill.watermarks import BYTES_AHEAD, Room
from cdcbridge.backfill.worker import BackfillSession
from cdcbridge.background import Background, log_failure
from cdcbridge.bridge.appender import Appender
from cdcbridge.mailbox import Mailbox
from cdcbridge.routing.batch import AppendBatch

PATIENCE = 10.0


class Worker(Background):
    def __init__(self, work: Callable[[threading.Event], None], patience: float = PATIENCE) -> None:
        super().__init__("worker", patience=patience)
        self._given = work

    def _work(self) -> None:
        self._given(self._stop)


def until_stopped(stop: threading.Event) -> None:
    stop.wait()


def readable(box: Mailbox[Any] | Appender, timeout: float = 0) -> bool:
    return bool(select.select([box], [], [], timeout)[0])


@contextlib.contextmanager
def thread(call: Callable[[], object]) -> Any:
    """A thread that has ended when the block has."""
    running = threading.Thread(target=call)
    running.start()
    yield running
    running.join(PATIENCE)
    assert not running.is_alive()


# the base


def test_a_thread_lives_from_entry_to_exit_with_its_name() -> None:
    with Worker(until_stopped) as worker:
        assert [t.daemon for t in threading.enumerate() if t.name == "worker"] == [True]
    assert "worker" not in [t.name for t in threading.enumerate()]
    assert worker.join() and worker.error is None


def test_a_stop_before_the_start_and_more_than_one() -> None:
    worker = Worker(until_stopped)
    worker.stop()
    assert worker.join(), "a thread that was never started is no thread that is left"
    with worker:
        assert not worker.started
    worker.stop()
    assert worker.join()


def test_join_tells_whether_the_thread_has_ended() -> None:
    may = threading.Event()

    def work(_stop: threading.Event) -> None:
        may.wait()

    worker = Worker(work)
    worker.start()
    worker.stop()
    assert not worker.join(0.01)
    may.set()
    assert worker.join(PATIENCE)


def test_the_error_of_a_thread_is_kept_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", log_failure)

    def fail(_stop: threading.Event) -> None:
        raise KeyError("amount")

    with structlog.testing.capture_logs() as logs, Worker(fail) as worker:
        pass
    assert isinstance(worker.error, KeyError)
    (entry,) = logs
    assert (entry["event"], entry["thread"], entry["error"]) == ("thread.failed", "worker", "'amount'")
    assert entry["exc_info"] is worker.error


# the mailbox


def test_entries_come_in_order_and_by_name() -> None:
    box: Mailbox[str] = Mailbox()
    assert box.take() is None and box.take("b") is None and box.look("b") is None
    assert box.put("1") and box.put("2", "b") and box.put("3")
    assert box.look("b") == "2"
    assert not box.put("4", "b"), "the first entry of a name stays"
    assert (box.take("b"), box.take("b"), box.take(), box.take(), box.take()) == ("2", None, "1", "3", None)
    assert box.put("5", "b") and box.take() == "5"


def test_it_is_readable_while_there_are_entries() -> None:
    box: Mailbox[int] = Mailbox()
    box.put(0)
    with contextlib.closing(box):
        assert readable(box), "the file is asked for later than the first entry came"
        for number in range(100_000):  # more than a pipe holds
            box.put(number)
        assert readable(box)
        while box.take() is not None:
            assert readable(box) == bool(box._entries)
        box.put(1)
        assert readable(box)
        box.end()
        assert readable(box) and box.wait() == 1
        assert not readable(box)


def test_the_end_lets_nobody_wait_and_loses_nothing() -> None:
    box: Mailbox[int] = Mailbox(1)
    got: list[object] = []
    box.put(1)
    with thread(lambda: got.append(box.put(2))):
        box.end()
    assert got == [False] and box.ended
    assert box.wait() == 1 and box.wait() is None and box.take() is None
    assert not box.put(3)

    empty: Mailbox[int] = Mailbox()
    with thread(lambda: got.append(empty.wait())):
        empty.end()
    assert got == [False, None]


def test_wait_gives_up_in_time() -> None:
    assert Mailbox[int]().wait(0.01) is None


def test_a_full_one_lets_the_sender_wait() -> None:
    box: Mailbox[int] = Mailbox(2)
    most, got = 0, list[int | None]()
    with thread(lambda: [box.put(number) for number in range(200)]):
        while len(got) < 200:
            most = max(most, len(box._entries))
            got.append(box.wait(PATIENCE))
    assert got == list(range(200)) and most <= 2


def test_two_threads_that_put_and_one_that_selects() -> None:
    """No entry is lost, none comes twice, and none is left behind without a wake-up."""
    box: Mailbox[tuple[int, int]] = Mailbox()
    count = 5_000

    def put(sender: int) -> None:
        for number in range(count):
            box.put((sender, number))

    got: list[tuple[int, int]] = []
    with contextlib.closing(box), thread(lambda: put(1)), thread(lambda: put(2)):
        while len(got) < 2 * count:
            assert readable(box, PATIENCE), "an entry without a wake-up"
            while (entry := box.take()) is not None:
                got.append(entry)
        assert not readable(box)
    for sender in (1, 2):
        assert [number for who, number in got if who == sender] == list(range(count))


def test_an_entry_that_two_threads_want_goes_to_one() -> None:
    """As a chunk does, for which the stream has come while its backfill is being stopped."""
    box: Mailbox[int] = Mailbox()
    got: list[int] = []

    def take() -> None:
        got.extend(entry for token in range(5_000) if (entry := box.take(token)) is not None)

    for token in range(5_000):
        box.put(token, token)
    with thread(take), thread(take):
        pass
    assert sorted(got) == list(range(5_000))


def test_close_gives_the_file_back() -> None:
    box: Mailbox[int] = Mailbox()
    file = box.fileno()
    box.close()
    with pytest.raises(OSError):
        os.fstat(file)
    assert not box.put(1)
    box.close()


# what is made of them


def test_the_appender_hands_back_each_batch_and_the_error_of_its_append() -> None:
    refused = ValueError("refused")
    may = threading.Event()

    def append(batch: AppendBatch, *_: object) -> None:
        assert may.wait(PATIENCE)
        if batch.end_lsn == 2:
            raise refused

    appender = Appender(SimpleNamespace(append=append))  # type: ignore[arg-type]
    first, second, third = (AppendBatch(end_lsn=lsn) for lsn in (1, 2, 3))
    appender.submit(first, None, None)
    assert appender.busy and appender.take_durable() is None and not readable(appender)
    may.set()
    assert readable(appender, PATIENCE) and appender.take_durable() is first
    assert not appender.busy and not readable(appender) and appender.take_durable() is None
    appender.submit(second, None, None)
    assert readable(appender, PATIENCE)
    with pytest.raises(ValueError) as raised:
        appender.take_durable()
    assert raised.value is refused and appender.given is second and appender.error is None
    appender.submit(third, None, None)
    assert appender.stop_within(PATIENCE), "what was submitted is still appended"
    assert appender.take_durable() is third
    appender.close()


def test_room_is_shared_and_given_up_at_the_end() -> None:
    room = Room()
    assert room.enter(2 * BYTES_AHEAD), "a single chunk always fits"
    got: list[bool] = []
    with thread(lambda: got.append(room.enter(1))):
        room.leave(2 * BYTES_AHEAD)
    with thread(lambda: got.append(room.enter(BYTES_AHEAD))):
        room.close()
    assert got == [True, False]


def test_a_session_tells_its_backfills_to_be_gentle() -> None:
    session = BackfillSession(SimpleNamespace(), 1, SimpleNamespace())  # type: ignore[arg-type]
    assert not session.gentle
    for value in (True, True, False, False, True):
        session.gentle = value
        assert session.gentle is value
