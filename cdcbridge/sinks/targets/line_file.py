"""One file of JSON lines that a file sink appends to: locked, mended after a crash, and durable.

Each line has the `id` and the `seq` of its message, so the last line tells how far the file has come. A line that a
crash cut off is removed when the file is opened. Never cuts off a line that cdcbridge has not written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from cdcbridge.config.sink import Rotate
from cdcbridge.sinks.target import TargetAway, Unusable

_BLOCK: Final = 1 << 16  # bytes of the first read from the end of a file
_LARGEST_BLOCK: Final = 1 << 23
_STAMP: Final = "%Y%m%dT%H%M%S.%fZ"  # the end of a rotated file's name, in UTC, which sorts by time
_STAMPED: Final = re.compile(r"\d{8}T\d{6}\.\d{6}Z")
STAMP_LENGTH: Final = 24  # characters that rotation adds to a name, with the dot before them


class LineId(NamedTuple):
    """The message of a line."""

    seq: int
    id: str


class LineFile:
    """A file that is open for appending, and locked against other processes.

    Args:
        path: The file. It is created if it is missing, and its folder must exist.

    Attributes:
        last: The message of the last line, or of the last line of the newest rotated file if this one is empty.

    Raises:
        TargetAway: Another process writes to the file.
        Unusable: The file has lines that cdcbridge did not write.
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = locked(path)
        try:
            self._size = _mend(self._fd, path)
            if self._size == 0:
                sync_folder(path)
            self._written = os.fstat(self._fd).st_mtime
            self.last = next((_identity(line, path) for line in self._lines()), None)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, data: bytes, last: LineId) -> None:
        """Append whole lines and wait until they are durable. After an error, the file is as it was before.

        Args:
            data: The lines, each with its newline.
            last: The message of the last line.

        Raises:
            OSError: The disk is full, for example.
        """
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._fd, data[written:] if written else data, self._size + written)
            os.fdatasync(self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
                os.fdatasync(self._fd)
            raise
        self._size += len(data)
        self._written = time.time()
        self.last = last

    def ids_since(self, seq: int) -> dict[int, str]:
        """Return the ids of the lines from `seq` on, by seq, rotated files included."""
        found: dict[int, str] = {}
        for line in self._lines():
            one = _identity(line, self.path)
            if one.seq < seq:
                break
            found[one.seq] = one.id
        return found

    def is_due(self, rotate: Rotate) -> bool:
        """Return True if the next line belongs into a new file."""
        if self._size == 0:
            return False
        if rotate.size is not None and self._size > rotate.size:
            return True
        return rotate.interval is not None and self._written // rotate.interval != time.time() // rotate.interval

    def rotate(self) -> None:
        """Rename the file to `PATH.TIME`, and close it. Each name sorts after the earlier ones."""
        now = datetime.now(UTC)
        if earlier := rotated(self.path):
            newest = datetime.strptime(earlier[0].name[-STAMP_LENGTH + 1 :], _STAMP).replace(tzinfo=UTC)
            now = max(now, newest + timedelta(microseconds=1))  # the clock may have been set back
        self.path.rename(f"{self.path}.{now.strftime(_STAMP)}")
        sync_folder(self.path)
        self.close()

    def is_changed(self) -> bool:
        """Return True if someone else has moved, removed or cut the file, so that it must be opened anew."""
        return os.fstat(self._fd).st_size != self._size or not _is_at(self._fd, self.path)

    def close(self) -> None:
        """Close the file, which also frees its lock."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _lines(self) -> Iterator[bytes]:
        """Yield the lines of this file and of the rotated ones, the last line first."""
        yield from _backwards(self._fd, self._size)
        for path in rotated(self.path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield from _backwards(fd, _end_of_lines(fd, os.fstat(fd).st_size))
            finally:
                os.close(fd)


def locked(path: Path) -> int:
    """Open a file for reading and writing, lock it against other processes, and return its descriptor.

    The file is created if it is missing. The kernel frees the lock when the process ends.

    Raises:
        TargetAway: Another process writes to the file.
        Unusable: The path is not a file.
        OSError: The file cannot be opened.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Unusable(f"{path} is not a regular file", hint="change `path` of the sink")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, path):
                return fd  # otherwise its holder has just renamed it
        except BlockingIOError:
            os.close(fd)
            raise TargetAway(
                f"another process writes to {path}",
                hint="two sinks need two paths; a sinks process that ends frees its files",
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def rotated(path: Path) -> list[Path]:
    """Return the paths of the rotated files of `path`, the newest first."""
    start = f"{path.name}."
    names = [one.name for one in os.scandir(path.parent) if one.name.startswith(start)]
    found = [name for name in names if _STAMPED.fullmatch(name, len(start))]
    return [path.parent / name for name in sorted(found, reverse=True)]


def sync_folder(path: Path) -> None:
    """Make the name of a file durable."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def look(path: Path) -> None:
    """Read the last line of a file without locking or changing the file.

    Raises:
        Unusable: cdcbridge did not write the line.
        OSError: The file cannot be opened, or there is none.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Unusable(f"{path} is not a regular file", hint="change `path` of the sink")
        for line in _backwards(fd, _end_of_lines(fd, os.fstat(fd).st_size)):
            _identity(line, path)
            break
    finally:
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _mend(fd: int, path: Path) -> int:
    """Cut off a line that was not written to its end, make the rest durable, and return its size in bytes.

    A killed process may have written lines that are not on the disk yet.
    """
    size = os.fstat(fd).st_size
    end = _end_of_lines(fd, size)
    if end < size:
        torn = os.pread(fd, size - end, end)
        if not torn.startswith((b"{", b"\0")):  # a crash of the machine can leave zeros
            _foreign(path)
        if end or torn.endswith(b"}"):
            _identity(next(_backwards(fd, end)) if end else torn, path)
        os.ftruncate(fd, end)
    if size:
        os.fdatasync(fd)
    return end


def _end_of_lines(fd: int, size: int) -> int:
    """Return the place after the last newline in the first `size` bytes."""
    start, block = size, _BLOCK
    while start > 0:
        step = min(block, start)
        start -= step
        found = os.pread(fd, step, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        block = min(2 * block, _LARGEST_BLOCK)
    return 0


def _backwards(fd: int, size: int) -> Iterator[bytes]:
    """Yield the lines in the first `size` bytes without their newlines, the last line first."""
    if size == 0:
        return
    start, block, pieces = size - 1, _BLOCK, [b""]
    while start > 0:
        step = min(block, start)
        start -= step
        first, *lines = os.pread(fd, step, start).split(b"\n")
        if lines:
            yield b"".join((lines.pop(), *reversed(pieces)))
            yield from reversed(lines)
            pieces = []
        pieces.append(first)
        block = min(2 * block, _LARGEST_BLOCK)
    yield b"".join(reversed(pieces))


def _identity(line: bytes, path: Path) -> LineId:
    try:
        found = json.loads(line)
        seq, one = found["seq"], found["id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        seq = one = None
    if not isinstance(seq, int) or not isinstance(one, str):
        _foreign(path)
    return LineId(seq, one)


def _foreign(path: Path) -> NoReturn:
    raise Unusable(
        f"the last line of {path} is not a message of cdcbridge",
        hint="move the file away, or change `path` of the sink",
    )
