"""Two servers that speak SQS: moto, whose rules are closer to AWS, and ministack, which is fast enough for load.

Both keep their queues in memory, so a restarted server is empty.
"""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from tests.harness.brokers.server import Server

REGION = "eu-central-1"
ONCE = Config(connect_timeout=2, read_timeout=30, retries={"total_max_attempts": 1})


class SqsServer(Server):
    """What both have: an address, and keys that a client signs with."""

    access_key, secret_key, region = "testing", "testing", REGION

    @property
    def url(self) -> str:
        """The endpoint_url of clients."""
        return f"http://{self.address}"

    @property
    def connection(self) -> dict[str, Any]:
        """What a client of boto3 or aiobotocore needs in addition to the service's name."""
        return {
            "endpoint_url": self.url,
            "region_name": self.region,
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
        }

    def client(self, service: str = "sqs") -> Any:
        """Return a client of boto3 that tries each request once. Close it."""
        return boto3.client(service, **self.connection, config=ONCE)

    def create_queue(self, name: str, **attributes: str) -> str:
        """Create a queue and return its URL. A name that ends in .fifo makes a FIFO queue."""
        if name.endswith(".fifo"):
            attributes["FifoQueue"] = "true"
        client = self.client()
        try:
            url: str = client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
            return url
        finally:
            client.close()

    def ask(self) -> None:
        client = self.client()
        try:
            client.list_queues()
        finally:
            client.close()


class Moto(SqsServer):
    """moto's server.

    Args:
        check_keys: Refuse requests that are not signed with the keys of `connection`.
    """

    name = "moto"

    def __init__(self, *, check_keys: bool = False) -> None:
        super().__init__()
        self._check_keys = check_keys

    def command(self) -> Sequence[str | Path]:
        return [sys.executable, "-m", "moto.server", "-H", self.host, "-p", str(self.port)]

    def start(self) -> None:
        self.access_key, self.secret_key = type(self).access_key, type(self).secret_key
        super().start()
        if self._check_keys:
            self._make_user()

    def _make_user(self) -> None:
        """Make a user who may do everything in SQS, and refuse everybody else from now on."""
        client = self.client("iam")
        client.create_user(UserName="bridge")
        policy = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sqs:*", "Resource": "*"}]}'
        client.put_user_policy(UserName="bridge", PolicyName="queues", PolicyDocument=policy)
        key = client.create_access_key(UserName="bridge")["AccessKey"]
        client.close()
        plain = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset-auth", b"0", plain)).close()
        self.access_key, self.secret_key = key["AccessKeyId"], key["SecretAccessKey"]


class Ministack(SqsServer):
    """ministack."""

    name = "ministack"

    def command(self) -> Sequence[str | Path]:
        return [sys.executable, "-m", "ministack"]

    def environment(self) -> Mapping[str, str]:
        return {"BIND_HOST": self.host, "GATEWAY_PORT": str(self.port), "IOT_MTLS_ENABLED": "0"}
