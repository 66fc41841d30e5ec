"""Read the samples of the last hours for charts.

Never reads more rows than there are minutes for each consumer.
"""

from __future__ import annotations

from itertools import pairwise
from time import monotonic
from typing import Final, NamedTuple

from cdcbridge.web.store import WebStore

_FRESH: Final = 30.0  # seconds
_ONE: Final = """
    select extract(epoch from minute)::float8, (figures ->> 'pending')::float8, (figures ->> 'in_flight')::float8,
           (figures ->> 'dead')::float8, (figures ->> 'oldest_age_seconds')::float8
    from samples where subject = %s order by minute"""
_SLOT: Final = """
    select extract(epoch from minute)::float8, (figures ->> 'retained_bytes')::float8,
           (figures ->> 'lag_seconds')::float8, (figures ->> 'last_seq')::float8
    from samples where subject = '' order by minute"""
# One sample in ten for the small charts, and those of the last ten minutes for the trend.
_ALL: Final = """
    select subject, array_agg(extract(epoch from minute)::float8 order by minute),
           array_agg((figures ->> 'pending')::float8 order by minute)
    from samples
    where subject <> '' and (extract(minute from minute)::int % 10 = 0 or minute > now() - interval '11 minutes')
    group by subject"""

_RATES: Final = "select name, per_second_in, per_second_out, seconds from consumer_rates(%s)"

Points = list[tuple[float, float | None]]  # the time in seconds since 1970, and the value


class ConsumerSamples(NamedTuple):
    """The samples of one consumer."""

    pending: Points
    in_flight: Points
    dead: Points
    oldest: Points


class Rates(NamedTuple):
    """Messages per second of one consumer in the last minutes.

    Attributes:
        arrived: Messages that arrived. None: unknown.
        finished: Messages that were acked or delivered by the sink. None: the consumer is a stream without a sink.
        seconds: The time in which both were measured.
    """

    arrived: float | None
    finished: float | None
    seconds: float


class SlotSamples(NamedTuple):
    """The samples of the slot. `rate` is the messages per minute that the log got."""

    retained: Points
    lag: Points
    rate: Points


async def consumer_samples(store: WebStore, name: str) -> ConsumerSamples:
    """Return the samples of a consumer."""
    rows = await store.rows(_ONE, (name,))
    return ConsumerSamples(*([(row[0], row[n]) for row in rows] for n in range(1, 5)))


async def rates_of(store: WebStore, name: str | None = None) -> dict[str, Rates]:
    """Return the rates of a consumer, or of all, by their names. A consumer without enough samples is missing."""
    return {row[0]: Rates(*row[1:]) for row in await store.rows(_RATES, (name,))}


async def slot_samples(store: WebStore) -> SlotSamples:
    """Return the samples of the slot."""
    rows = await store.rows(_SLOT)
    rates: Points = []
    for before, after in pairwise(rows[:-1]):  # the last minute is not complete
        known = before[3] is not None and after[3] is not None
        rates.append((after[0], max(0.0, after[3] - before[3]) / (after[0] - before[0]) * 60 if known else None))
    return SlotSamples([(row[0], row[1]) for row in rows], [(row[0], row[2]) for row in rows], rates)


class Sparks:
    """The samples for the small charts of all consumers, and their rates. Both are read at most twice a minute.

    Args:
        store: The sessions on the store.
    """

    def __init__(self, store: WebStore) -> None:
        self._store = store
        self._read_at = -_FRESH
        self._samples: dict[str, Points] = {}
        self._rates: dict[str, Rates] = {}

    async def samples(self) -> tuple[dict[str, Points], dict[str, Rates]]:
        """Return the waiting messages and the rates of each consumer, by its name."""
        if monotonic() - self._read_at > _FRESH:
            self._read_at = monotonic()
            rows = await self._store.rows(_ALL)
            self._samples = {name: list(zip(times, values, strict=True)) for name, times, values in rows}
            self._rates = await rates_of(self._store)
        return self._samples, self._rates
