"""Deliver messages to files: one JSON line for each message (docs/sinks/file.md).

In mode `stream` each message is there exactly once. The last complete line of the file names the message, and the
engine continues after it. If the path has placeholders, a lane writes several files, so a small progress file beside
them has the seq up to which all of them are complete. A message that one of the files has already is skipped, because
the seqs rise in each file. A file is locked, so that an earlier holder of the lane can write nothing more.

A batch is delivered once all of its files are on the disk. Reading and writing happen in a thread. Never leaves half a
line before a whole one, and never writes outside of the folders that the path names.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from cdcbridge.config.sink import FileSink
from cdcbridge.problem import Problem
from cdcbridge.routing.destination import Destination
from cdcbridge.sinks.target import Failure, Lane, Outgoing, Target, TargetAway, Unusable
from cdcbridge.sinks.targets.hold_back import hold_back
from cdcbridge.sinks.targets.line_file import STAMP_LENGTH, LineFile, LineId, locked, look, sync_folder

_T = TypeVar("_T")
_MOST_OPEN: Final = 128  # files of one target that are open at a time
_LONGEST_NAME: Final = 255 - STAMP_LENGTH  # bytes
_DIGITS: Final = 20  # of the seq in a progress file
_OWN: Final = ".cdcbridge-"  # the beginning of the name of a progress file
# What only a person can repair. All other errors, such as a full disk, are tried again.
_PERMANENT: Final = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
)


class FileTarget(Target[FileSink]):
    """The files of one lane, or all files of a consumer in the modes `fifo` and `queue`."""

    remembers = True

    def __init__(self, sink: FileSink, lane: Lane | None) -> None:
        super().__init__(sink, lane)
        path = sink.path if lane is None else sink.path.replace("{partition}", str(lane.number))
        self._one = path if "{" not in path else None  # the only file, if there is only one
        self._folder = Path(f"{path.partition('{')[0]}x").parent
        self._files: OrderedDict[str, LineFile] = OrderedDict()  # the least recently used one is first
        self._progress = -1  # the descriptor of the progress file
        self._self_describing = sink.format == "cdcbridge" and sink.transform is None
        self._thread: ThreadPoolExecutor | None = None

    @classmethod
    def lanes(cls, sink: FileSink, partitions: int) -> int:
        """Return `partitions` if each partition has files of its own. All others share one lane."""
        return partitions if "partition" in Destination(sink.path).placeholders else 1

    async def open(self) -> None:
        """Lock the file, or the progress file if the path has placeholders, and cut off half a line."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cdcbridge file sink")
        await self._run(self._open)

    async def position(self) -> int | None:
        """Return the seq of the last line, or the seq in the progress file."""
        return await self._run(self._position)

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        """Append the batch to its files, and wait until the files are on the disk."""
        return await self._run(self._deliver, batch)

    async def close(self) -> None:
        """Close all files. A write in progress ends first, unless the disk does not answer within the timeout."""
        thread, self._thread = self._thread, None
        if thread is not None:
            closed = asyncio.get_running_loop().run_in_executor(thread, self._close)
            thread.shutdown(wait=False)
            await asyncio.wait([closed], timeout=self.sink.timeout)

    async def check(self) -> Sequence[Problem]:
        """Look for a missing folder, missing rights and a file of someone else. Locks and changes nothing."""
        try:
            await asyncio.to_thread(self._look)
        except (OSError, Unusable) as error:
            named = error if isinstance(error, Unusable) else self._named(error)
            return [Problem("sink_unusable", "error", self.sink.type, str(named), named.hint or "")]
        return []

    async def _run(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Call a function in the thread, and name its errors."""
        if self._thread is None:
            raise TargetAway(f"the sink of {self.sink.path} is closed")
        try:
            call = asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
            return await asyncio.wait_for(call, self.sink.timeout)
        except TimeoutError:
            raise TargetAway(
                f"the disk of {self.sink.path} did not answer within {self.sink.timeout:g} s (`timeout`)"
            ) from None
        except OSError as error:
            raise self._named(error) from error

    def _open(self) -> None:
        if self._one is not None:
            self._file(self._one)
        elif self.lane is not None:
            name = f"{_OWN}{self.lane.name.removeprefix('cdcbridge/').replace('/', '-')}.progress"
            path = self._folder / name
            self._progress = locked(path)
            sync_folder(path)
        else:
            self._look()

    def _look(self) -> None:
        if self._one is not None and Path(self._one).exists():
            look(Path(self._one))
        elif not self._folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._folder))
        elif not os.access(self._folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no right to write into the folder", str(self._folder))

    def _position(self) -> int | None:
        if self._one is not None:
            last = self._file(self._one).last
            return None if last is None else last.seq
        text = os.pread(self._progress, _DIGITS, 0) if self._progress >= 0 else b""
        return int(text) if len(text) == _DIGITS and text.isdigit() else None

    def _deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        # A tombstone has no line, because nothing compacts a file.
        if self._one is not None:
            self._append(self._one, [one for one in batch if one.body is not None])
            return {}
        failures = self._refused(batch)
        files: dict[str, list[Outgoing]] = {}
        done = None
        for index, message in enumerate(batch):
            if index not in failures:
                files.setdefault(message.destination, []).append(message)
                done = message.seq
        for path, messages in files.items():
            self._append(path, [one for one in messages if one.body is not None])
        if self._progress >= 0 and done is not None:
            _write_progress(self._progress, done)
        return failures

    def _refused(self, batch: Sequence[Outgoing]) -> dict[int, Failure]:
        """Return the messages that have no usable path, and those that must not overtake them."""
        failures: dict[int, Failure] = {}
        usable = set(self._files)
        for index, message in enumerate(batch):
            if message.destination not in usable:
                reason = _bad_path(message.destination, self.sink.path)
                if reason is None:
                    usable.add(message.destination)
                else:
                    failures[index] = Failure(reason, for_good=True)
        hold_back(batch, failures, in_order=self.lane is not None)
        return failures

    def _append(self, path: str, messages: Sequence[Outgoing]) -> None:
        if not messages:
            return
        file = self._file(path)
        if self.lane is not None and file.last is not None and messages[0].seq <= file.last.seq:
            messages = _missing(file, messages)
        if messages:
            last = messages[-1]
            try:
                file.append(self._lines(messages), LineId(last.seq, last.id))
            except OSError:
                self._drop(path)
                raise

    def _lines(self, messages: Sequence[Outgoing]) -> bytes:
        if self._self_describing:
            data = b"\n".join([one.body or b"null" for one in messages]) + b"\n"
            if data.count(b"\n") == len(messages):
                return data
        # JSON has newlines only between its values.
        bodies = [(one.body or b"null").replace(b"\n", b" ") for one in messages]
        if self._self_describing:
            return b"".join([body + b"\n" for body in bodies])
        return b"".join(
            [
                b'{"id":%s,"seq":%d,"data":%s}\n' % (json.dumps(one.id).encode(), one.seq, body)
                for one, body in zip(messages, bodies, strict=True)
            ]
        )

    def _file(self, path: str) -> LineFile:
        """Return a file that is open, locked and not yet to be rotated."""
        file = self._files.get(path)
        if file is not None and file.is_changed():
            self._drop(path)
            file = None
        if file is None:
            file = self._files[path] = LineFile(Path(path))
            while len(self._files) > _MOST_OPEN:
                self._drop(next(iter(self._files)))
        self._files.move_to_end(path)
        if not file.is_due(self.sink.rotate):
            return file
        file.rotate()
        self._drop(path)
        return self._file(path)

    def _drop(self, path: str) -> None:
        self._files.pop(path).close()

    def _close(self) -> None:
        for path in list(self._files):
            self._drop(path)
        fd, self._progress = self._progress, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _named(self, error: OSError) -> TargetAway | Unusable:
        """Return the error as the engine needs it, with the next step for the user."""
        path = Path(str(error.filename) if error.filename else self.sink.path)
        message = f"{path}: {error.strerror or error}"
        if error.errno not in _PERMANENT:
            return TargetAway(message)
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return Unusable(message, hint=f"mkdir -p {path if path == self._folder else path.parent}")
        return Unusable(message, hint="change `path` of the sink, or let the user of cdcbridge write there")


def _missing(file: LineFile, messages: Sequence[Outgoing]) -> Sequence[Outgoing]:
    """Return the messages that a file lacks, after a crash in the middle of a batch of several files."""
    has = file.ids_since(messages[0].seq)
    for index, message in enumerate(messages):
        if file.last is None or message.seq > file.last.seq:
            return messages[index:]
        if has.get(message.seq) != message.id:
            raise Unusable(
                f"{file.path} has lines of another log: it ends with seq {file.last.seq} and lacks {message.id}",
                hint="move the file away, or change `path` of the sink",
            )
    return []


def _bad_path(path: str, template: str) -> str | None:
    """Return why a path cannot be used. A value, for example a key, must not lead into another folder."""
    parts, pattern = path.split("/"), template.split("/")
    if len(parts) != len(pattern) or "\0" in path:
        return f"{path!r} is not a path of {template!r}: a placeholder's value has a / or a NUL character"
    for part, expected in zip(parts, pattern, strict=True):
        if part != expected and (part in {"", ".", ".."} or part.startswith(_OWN)):
            return f"{path!r} is not a path of {template!r}: a placeholder's value gives the name {part!r}"
        if len(os.fsencode(part)) > _LONGEST_NAME:
            return f"{part!r} is longer than {_LONGEST_NAME} bytes, so it cannot be the name of a file"
    return None


def _write_progress(fd: int, seq: int) -> None:
    """Note that all files have the messages up to `seq`.

    The number has a fixed width, so it is written as a whole. It is not made durable: an older number is true as well.
    """
    os.pwrite(fd, b"%0*d" % (_DIGITS, seq), 0)
