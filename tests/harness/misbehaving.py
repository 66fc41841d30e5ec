"""Workers whose handlers end in every way that a handler can, for `make soak`. Uses the public client alone.

A handler that has worked leaves a line in `handled`; one that acked in its own transaction leaves it in `ledger`, with the
ack. Every other way leaves none, so that a message which is gone without a line was lost.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import psycopg

from cdcbridge import Message, Queue
from cdcbridge.errors import CdcbridgeError

LEASE: Final = 2.0  # seconds; the consumers' visibility_timeout
Session = psycopg.Connection[Any]
Way = Callable[[Queue, Message, Session, random.Random], None]


class _Silent(Exception):
    """An error whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def _work(queue: Queue, message: Message, session: Session) -> None:
    session.execute("insert into handled (consumer, seq, key) values (%s, %s, %s)",
                    (queue.consumer, message.seq, message.key))  # fmt: skip


def _strictly(queue: Queue, message: Message, session: Session) -> None:
    """The ack first, since a stale one may stand in the ledger already."""
    queue.ack([message], connection=session)
    session.execute("insert into ledger (consumer, seq, key) values (%s, %s, %s)",
                    (queue.consumer, message.seq, message.key))  # fmt: skip


def _returns(queue: Queue, message: Message, session: Session, _chance: random.Random) -> None:
    _work(queue, message, session)


def _acks_with_its_effect(queue: Queue, message: Message, session: Session, _chance: random.Random) -> None:
    with session.transaction():
        _strictly(queue, message, session)


def _acks_and_rolls_back(queue: Queue, message: Message, session: Session, chance: random.Random) -> None:
    with session.transaction(force_rollback=True):
        _strictly(queue, message, session)
    if chance.random() < 0.5:
        raise ValueError("the effect was rolled back")


def _acks_in_serializable(queue: Queue, message: Message, session: Session, _chance: random.Random) -> None:
    """The database's default: an ack is refused there where it cannot be safe."""
    session.isolation_level = None
    with session.transaction():
        session.execute("select count(*) from ledger where seq = %s", (message.seq,))
        _strictly(queue, message, session)


def _raises(_queue: Queue, _message: Message, _session: Session, _chance: random.Random) -> None:
    raise ValueError("the printer is on fire")


def _raises_with_nul(_queue: Queue, _message: Message, _session: Session, _chance: random.Random) -> None:
    raise ValueError("the printer is \0 on fire")


def _raises_with_surrogate(_queue: Queue, _message: Message, _session: Session, _chance: random.Random) -> None:
    raise ValueError("the printer is \ud800 on fire")


def _raises_without_text(_queue: Queue, _message: Message, _session: Session, _chance: random.Random) -> None:
    raise _Silent


def _exits(_queue: Queue, _message: Message, _session: Session, chance: random.Random) -> None:
    sys.exit(chance.choice((0, 3, "a text")))


def _dawdles(queue: Queue, message: Message, session: Session, _chance: random.Random) -> None:
    time.sleep(LEASE * 1.5)
    _work(queue, message, session)


def _acks_inside(queue: Queue, message: Message, session: Session, chance: random.Random) -> None:
    _work(queue, message, session)
    message.ack()
    if chance.random() < 0.5:
        raise ValueError("after the ack")


def _nacks_inside(_queue: Queue, message: Message, _session: Session, chance: random.Random) -> None:
    message.nack(delay=chance.uniform(0, 0.5), reason="inside", dead=chance.random() < 0.02)
    if chance.random() < 0.5:
        raise ValueError("after the nack")


def _is_killed(queue: Queue, message: Message, session: Session, chance: random.Random) -> None:
    if chance.random() < 0.5:
        _work(queue, message, session)
    os.kill(os.getpid(), signal.SIGKILL)


WAYS: Final[dict[str, Way]] = {
    "returns": _returns,
    "acks_with_its_effect": _acks_with_its_effect,
    "acks_and_rolls_back": _acks_and_rolls_back,
    "acks_in_serializable": _acks_in_serializable,
    "raises": _raises,
    "raises_with_nul": _raises_with_nul,
    "raises_with_surrogate": _raises_with_surrogate,
    "raises_without_text": _raises_without_text,
    "exits": _exits,
    "dawdles": _dawdles,
    "acks_inside": _acks_inside,
    "nacks_inside": _nacks_inside,
    "is_killed": _is_killed,
}
BEHAVES: Final = ("returns", "acks_with_its_effect")  # at least; the others can be switched off, one by one
MISBEHAVIOURS: Final = tuple(name for name in WAYS if name not in BEHAVES)
_RARE: Final = {"exits", "is_killed"}  # each costs a process, and all that it held waits for its lease
_WEIGHTS: Final = {"returns": 20.0, "acks_with_its_effect": 20.0, "dawdles": 0.3, **dict.fromkeys(_RARE, 0.1)}


def handle(dsn: str, consumer: str, misbehaviours: tuple[str, ...], seed: int) -> None:
    """A worker, until it is killed, or exits as a handler told it."""
    logging.getLogger("cdcbridge").setLevel(logging.CRITICAL)  # each misbehaviour is told, thousands of times
    chance = random.Random(seed)
    ways = (*BEHAVES, *misbehaviours)
    weights = [_WEIGHTS.get(name, 1.0) for name in ways]
    idle: list[Session] = []  # sessions of the handlers; a connection for each message would be most of the work
    with Queue.connect(dsn, consumer=consumer) as queue:

        @queue.worker(concurrency=chance.choice((1, 3)), wait=1, grace=1)
        def one(message: Message) -> None:
            (way,) = chance.choices(ways, weights)
            try:
                session = idle.pop()
            except IndexError:
                session = psycopg.connect(dsn, autocommit=True)
            session.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            try:
                WAYS[way](queue, message, session, chance)
            finally:
                idle.append(session)

        try:
            one.run()
        except CdcbridgeError as error:
            sys.exit(f"a worker ended: {error}")
