"""Python clients of queue, fifo and stream consumers, each with and without asyncio.

Queue and AsyncQueue receive the messages of a queue or fifo consumer. Stream and AsyncStream read the log for a stream
consumer. The clients need only connections and errors: they never import `cdcbridge.changes`, `cdcbridge.config` or
`cdcbridge.routing`.
"""

from cdcbridge.client._async import AsyncQueue
from cdcbridge.client._common import LogMessage, Seq, Standing
from cdcbridge.client._settling import Message
from cdcbridge.client._settling_async import AsyncMessage
from cdcbridge.client._stream import Batch, Stream
from cdcbridge.client._stream_async import AsyncBatch, AsyncStream
from cdcbridge.client._sync import Queue
from cdcbridge.client._worker import Worker
from cdcbridge.client._worker_async import AsyncWorker
from cdcbridge.errors import (
    CdcbridgeError,
    ClientClosed,
    StaleReceipt,
    StoreUnavailable,
    UnreadableData,
    UnusableHandler,
    UsageError,
)

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
]
