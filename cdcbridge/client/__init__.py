"""Python clients of queue, fifo and stream consumers, each with and without asyncio.

Queue and AsyncQueue receive the messages of a queue or fifo consumer. Stream and AsyncStream read the log for a stream
consumer. The clients need only connections and errors: they never import `cdcbridge.changes`, `cdcbridge.config` or
`cdcbridge.routing`.
"""

from cdcbridge.client._async import AsyncQueue
from cdcbridge.client._common import LogMessage
from cdcbridge.client._settling import Message
from cdcbridge.client._settling_async import AsyncMessage
from cdcbridge.client._stream import Batch, Stream
from cdcbridge.client._stream_async import AsyncBatch, AsyncStream
from cdcbridge.client._sync import Queue
from cdcbridge.errors import StaleReceipt

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
]
