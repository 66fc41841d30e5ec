"""One request of a client of SQS, for the function of its action.

Never knows a protocol: parameters and answers have the form of the JSON protocol.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

from cdcbridge.web.access import Action, Caller
from cdcbridge.web.audit import audited
from cdcbridge.web.calls import Services
from cdcbridge.web.sqs.directory import ACCOUNT, Directory, NamedQueue, consumers_of, name_in_url
from cdcbridge.web.sqs.requests import Given
from cdcbridge.web.store import WebStore

SqsAnswer: TypeAlias = Mapping[str, Any]


@dataclass(slots=True, frozen=True)
class SqsCall:
    """One request.

    Attributes:
        services: The store, the settings and the other parts that serve all calls.
        directory: The queues.
        caller: The access key's token, with its rights.
        action: For example PurgeQueue.
        given: The parameters.
        base: The address that the caller uses, for example http://127.0.0.1:9188.
        region: The region of the caller's signature.
        address: The caller's IP address.
        gone: Returns whether the caller has disconnected.
    """

    services: Services
    directory: Directory
    caller: Caller
    action: str
    given: Given
    base: str
    region: str
    address: str
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
        # Before the look: the answer must not tell whether the consumer of another caller exists.
        self.caller.refuse(action, next(filter(self.caller.sees, consumers_of(name)), name))
        found = await self.directory.find(name)
        self.caller.refuse(action, found.consumer)
        return found

    def audited(self, queue: NamedQueue, details: Mapping[str, Any]) -> AbstractAsyncContextManager[dict[str, Any]]:
        """Return a `with` block for a change, with a row in the audit log. The caller must have the right for it.

        Args:
            queue: The queue that changes.
            details: The checked values of the change. Other parameters of the request may be a signature.
        """
        return audited(self.store, self.caller, self.address, self.action, queue.name, details)

    def url(self, name: str) -> str:
        """Return the URL of a queue."""
        return f"{self.base}/{ACCOUNT}/{name}"

    def arn(self, name: str) -> str:
        """Return the ARN of a queue."""
        return f"arn:aws:sqs:{self.region}:{ACCOUNT}:{name}"
