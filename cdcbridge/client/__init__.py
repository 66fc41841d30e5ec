"""Python clients: a queue or fifo consumer's messages, a stream consumer's log, with and without asyncio."""

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
