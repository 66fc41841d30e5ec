"""Keep the order of a batch of which a message failed: the messages that must wait for it are not delivered either.

Never delivers anything itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cdcbridge.sinks.target import Failure, Outgoing

WAITS: Final = Failure("an earlier message has to be delivered first")


def hold_back(batch: Sequence[Outgoing], failures: dict[int, Failure], *, in_order: bool) -> None:
    """Add a Failure for each message that must wait for a failed one.

    For example, message 2 of the key `42` failed. In a lane, all messages after it wait. In the modes `fifo` and
    `queue`, only the later messages of the key `42` wait.

    Args:
        batch: The messages.
        failures: The failures so far, by the index in the batch. Grows.
        in_order: True in a lane.
    """
    if not failures:
        return
    first = min(failures)
    keys = {batch[index].key for index in failures} - {None}
    seen: set[str | None] = set()
    for index in range(first, len(batch)):
        key = batch[index].key
        if index in failures:
            seen.add(key)
        elif in_order or (key in keys and key in seen):
            failures[index] = WAITS
