"""Turn the WAL of PostgreSQL into durable queues and streams, with no other server than PostgreSQL.

The package offers the Python clients and their errors by their names. Never imports them before they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdcbridge.client import (
        AsyncBatch,
        AsyncMessage,
        AsyncQueue,
        AsyncStream,
        AsyncWorker,
        Batch,
        CdcbridgeError,
        ClientClosed,
        LogMessage,
        Message,
        Queue,
        Seq,
        StaleReceipt,
        Standing,
        StoreUnavailable,
        Stream,
        UnreadableData,
        UnusableHandler,
        UsageError,
        Worker,
    )

__version__ = "0.1.0"
__all__ = [
    "AsyncBatch",
    "AsyncMessage",
    "AsyncQueue",
    "AsyncStream",
    "AsyncWorker",
    "Batch",
    "CdcbridgeError",
    "ClientClosed",
    "LogMessage",
    "Message",
    "Queue",
    "Seq",
    "StaleReceipt",
    "Standing",
    "StoreUnavailable",
    "Stream",
    "UnreadableData",
    "UnusableHandler",
    "UsageError",
    "Worker",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a client when it is first used, so that the command line starts without the clients."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cdcbridge import client

    return getattr(client, name)
