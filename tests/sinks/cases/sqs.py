"""A FIFO queue, or a standard queue."""

from __future__ import annotations

import os
from typing import Any

from tests.harness.brokers.sqs import SqsServer
from tests.harness.proxy import Proxy
from tests.sinks.case import Case, Received


class SqsCase(Case):
    """A queue. The sink finds its credentials in the environment, which the case sets."""

    type = "sqs"
    exactly_once = False

    def __init__(
        self, server: SqsServer, name: str, *, partitions: int = 4, fifo: bool = True, proxy: Proxy | None = None
    ) -> None:
        self.server = server
        self.endpoint = server.url if proxy is None else f"http://127.0.0.1:{proxy.port}"
        self.queue = server.create_queue(f"{name}.fifo" if fifo else name)
        os.environ.update(AWS_ACCESS_KEY_ID=server.access_key, AWS_SECRET_ACCESS_KEY=server.secret_key)
        self._found: list[Received] = []

    def sink(self) -> dict[str, Any]:
        return {
            "type": "sqs", "queue_url": self.queue, "endpoint_url": self.endpoint, "region": self.server.region
        }  # fmt: skip

    def received(self) -> list[Received]:
        client = self.server.client()
        try:
            while found := client.receive_message(
                QueueUrl=self.queue, MaxNumberOfMessages=10, MessageAttributeNames=["All"], AttributeNames=["All"],
                VisibilityTimeout=600,
            ).get("Messages"):  # fmt: skip
                for one in found:
                    named = one["MessageAttributes"]["cdcbridge-id"]["StringValue"]
                    key = one["Attributes"].get("MessageGroupId")
                    self._found.append(Received(named, key, one["Body"].encode(), self.queue))
                    client.delete_message(QueueUrl=self.queue, ReceiptHandle=one["ReceiptHandle"])
        finally:
            client.close()
        return list(self._found)

    def close(self) -> None:
        client = self.server.client()
        client.delete_queue(QueueUrl=self.queue)
        client.close()
