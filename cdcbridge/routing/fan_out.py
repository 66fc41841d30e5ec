"""Turn a batch's fan-out into rows for COPY: which consumer gets which messages, with which keys.

Rows for queue consumers may leave the keys to the log. Rows for fifo consumers always have the keys. A truncate for
them is in a row of its own, because it is a barrier. The module is pure and never decides which consumer gets a
message.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from cdcbridge.routing.batch import AppendBatch
from cdcbridge.routing.copy_format import chunk_rows


def waiting_rows(batch: AppendBatch, first: int) -> bytes:
    """Return rows for COPY waiting (CHUNK_COLUMNS) for the fan-out of a batch.

    Fifo consumers do not get their barriers and delayed messages here: `barrier_rows()` returns the barriers, and the
    store inserts the delayed messages. The batch lists no delayed message of a queue consumer in its groups. `first` is
    the seq of the batch's first row.
    """
    rows = []
    appended = len(batch.rows)
    # A row of many messages must not extend beyond a message that has a row of its own.
    alone = set(batch.barriers) | {index for _, index, _, _ in batch.later}
    for consumers, indexes, keys in _parts(batch):
        plain = tuple(c for c in consumers if c not in batch.in_order)
        if plain:
            rows.append(chunk_rows(plain, [first + i for i in indexes], keys, appended))
        ordered = tuple(c for c in consumers if c in batch.in_order)
        if ordered:
            own = [batch.keys[i] for i in indexes] if keys is None else keys
            for piece, piece_keys in between(indexes, own, alone):
                rows.append(chunk_rows(ordered, [first + i for i in piece], piece_keys, appended))
    return b"".join(rows)


def barrier_rows(batch: AppendBatch, first: int) -> list[tuple[int, int]]:
    """Return (consumer id, seq) of each barrier that a fifo consumer gets."""
    if not batch.barriers:
        return []
    barriers = set(batch.barriers)
    return [
        (consumer, first + index)
        for consumers, indexes, _ in _parts(batch)
        for consumer in consumers
        if consumer in batch.in_order
        for index in indexes
        if index in barriers
    ]


def between(
    numbers: Sequence[int], keys: Sequence[str | None], barriers: Collection[int]
) -> Iterator[tuple[list[int], list[str | None]]]:
    """Yield the runs of messages that have no barrier between them, as (numbers, keys), without the barriers.

    For example, the messages 1, 2, 3, 4 with the barrier 3 make the runs [1, 2] and [4].
    """
    start = 0
    for place, number in enumerate(numbers):
        if number in barriers:
            if place > start:
                yield list(numbers[start:place]), list(keys[start:place])
            start = place + 1
    if start < len(numbers):
        yield list(numbers[start:]), list(keys[start:])


def _parts(batch: AppendBatch) -> Iterator[tuple[tuple[int, ...], list[int], list[str | None] | None]]:
    """Yield (consumer ids, indexes of their messages, their own keys or None).

    A consumer that is in several groups gets its messages once, in order.
    """
    merged: dict[int, list[int]] = {}
    seen: set[int] = set()
    repeated = {c for group in batch.groups for c in group if c in seen or seen.add(c)}  # type: ignore[func-returns-value]
    for group, indexes in batch.groups.items():
        alone = tuple(consumer for consumer in group if consumer not in repeated)
        if alone:
            yield alone, indexes, None
        for consumer in group:
            if consumer in repeated:
                merged.setdefault(consumer, []).extend(indexes)
    for consumer, indexes in merged.items():
        yield (consumer,), sorted(indexes), None
    for consumer, (indexes, keys) in batch.keyed.items():
        yield (consumer,), indexes, keys
