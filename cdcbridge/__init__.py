"""cdcbridge: PostgreSQL's own WAL as durable queues, with PostgreSQL alone."""

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
    """The clients, when they are asked for: the command line starts without them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cdcbridge import client

    return getattr(client, name)
