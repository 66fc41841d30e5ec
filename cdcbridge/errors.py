"""Every error that cdcbridge raises on purpose, and the exit code of each.

An error names the failure, the value that caused it, and the next step. The command line turns it into a message on
stderr and an exit code. Never knows sockets, databases or terminals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from cdcbridge.lsn import format_lsn


class CdcbridgeError(Exception):
    """The base of all errors of cdcbridge. Raised itself, it is a failure that a retry may fix.

    Attributes:
        hint: The next step for the user, or None.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(CdcbridgeError):
    """Invalid input, such as a wrong option, an unknown name or an unreadable file."""

    exit_code = 2


class ConfigError(UsageError):
    """An unusable configuration. The message names the file and the path of the value in it."""


class CheckFailed(UsageError):
    """Errors that `check` found and for which `run` refuses to start. `problems` lists them."""

    def __init__(self, message: str, problems: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class RevertRefused(UsageError):
    """Changes that `cdcbridge revert` does not undo, because a row before is not known, or the rows changed since.

    Nothing was changed.
    """


class BehindPooler(UsageError):
    """A connection pooler between the bridge and a server, which would share the bridge's sessions with others."""


class SourceUnavailable(CdcbridgeError):
    """The source database cannot be reached, or closed the connection. The caller should try again."""


class SentTooEarly(SourceUnavailable):
    """A transaction in progress from which the logical messages that were rolled back cannot be removed.

    The bridge starts again, and from then on the server has to send each transaction as a whole after its commit.
    """


class CaptureChanged(SourceUnavailable):
    """A publication, or a table that a consumer names, has changed, so changes may be missing.

    The bridge starts again and sends the consumers a gap message.
    """


class TableLocked(SourceUnavailable):
    """A publication that cannot be changed yet, because another session holds a lock on one of its tables."""


class IdentityLost(SourceUnavailable):
    """A table that a consumer names has lost its replica identity.

    The bridge starts again without the table, and informs the consumers of the table.
    """


class Unpublished(SourceUnavailable):
    """The next WAL cannot be decoded, because a publication did not exist when it was written."""


class SlotInUse(SourceUnavailable):
    """Another session streams from the slot. The slot is free when that session has ended."""


class StoreUnavailable(CdcbridgeError):
    """The store's database cannot be reached, or closed the connection. The caller should try again."""


class TargetUnavailable(CdcbridgeError):
    """The target of a mirror cannot be reached, or closed the connection. The caller should try again."""


class LockedOut(StoreUnavailable):
    """Another session has held a lock for too long, so nothing was changed.

    The message names that session.
    """


class StaleReceipt(CdcbridgeError):
    """A delivery that the caller no longer holds.

    Its visibility timeout has passed, or it was acked or given back before.
    """


class UnreadableData(UsageError, ValueError):
    """A message whose data is JSON that Python cannot represent, such as 5,000 nested lists."""


class UnusableHandler(UsageError, TypeError):
    """A worker's handler that would not run when called, such as an `async def` function for a synchronous client."""


class ClientClosed(UsageError):
    """A call on a client that was closed. connect() makes a new client."""


class NotLeader(CdcbridgeError):
    """Another bridge leads or has taken over, so this one must not write."""


class Fenced(NotLeader):
    """The epoch has ended, because another bridge leads or the consumers have changed.

    The bridge starts again from the state in the store.
    """


class OperatorNeeded(CdcbridgeError):
    """A failure that only an operator can fix, such as a lost slot, another history or a newer schema."""

    exit_code = 3


class DecodeError(OperatorNeeded):
    """Output of the plugin that is malformed, truncated or unknown.

    Attributes:
        plugin: The name of the output plugin.
        reason: The failure, without the place.
        offset: The byte at which reading stopped, counted from the start of the message or of the input file.
        lsn: The LSN of the message in the WAL, or None if it was read from a file.
    """

    def __init__(self, plugin: str, reason: str, *, offset: int = 0, lsn: int | None = None) -> None:
        where = f"at byte {offset}" if lsn is None else f"at LSN {format_lsn(lsn)}, byte {offset}"
        super().__init__(f"{plugin}: {reason} ({where})")
        self.plugin = plugin
        self.reason = reason
        self.offset = offset
        self.lsn = lsn
