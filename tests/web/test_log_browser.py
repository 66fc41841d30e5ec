"""GET /api/log shows the messages of all consumers, page by page."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.harness.world import World
from tests.web.conftest import BILLING, TOKENS, VIEWER, client, declare, problem, serving
from tests.web.test_rest import publish


def browse(http: httpx.Client, **query: Any) -> tuple[list[int], int | None]:
    answer = http.get("/api/log", params=query)
    assert answer.status_code == 200, answer.text
    return [one["seq"] for one in answer.json()["messages"]], answer.json()["next"]


def test_pages_choose_by_topic_key_and_place(http: httpx.Client) -> None:
    seqs = [one["seq"] for n in range(5) for one in publish(http, {"key": f"k{n % 2}", "data": n})]
    other = publish(http, {"key": "k0", "data": 7}, topic="other")[0]["seq"]
    assert browse(http, limit=4) == ([other, *reversed(seqs[2:])], seqs[1])
    assert browse(http, **{"from": seqs[1]}) == ([seqs[1], seqs[0]], None)
    assert browse(http, key="k0") == ([other, seqs[4], seqs[2], seqs[0]], None)
    assert browse(http, topic="t", key="k0", order="oldest", limit=2) == ([seqs[0], seqs[2]], seqs[4])
    assert browse(http, topic="none") == ([], None)
    assert browse(http, **{"from": "-1h"}) == ([], None)
    assert browse(http, **{"from": "-1h", "order": "oldest"})[0] == [*seqs, other]
    message = http.get("/api/log", params={"limit": 1}).json()["messages"][0]
    assert message["data"]["record"] == 7
    assert set(message) == {"seq", "topic", "key", "data", "commit_lsn", "ordinal", "commit_time", "inserted_at"}


@pytest.mark.parametrize("query", [{"from": "soon"}, {"from": "9" * 30}, {"limit": 0}, {"order": "up"}, {"other": 1}])
def test_values_that_are_not_allowed(http: httpx.Client, query: dict[str, Any]) -> None:
    problem(http.get("/api/log", params=query), 422)


def test_a_token_of_some_consumers_sees_none_of_it(world18: World) -> None:
    declare(world18)
    with serving(world18, tokens=TOKENS) as url:
        with client(url, BILLING) as http:
            assert "its own consumers alone" in problem(http.get("/api/log"), 403)["detail"]
        with client(url, VIEWER) as http:
            assert browse(http) == ([], None)
