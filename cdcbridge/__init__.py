"""Turn the WAL of PostgreSQL into durable queues and streams, with no other server than PostgreSQL.

The package offers the Python clients by their names. Never imports them before they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdcbridge.client import (
        AsyncBatch,
        AsyncMessage,
        AsyncQueue,
        AsyncStream,
        Batch,
        LogMessage,
        Message,
        Queue,
        StaleReceipt,
        Stream,
    )

__version__ = "0.1.0"
__all__ = [
    "AsyncBatch",
    "AsyncMessage",
    "AsyncQueue",
    "AsyncStream",
    "Batch",
    "LogMessage",
    "Message",
    "Queue",
    "StaleReceipt",
    "Stream",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a client when it is first used, so that the command line starts without the clients."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cdcbridge import client

    return getattr(client, name)
