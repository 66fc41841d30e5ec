"""Append batches in a thread of its own, so that reading and decoding continue while the store commits.

The thread appends one batch at a time. It knows only the store and two mailboxes to the main loop, and never decides
anything. It keeps an error for the main loop to raise.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from cdcbridge.background import Background
from cdcbridge.mailbox import Mailbox
from cdcbridge.routing.batch import AppendBatch
from cdcbridge.store.log import BridgeStore

Append: TypeAlias = tuple[AppendBatch, dict[str, Any] | None, dict[str, Any] | None]


class Appender(Background):
    """The thread that appends.

    Call submit() while it is idle. When the batch is durable, fileno() becomes readable, and take_durable() returns the
    batch. The store belongs to the thread alone until stop_within() has returned True.
    """

    def __init__(self, store: BridgeStore) -> None:
        super().__init__("appender")
        self._store = store
        self._given: Mailbox[Append] = Mailbox()
        self._done: Mailbox[AppendBatch | BaseException] = Mailbox()
        self.given = AppendBatch()  # the batch that was submitted last; only the main loop uses this and `busy`
        self.busy = False
        self.start()

    def fileno(self) -> int:
        return self._done.fileno()

    def submit(self, batch: AppendBatch, unfinished: dict[str, Any] | None, catalog: dict[str, Any] | None) -> None:
        """Give a batch to the thread. Call this only while `busy` is False."""
        self.busy, self.given = True, batch
        self._given.put((batch, unfinished, catalog))

    def take_durable(self) -> AppendBatch | None:
        """Return the batch that became durable since the last call, or None. Raise the error of its append."""
        done = self._done.take()
        if done is None:
            return None
        self.busy = False
        if isinstance(done, BaseException):
            raise done
        return done

    def stop(self) -> None:
        """Make the submitted append the last one."""
        super().stop()
        self._given.end()

    def stop_within(self, seconds: float) -> bool:
        """Make the append in progress the last one. Return whether it has ended after so many seconds."""
        self.stop()
        return self.join(seconds)

    def close(self) -> None:
        """Close the mailbox of results. Call this only when the thread has ended."""
        self._done.close()

    def _work(self) -> None:
        while (given := self._given.wait()) is not None:
            try:
                self._store.append(*given)
                self._done.put(given[0])
            except BaseException as error:  # noqa: BLE001 - raised again by the main loop
                self._done.put(error)
