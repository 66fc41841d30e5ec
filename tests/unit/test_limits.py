"""How long an exchange of a client may take."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from cdcbridge.client._limits import NoAnswer, limited, now


def test_an_exchange_ends_where_the_server_is_silent_and_not_where_it_is_slow() -> None:
    def steps() -> Generator[str, int, int]:
        got: list[int] = []
        while len(got) < 3:
            if ready := (yield "read"):
                got.append(ready)
        return sum(got)

    assert _run(limited(steps(), 60), [1, 0, 1, 1]) == 3
    with pytest.raises(NoAnswer, match="no answer within 0 s"):
        _run(limited(steps(), 0), [1, 0, 0, 0])
    assert _run(limited(iter(()), 1), []) is None  # type: ignore[arg-type]
    assert now() <= now()


def _run(steps: Generator[Any, Any, Any], answers: list[int]) -> Any:
    try:
        next(steps)
        for answer in answers:
            steps.send(answer)
    except StopIteration as end:
        return end.value
    raise AssertionError("it goes on")
