"""Watch from another session which sessions a waiting session waits for.

The watch only reports, and never ends a session. If it loses its connection, it ends without an error, because the
watched session continues to wait anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import psycopg

from cdcbridge.background import Background
from cdcbridge.database import Connection


class BlockerWatch(Background):
    """A thread that looks for blocking sessions from entry to exit of its `with` block.

    The exit waits until no look is in progress.

    Args:
        name: The name of the thread.
        session: The session that watches. Only the thread uses it until the exit.
        waiter: Returns the pid of the server process that waits, or None while that is not known. Called in the thread.
        query: Takes that pid, and returns the pids of the processes that it waits for, and a text that names them.
        found: Takes both after each look, and an empty list of pids if the process waits for no other. Called in the
            thread.
        interval: Seconds before each look.
    """

    def __init__(
        self,
        name: str,
        session: Connection,
        waiter: Callable[[], int | None],
        query: str,
        found: Callable[[list[int], str], None],
        *,
        interval: float,
    ) -> None:
        super().__init__(name, patience=None)
        self._session = session
        self._waiter = waiter
        self._query = query.encode()
        self._found = found
        self._interval = interval

    def _work(self) -> None:
        while not self._stop.wait(self._interval):
            pid = self._waiter()
            if pid is None:
                continue
            try:
                row = self._session.execute(self._query, (pid,)).fetchone()
            except psycopg.Error:
                return
            pids, named = row or (None, None)
            self._found(pids or [], named or "")
