"""Every error that cdcbridge raises on purpose, and the exit code that each one means.

An error says what happened, on what value, and what to do next. This module knows nothing of sockets,
databases or terminals; the command line turns these into a message on stderr and an exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from cdcbridge.lsn import format_lsn


class CdcbridgeError(Exception):
    """Something failed and a retry may help. `hint` says what to do next."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(CdcbridgeError):
    """Bad input: a wrong option, an unknown name, an unreadable file."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration cannot be used. The message names the file and the path in it."""


class CheckFailed(UsageError):
    """`check` found errors; `run` refuses to start for the same ones. `problems` has them one by one."""

    def __init__(self, message: str, problems: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class BehindPooler(UsageError):
    """A connection pooler is between the bridge and a server: its sessions would not be its own."""


class SourceUnavailable(CdcbridgeError):
    """The source database cannot be reached or went away: try again."""


class SentTooEarly(SourceUnavailable):
    """What was rolled back of a transaction in progress cannot be told from the rest: it has to be sent whole."""


class CaptureChanged(SourceUnavailable):
    """A publication or a named table changed, so changes may be missing: start again and tell the consumers."""


class TableLocked(SourceUnavailable):
    """A publication cannot be changed yet, because another session holds a lock on one of its tables."""


class IdentityLost(SourceUnavailable):
    """A named table has no replica identity any more: start again without it, and tell its consumers."""


class Unpublished(SourceUnavailable):
    """The WAL that comes next cannot be decoded: a publication did not exist when it was written."""


class SlotInUse(SourceUnavailable):
    """Another session streams from the slot: it is free when that has ended."""


class StoreUnavailable(CdcbridgeError):
    """The store's database cannot be reached or went away: try again."""


class LockedOut(StoreUnavailable):
    """Another session holds a lock in the store for too long: nothing was changed. The message names the session."""


class StaleReceipt(CdcbridgeError):
    """The delivery is not ours any more: its visibility timeout passed, or it was acked or given back before."""


class UnreadableData(UsageError, ValueError):
    """A message's data is JSON that Python has no values for, such as 5,000 nested lists."""


class UnusableHandler(UsageError, TypeError):
    """A worker's handler that calling would not run, such as an `async def` function for a synchronous client."""


class ClientClosed(UsageError):
    """The client was closed: connect() makes a new one."""


class NotLeader(CdcbridgeError):
    """Another bridge leads, or took over: this one must not write."""


class Fenced(NotLeader):
    """The epoch is over: another bridge leads, or the consumers changed. Start again from what the store holds."""


class OperatorNeeded(CdcbridgeError):
    """Nothing that the program may do by itself helps: slot lost, other history, newer schema."""

    exit_code = 3


class DecodeError(OperatorNeeded):
    """The plugin's output is malformed, truncated or unknown.

    `plugin` names the output plugin, `offset` is the byte in the message where reading stopped, `lsn` is where
    the message stands in the WAL (None when it came from a file).
    """

    def __init__(self, plugin: str, reason: str, *, offset: int = 0, lsn: int | None = None) -> None:
        where = f"at byte {offset}" if lsn is None else f"at LSN {format_lsn(lsn)}, byte {offset}"
        super().__init__(f"{plugin}: {reason} ({where})")
        self.plugin = plugin
        self.reason = reason
        self.offset = offset
        self.lsn = lsn
