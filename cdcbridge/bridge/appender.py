"""The thread that appends: one batch at a time, so that reading and decoding go on while the store commits.

Knows the store and two mailboxes to the main loop; decides nothing. An error is kept for the main loop to raise.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from cdcbridge.background import Background
from cdcbridge.mailbox import Mailbox
from cdcbridge.routing.batch import AppendBatch
from cdcbridge.store.log import BridgeStore

Append: TypeAlias = tuple[AppendBatch, dict[str, Any] | None, dict[str, Any] | None]


class Appender(Background):
    """submit() a batch when idle; fileno() becomes readable when it is durable, and take_durable() gives it.

    The store is the thread's alone until stop_within() is true.
    """

    def __init__(self, store: BridgeStore) -> None:
        super().__init__("appender")
        self._store = store
        self._given: Mailbox[Append] = Mailbox()
        self._done: Mailbox[AppendBatch | BaseException] = Mailbox()
        self.given = AppendBatch()  # the last one that was submitted; the main loop's alone, as is the next
        self.busy = False
        self.start()

    def fileno(self) -> int:
        return self._done.fileno()

    def submit(self, batch: AppendBatch, unfinished: dict[str, Any] | None, catalog: dict[str, Any] | None) -> None:
        """Hand over a batch. Only when not busy."""
        self.busy, self.given = True, batch
        self._given.put((batch, unfinished, catalog))

    def take_durable(self) -> AppendBatch | None:
        """The batch that became durable since the last call, or None. Raises what its append raised."""
        done = self._done.take()
        if done is None:
            return None
        self.busy = False
        if isinstance(done, BaseException):
            raise done
        return done

    def stop(self) -> None:
        """Let the append that was submitted be the last."""
        super().stop()
        self._given.end()

    def stop_within(self, seconds: float) -> bool:
        """Let the append that is under way be the last. Return whether it has ended after so many seconds."""
        self.stop()
        return self.join(seconds)

    def close(self) -> None:
        """Only when it has ended."""
        self._done.close()

    def _work(self) -> None:
        while (given := self._given.wait()) is not None:
            try:
                self._store.append(*given)
                self._done.put(given[0])
            except BaseException as error:  # noqa: BLE001 - raised again by the main loop
                self._done.put(error)
