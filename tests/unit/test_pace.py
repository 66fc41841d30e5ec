"""When a sink may deliver next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.sinks.pace import Backoff, Rate


def test_the_waiting_times_double_up_to_thirty_seconds_and_begin_anew() -> None:
    backoff = Backoff()
    bounds = [0.1 * 2**n for n in range(9)] + [30.0] * 30
    for bound in bounds:
        assert min(bound, 30) / 2 <= backoff.next() <= min(bound, 30)
    backoff.reset()
    assert backoff.next() <= 0.1


def test_a_time_that_the_target_named_is_kept() -> None:
    assert Backoff().next(at_least=7.5) == 7.5


@given(st.floats(1, 10_000), st.lists(st.integers(1, 100), min_size=2, max_size=50))
def test_a_rate_is_never_exceeded(limit: float, batches: list[int]) -> None:
    rate = Rate(limit)
    now = 0.0
    for messages in batches:
        now += rate.wait(messages, now)
    assert now >= sum(batches[:-1]) / limit * 0.999


def test_processes_share_a_rate() -> None:
    rates = [Rate(100), Rate(100)]
    for rate, part in zip(rates, (0.75, 0.25), strict=True):
        rate.share(part)
    assert [rate.most for rate in rates] == [75, 25]
    assert [rate.wait(75, 0.0) + rate.wait(1, 0.0) for rate in rates] == [1.0, 3.0]
    rates[0].share(0)  # its last lane has gone to the other process
    assert rates[0].most == 75
    unlimited = Rate(None)
    unlimited.share(0.5)
    assert unlimited.most is None


def test_without_a_rate_nothing_waits() -> None:
    rate = Rate(None)
    assert rate.most is None and [rate.wait(10**6, 0.0) for _ in range(3)] == [0.0] * 3
    assert Rate(0.5).most == 1
