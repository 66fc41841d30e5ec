"""The thread that appends: one batch at a time, so that reading and decoding go on while the store commits.

Knows the store and a pipe to wake the main loop by; decides nothing. An error is kept for the main loop to raise.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from cdcbridge.routing.batch import Batch
from cdcbridge.store.log import Store


class Appender:
    """submit() a batch when idle; the pipe becomes readable when it is durable, and finished() tells which it was."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._given: tuple[Batch, dict[str, Any] | None, dict[str, Any] | None] | None = None
        self._ready = threading.Condition()
        self._done: Batch | None = None
        self.given = Batch()  # the last one that was submitted
        self._error: BaseException | None = None
        self._stopping = False
        self.busy = False
        self._thread = threading.Thread(target=self._work, name="appender", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._wake_read

    def submit(self, batch: Batch, unfinished: dict[str, Any] | None, catalog: dict[str, Any] | None) -> None:
        """Hand over a batch. Only when not busy."""
        with self._ready:
            self.busy, self.given = True, batch
            self._given = (batch, unfinished, catalog)
            self._ready.notify()

    def finished(self) -> Batch | None:
        """The batch that became durable since the last call, or None. Raises what its append raised."""
        try:
            os.read(self._wake_read, 64)
        except BlockingIOError:
            return None
        with self._ready:
            batch, self._done = self._done, None
            self.busy = False
        if self._error is not None:
            raise self._error
        return batch

    def ended(self, seconds: float) -> bool:
        """Let the append that is under way be the last; whether it has ended after so long."""
        with self._ready:
            self._stopping = True
            self._ready.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Only when it has ended."""
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _work(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._given is not None or self._stopping)
                given, self._given = self._given, None
            if given is None:
                return
            batch, unfinished, catalog = given
            try:
                self._store.append(batch, unfinished, catalog)
                self._done = batch
            except BaseException as error:  # noqa: BLE001 - raised again by the main loop
                self._error = error
            os.write(self._wake_write, b"x")
