"""Look from another session which sessions one waits for, while it waits. Part of the rim.

Only tells, and ends no session. A watch that loses its connection ends without a word, since the wait goes on anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import psycopg

from cdcbridge.background import Background
from cdcbridge.database import Connection


class BlockerWatch(Background):
    """Looks from entry to exit of its `with` block, which returns only when no look is under way any more.

    session: the watching session, which is the thread's alone meanwhile.
    waiter: returns the server process that waits, or None while that is not known. Called in the thread.
    query: takes the server process, and returns the pids of those it waits for, and a text that names them.
    found: gets both after each look: no pids where it waits for nobody. Called in the thread.
    interval: seconds before each look.
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
