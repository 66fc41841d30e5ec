"""A mailbox through which two threads exchange values, under one lock.

A thread that has put an entry does not touch the entry afterwards. For example, the appender takes a batch from one
mailbox, and puts it into another one when the batch is durable. This module is pure, except for a pipe that wakes
select(). Never runs code of a caller while it holds the lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """Entries in their order of arrival, some of them with a name.

    Every thread may call every method except close().

    Args:
        limit: The number of entries at which put() waits. None means no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._changed = threading.Condition()
        self._limit = limit
        self._entries: dict[Hashable, Item] = {}  # by name; without a name, the key is a new object
        self._ended = False
        self._pipe: tuple[int, int] | None = None  # contains one byte while there are entries

    def put(self, item: Item, name: Hashable = None) -> bool:
        """Add an entry as soon as there is room for it, and wake the threads that wait for one.

        Args:
            item: The entry.
            name: The name of the entry. None means that it has no name.

        Returns:
            False, without adding the entry, if the mailbox has ended or already has an entry of that name. The first
            entry stays.
        """
        key = object() if name is None else name
        with self._changed:
            while self._full() and key not in self._entries:
                self._changed.wait()
            if self._ended or key in self._entries:
                return False
            if self._pipe is not None and not self._entries:
                os.write(self._pipe[1], b"x")
            self._entries[key] = item
            self._changed.notify_all()
            return True

    def take(self, name: Hashable = None) -> Item | None:
        """Remove and return the entry of that name, or the oldest entry if `name` is None.

        Returns:
            None if there is no such entry.
        """
        with self._changed:
            return self._take(name)

    def wait(self, timeout: float | None = None) -> Item | None:
        """Take the oldest entry, and wait up to `timeout` seconds for one.

        Returns:
            None if no entry arrived in that time, or if the mailbox has ended and is empty.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._entries or self._ended, timeout)
            return self._take(None)

    def look(self, name: Hashable) -> Item | None:
        """Return the entry of that name, and leave it in the mailbox. Without such an entry, return None."""
        with self._changed:
            return self._entries.get(name)

    def end(self) -> None:
        """Refuse new entries, and let no thread wait any longer.

        The entries in the mailbox can still be taken.
        """
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        with self._changed:
            return self._ended

    def fileno(self) -> int:
        """Return a file descriptor for select() that is readable while there are entries.

        After a call of this method, close() must be called at the end.
        """
        with self._changed:
            if self._pipe is None:
                self._pipe = os.pipe()
                if self._entries:
                    os.write(self._pipe[1], b"x")
            return self._pipe[0]

    def close(self) -> None:
        """End the mailbox, and close its file descriptors.

        Call this only when no thread waits on fileno() any more.
        """
        self.end()
        with self._changed:
            pipe, self._pipe = self._pipe, None
        for file in pipe or ():
            os.close(file)

    def _full(self) -> bool:
        return not self._ended and self._limit is not None and len(self._entries) >= self._limit

    def _take(self, name: Hashable) -> Item | None:
        key = next(iter(self._entries), None) if name is None else name
        if key not in self._entries:
            return None
        item = self._entries.pop(key)
        if self._pipe is not None and not self._entries:
            os.read(self._pipe[0], 1)
        self._changed.notify_all()
        return item
