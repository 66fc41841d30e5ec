"""Read the next chunk of the log while the present one is applied.

The store of the source, this process and the target then work at the same time. Never reads more than one chunk ahead.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from cdcbridge.mirrors.changes import MirrorChunk
from cdcbridge.mirrors.log_reader import LogReader

AHEAD_ROWS: Final = 2_000  # rows of a chunk from which on more can be expected, so that reading ahead pays


class ReadAhead:
    """The chunks of one mirror, read in a thread of their own when begin() was called.

    Args:
        reader: Reads the log. Its session for messages is used by this object alone.
        consumer_id: The consumer by which the mirror reads.
    """

    def __init__(self, reader: LogReader, consumer_id: int) -> None:
        self._reader = reader
        self._consumer_id = consumer_id
        self._thread = ThreadPoolExecutor(1, "mirror reader")
        self._after = -1
        self._rows: Future[MirrorChunk] | None = None

    def begin(self, after: int) -> None:
        """Begin to read the messages after this seq."""
        if self._rows is None:
            self._after = after
            self._rows = self._thread.submit(self._reader.read, self._consumer_id, after)

    def take(self, after: int) -> MirrorChunk:
        """Return the messages after this seq: those that were read ahead, if begin() had the same seq."""
        rows, self._rows = self._rows, None
        if rows is not None:
            found = rows.result()
            if self._after == after:
                return found
        return self._reader.read(self._consumer_id, after)

    def close(self) -> None:
        self._reader.cut_off()
        self._thread.shutdown(wait=True)
