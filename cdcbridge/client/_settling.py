"""Ack, nack, give-back and extension of a queue's deliveries, synchronous.

Made from `_settling.py` by `make client`.

An ack counts only when it is committed, also for the order of fifo. Never decides the consequence of a failure: the
server applies the back-off and makes dead letters.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Self

from psycopg.sql import Composed

from cdcbridge.client._common import Delivery, QueueStatements, behind
from cdcbridge.client._handlers import clean, fate_of, reason_of
from cdcbridge.client._limits import LONGEST, MANY, now, refuse_bad_time
from cdcbridge.client._sessions import Connection, Sessions
from cdcbridge.database import store_errors
from cdcbridge.errors import CdcbridgeError, StoreUnavailable

log: Final = logging.getLogger("cdcbridge.client")


class Message(Delivery):
    """One delivery of a message. As a context manager it is acked on leaving, or nacked if the block raised.

    An exception of the block is not suppressed. The message also has the attributes of LogMessage, such as `data` and
    `key`.

    Attributes:
        receipt: Name of this delivery in the SQL functions ack(), nack() and extend().
        deliver_count: Number of deliveries of the message so far, including this one.
        not_visible_until: End of the lease at the time of the delivery. extend() does not change it.
        settled: How this client ended the delivery: "acked", "nacked" or "given back". None if it did not.
        lost: True if the delivery may have ended before this client settled it.
    """

    __slots__ = ("_queue",)

    def __init__(self, row: tuple[Any, ...], queue: Settling) -> None:
        super().__init__(*row)
        self.parse_float = queue._parse_float
        self._queue = queue

    def ack(self) -> bool:
        """Finish the message.

        Returns:
            True, or False if the delivery had ended before: it had expired, or was acked, nacked or given back.

        Raises:
            StoreUnavailable: The store is still away when the lease ends, or after five minutes.
        """
        return self._queue.ack([self]) == 1

    def nack(self, *, delay: float | None = None, reason: str | None = None, dead: bool = False) -> bool:
        """Give the message back for another delivery, or make it a dead letter. This delivery counts.

        After the last delivery that the consumer's `max_deliveries` allows, the message becomes a dead letter in any
        case.

        Args:
            delay: Seconds until the message is visible again. None uses the consumer's back-off.
            reason: Text that the history of the message keeps.
            dead: Whether to make the message a dead letter at once.

        Returns:
            True, or False if the delivery had ended before: it had expired, or was acked, nacked or given back.

        Raises:
            UsageError: `delay` is negative or too long.
            StoreUnavailable: The store is still away when the lease ends, or after five minutes.
        """
        return self._queue.nack([self], delay=delay, reason=reason, dead=dead) == 1

    def extend(self, seconds: float) -> bool:
        """Keep the message invisible to other receivers for longer.

        In fifo this extends all messages of the key that the same receive() returned.

        Args:
            seconds: Seconds from now. With 0 the message is visible at once.

        Returns:
            True, or False if the delivery had ended before: it had expired, or was acked, nacked or given back.

        Raises:
            UsageError: `seconds` is negative or too long.
            StoreUnavailable: The store is still away when the lease ends, or after five minutes.
        """
        return self._queue.extend([self], seconds) == 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            fate = self._queue._give_up(self, error)
            if fate:
                log.info("message %s of %s was nacked: %s", self.seq, self._queue.consumer, fate)
            elif self.settled is not None:
                log.info("message %s of %s was already %s", self.seq, self._queue.consumer, self.settled)
        elif self.settled is None and not self.ack():
            log.warning("message %s of %s was handled, but its delivery had expired", self.seq, self._queue.consumer)


class Settling(Sessions):
    """Base class of Queue: the deliveries of a queue from the fetch to their end."""

    _sql: QueueStatements

    def __init__(self, dsn: str, consumer: str, schema: str, poll_interval: float | None) -> None:
        super().__init__(dsn, consumer, poll_interval)
        self._sql = QueueStatements(schema)
        self._unbegun: set[Delivery] = set()  # messages that messages() or a worker fetched and did not begin
        self._turns = threading.Lock()  # held for an instant, so that a message is either begun or given back

    def _begin(self, message: Message) -> bool:
        """Return whether the handling of a fetched message may begin.

        If half of its lease is over, the lease is extended first. A message that is settled or lost is not begun. If
        the store is away, a message that needs an extension counts as lost.
        """
        if not message._idle and message._half_over:
            with self._turns:
                others = [
                    other for other in self._unbegun if other is not message and other._half_over and not other._idle
                ]
            try:
                self._renew([message, *others])
            except StoreUnavailable as error:
                message.lost = True  # its lease ended while the store was away
                log.warning(
                    "message %s of %s was not begun, and will be delivered again: %s", message.seq, self.consumer, error
                )
        with self._turns:
            self._unbegun.discard(message)
            good = not message._idle
        if not good:
            self._keeper.drop([message])
        return good

    def _done(self, message: Delivery) -> None:
        """Stop extending the lease of a message whose handling has ended."""
        self._keeper.drop([message])

    def _let_next(self, message: Message) -> bool:
        """Return whether the next message of the same key may be handled.

        In fifo this needs a committed ack of this message. Otherwise the later messages of the key are given back. If
        the ack was rolled back, this message is nacked.
        """
        others = behind(message) if self.mode == "fifo" else []
        if not others or (message.settled == "acked" and message._xid is None and not message.lost):
            return True
        outcome = self._outcome(message)
        if outcome == "finished":
            return True
        self._give_back(others)
        if outcome == "rolled back":
            self._quietly(lambda: self.nack([message], reason="its ack was rolled back"))
        return False

    def _outcome(self, message: Message) -> Literal["finished", "rolled back", "open"]:
        """Return how an ack ended, perhaps one in the caller's transaction.

        Returns:
            "finished" if the ack is committed, "rolled back" if it was rolled back, and else "open".
        """
        if message.settled != "acked" or message.lost:
            return "open"
        if message._xid is None:
            return "finished"
        values = (message._xid, self.consumer, [message.receipt], message._visibility)
        try:
            found = self._again(self._deadline([message]), lambda: self._write(self._sql.outcome, values))
        except StoreUnavailable:
            return "open"
        if found == 0:
            message._xid = None
            return "finished"
        return "rolled back" if found == 1 else "open"

    def ack(self, messages: Iterable[Message], *, connection: Connection | None = None) -> int:
        """Finish several deliveries.

        Further attempts are made until the leases end, at most for five minutes. With `connection` there is only one
        attempt.

        Args:
            messages: Deliveries that this client received.
            connection: Connection in whose transaction the deliveries are acked. A stale receipt then raises an error,
                so that the effect of the transaction rolls back with the ack.

        Returns:
            The number of deliveries that had not ended before.

        Raises:
            StaleReceipt: One of the deliveries had ended before, and `connection` is given.
            StoreUnavailable: The store is still away after the last attempt.
        """
        chosen = list(messages)
        receipts = [message.receipt for message in chosen]
        if connection is None:
            done = self._settle(chosen, self._sql.ack, (self.consumer, receipts))
            xid = None
        else:
            with store_errors():
                cursor = connection.execute(self._sql.ack_strictly, (self.consumer, receipts))
                row = cursor.fetchone()
            done, xid = row or (0, None)
        for message in chosen:
            if message.settled is None or message._xid is not None:
                message.settled, message._xid = "acked", xid
            message.lost = message.lost or done < len(chosen)  # one is: in fifo another receiver may have its key
        return int(done)

    def nack(
        self,
        messages: Iterable[Message],
        *,
        delay: float | None = None,
        reason: str | None = None,
        dead: bool = False,
    ) -> int:
        """Give several deliveries back, or make their messages dead letters. These deliveries count.

        In fifo, later messages of the same keys that messages() or a worker fetched are given back as well, and do not
        count as delivered. Attempts are made as in ack().

        Args:
            messages: Deliveries that this client received.
            delay: Seconds until the messages are visible again. None uses the consumer's back-off.
            reason: Text that the history of the messages keeps.
            dead: Whether to make the messages dead letters at once.

        Returns:
            The number of deliveries that had not ended before.

        Raises:
            UsageError: `delay` is negative or too long.
            StoreUnavailable: The store is still away after the last attempt.
        """
        refuse_bad_time("delay", delay)
        chosen = list(messages)
        self._give_back([mate for message in chosen for mate in behind(message)])
        values = (self.consumer, [m.receipt for m in chosen], delay, None if reason is None else clean(reason), dead)
        done = self._settle(chosen, self._sql.nack, values)
        for message in chosen:
            if message.settled is None or message._xid is not None:
                message.settled, message._xid = "nacked", None
        return done

    def _give_up(self, message: Message, error: BaseException) -> str:
        """Nack a message whose handling raised, unless it is finished. Never hides the error of the handling.

        Args:
            message: The message that was handled.
            error: The exception of its handler.

        Returns:
            The fate of the message, for example "delivery 2 of 5, again in 2 s". Empty if it was finished before.
        """
        if message.settled is None or self._outcome(message) == "rolled back":
            try:
                return self._nack_failed(message, reason_of(error))
            except CdcbridgeError as worse:
                text = "message %s of %s could not be nacked, and will be delivered again when its delivery expires: %s"
                log.warning(text, message.seq, self.consumer, worse)
        return ""

    def _nack_failed(self, message: Message, reason: str) -> str:
        """Nack one message, and return its fate, which the same statement returns."""
        self._give_back(behind(message))
        values = (self.consumer, message.receipt, reason)
        deadline = self._deadline([message])

        def attempt() -> list[tuple[Any, ...]]:
            return self._rows(self._writer_session(), self._sql.nack_failed, values)

        rows = self._again(deadline, attempt)
        message.settled, message._xid = "nacked", None
        return fate_of(self.consumer, rows[0] if rows else None)

    def _give_back(self, messages: Iterable[Delivery]) -> None:
        """Give back the messages that were not begun, at once and uncounted. Raise nothing."""
        with self._turns:
            chosen = [message for message in messages if message in self._unbegun and not message._idle]
            for message in chosen:
                message.settled = "given back"
            self._unbegun.difference_update(chosen)
        self._keeper.drop(chosen)
        if not chosen or self.closed:
            return
        values = (self.consumer, [message.receipt for message in chosen])
        error = self._quietly(lambda: self._write(self._sql.give_back, values))
        if error is not None:
            log.warning(
                "%s messages of %s were not begun, and will be delivered again later: %s",
                len(chosen),
                self.consumer,
                error,
            )

    def _give_back_rest(self, messages: Iterable[Delivery]) -> list[Delivery]:
        """Give back the messages that were not begun. Return those that were begun and are not settled."""
        late = list(messages)
        self._give_back(late)
        begun = [message for message in late if not message._idle]
        self._keeper.drop(begun)
        return begun

    def _leave(self) -> None:
        self._give_back(list(self._unbegun))

    def extend(self, messages: Iterable[Delivery], seconds: float) -> int:
        """Keep several deliveries invisible to other receivers for longer.

        Attempts are made as in ack().

        Args:
            messages: Deliveries that this client received.
            seconds: Seconds from now. With 0 the messages are visible at once.

        Returns:
            The number of deliveries that had not ended before.

        Raises:
            UsageError: `seconds` is negative or too long.
            StoreUnavailable: The store is still away after the last attempt.
        """
        chosen = list(messages)
        asked = now()
        values = (self.consumer, [message.receipt for message in chosen], seconds)
        done = int(self._again(self._deadline(chosen), lambda: self._write(self._sql.extend, values)))
        if done == len(chosen):
            for message in chosen:
                message._prolonged(asked, seconds)
        return done

    def _renew(self, due: Sequence[Delivery]) -> None:
        """Extend leases in one statement. If some are lost, extend each alone to find and mark the lost ones."""
        seconds = max(message._visibility for message in due)
        if self.extend(due, seconds) == len(due):
            return
        for message in due:
            if not message._idle and not self.extend([message], seconds) and not message._idle:
                message.lost = True
                log.warning(
                    "the delivery of message %s of %s was lost: the message will be delivered again",
                    message.seq,
                    self.consumer,
                )

    def _settle(self, chosen: Sequence[Delivery], query: Composed, values: tuple[Any, ...]) -> int:
        """Ack or nack, with further attempts until the leases end. A repeated statement finds nothing left to do.

        More than MANY deliveries are settled in a session of its own, which may take longer.
        """
        attempts = 0

        def attempt() -> int:
            nonlocal attempts
            attempts += 1
            if len(chosen) <= MANY:
                return int(self._write(query, values))
            return int((self._patiently(query, values, deadline - now()))[0][0])

        deadline = self._deadline(chosen)
        done = self._again(deadline, attempt)
        if attempts > 1 and self.mode == "queue":
            # An earlier attempt may have succeeded, and its answer was lost: no other client has these receipts.
            done = max(done, sum(message.settled is None and message._ends > now() for message in chosen))
        return done

    def _deadline(self, messages: Iterable[Delivery]) -> float:
        """Return the time of the last attempt: the end of the last lease, at most LONGEST seconds from now."""
        return min(now() + LONGEST, max((message._ends for message in messages), default=0.0))
