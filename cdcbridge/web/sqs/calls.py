"""One request of a client of SQS, for the function of its action.

Never knows a protocol: parameters and answers have the form of the JSON protocol.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from cdcbridge.web.access import Action, Caller
from cdcbridge.web.calls import Services
from cdcbridge.web.sqs.directory import ACCOUNT, Directory, NamedQueue, name_in_url
from cdcbridge.web.sqs.requests import Given
from cdcbridge.web.store import WebStore

SqsAnswer: TypeAlias = Mapping[str, Any]


@dataclass(slots=True, frozen=True)
class SqsCall:
    """One request.

    Attributes:
        services: What all calls share.
        directory: The queues.
        caller: Who calls.
        given: The parameters.
        base: The address that the caller uses, for example http://127.0.0.1:9188.
        region: The region of the caller's signature.
        gone: Returns whether the caller has disconnected.
    """

    services: Services
    directory: Directory
    caller: Caller
    given: Given
    base: str
    region: str
    gone: Callable[[], Awaitable[bool]]

    @property
    def store(self) -> WebStore:
        return self.services.store

    async def queue(self, action: Action) -> NamedQueue:
        """Return the queue that the parameter QueueUrl names, if the caller may do this with it.

        Args:
            action: The right that the call needs.
        """
        return await self.named(name_in_url(self.given.text("QueueUrl")), action)

    async def named(self, name: str, action: Action) -> NamedQueue:
        """Return the queue of this name, if the caller may do this with it."""
        self.caller.refuse(action)
        found = await self.directory.find(name)
        self.caller.refuse(action, found.consumer)
        return found

    def url(self, name: str) -> str:
        """Return the URL of a queue."""
        return f"{self.base}/{ACCOUNT}/{name}"

    def arn(self, name: str) -> str:
        """Return the ARN of a queue."""
        return f"arn:aws:sqs:{self.region}:{ACCOUNT}:{name}"
