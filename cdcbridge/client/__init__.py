"""Python clients: a queue or fifo consumer's messages, with and without asyncio."""

from cdcbridge.client._async import AsyncMessage, AsyncQueue
from cdcbridge.client._sync import Message, Queue
from cdcbridge.errors import StaleReceipt

__all__ = ["AsyncMessage", "AsyncQueue", "Message", "Queue", "StaleReceipt"]
