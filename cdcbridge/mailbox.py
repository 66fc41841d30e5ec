"""What two threads exchange: a mailbox under one lock. Pure, but for a pipe that wakes select().

Never holds its lock while it runs code of a caller. Entries are handed over: a thread that has put one does not touch
it afterwards. For example, the appender takes a batch from one mailbox, and puts it into another when it is durable.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """Entries in the order in which they came, some with a name. Every thread may call everything but close().

    limit: the number of entries at which put() waits; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._changed = threading.Condition()
        self._limit = limit
        self._entries: dict[Hashable, Item] = {}  # by name; one without a name by an object of its own
        self._ended = False
        self._pipe: tuple[int, int] | None = None  # holds one byte while there are entries

    def put(self, item: Item, name: Hashable = None) -> bool:
        """Add an entry, wait for room where it needs to, and wake whoever waits for an entry.

        Returns False and adds nothing where the mailbox has ended, or has an entry of that name: the first one stays.
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
        """Remove and return the entry of that name, or the oldest of all; None where there is none."""
        with self._changed:
            return self._take(name)

    def wait(self, timeout: float | None = None) -> Item | None:
        """Take the oldest entry, and wait up to `timeout` seconds for one; None where none came, or none ever will."""
        with self._changed:
            self._changed.wait_for(lambda: self._entries or self._ended, timeout)
            return self._take(None)

    def look(self, name: Hashable) -> Item | None:
        """Return the entry of that name, and leave it in."""
        with self._changed:
            return self._entries.get(name)

    def end(self) -> None:
        """Let nothing more in, and let nobody wait any more. What is in it can still be taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        with self._changed:
            return self._ended

    def fileno(self) -> int:
        """Return a file that is readable while there are entries, for select(). Then close() is a must."""
        with self._changed:
            if self._pipe is None:
                self._pipe = os.pipe()
                if self._entries:
                    os.write(self._pipe[1], b"x")
            return self._pipe[0]

    def close(self) -> None:
        """End, and close the file. Only when nobody waits on fileno() any more."""
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
