"""The rates of a consumer, which are differences between samples of figures that exist."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.harness.world import World
from tests.web.conftest import declare
from tests.web.test_rest import C, publish, receive

NOTE = """select cdcbridge_internal.note_measurement(json_build_object('slots', '[]'::json, 'consumers',
          (select json_agg(l) from cdcbridge.consumer_lag() l)))"""
OLDER = """update cdcbridge_internal.samples set minute = minute - make_interval(secs => %s),
           figures = figures || jsonb_build_object('at', (figures ->> 'at')::float8 - %s)"""


@pytest.fixture
def later(world18: World) -> Any:
    """A function that lets some seconds pass for all samples, and takes one more."""

    def sample(passed: float = 0) -> None:
        world18.sql.execute(OLDER, (passed, passed))
        world18.sql.execute("delete from cdcbridge_internal.measurements")
        world18.sql.execute(NOTE)

    return sample


def rates(http: httpx.Client, name: str = "billing") -> dict[str, float] | None:
    answer = http.get(f"/api/consumers/{name}")
    assert answer.status_code == 200, answer.text
    found: dict[str, float] | None = answer.json()["rates"]
    return found


def ack(http: httpx.Client, number: int) -> None:
    receipts = [one["receipt"] for one in receive(http, max_messages=number)]
    assert len(receipts) == number
    assert http.post(f"{C}/ack", json={"receipts": receipts}).json() == {"acked": number}


def test_messages_that_arrive_and_are_acked(world18: World, http: httpx.Client, later: Any) -> None:
    publish(http, *({"data": n} for n in range(50)))
    ack(http, 13)
    later()
    assert rates(http) is None, "one sample is not enough"
    publish(http, *({"data": n} for n in range(240)))
    ack(http, 137)
    later(120)
    found = rates(http)
    assert found is not None
    assert found["seconds"] == pytest.approx(120, abs=60), "the test itself takes some of the time"
    assert found["per_second_out"] * found["seconds"] == pytest.approx(137)
    assert found["per_second_in"] * found["seconds"] == pytest.approx(240)
    assert found["growth"] * found["seconds"] == pytest.approx(103)
    later(600)
    world18.sql.execute("delete from cdcbridge_internal.samples where minute > now() - interval '9 minutes'")
    assert rates(http) is None, "old samples tell nothing about now"


def test_a_stream_without_a_sink_has_no_rate_of_reading(http: httpx.Client, later: Any) -> None:
    later()
    later(120)
    found = rates(http, "audit")
    assert found is not None and found["per_second_out"] is None and found["per_second_in"] is None


def test_messages_that_become_dead_letters_did_not_leave(http: httpx.Client, later: Any) -> None:
    publish(http, *({"data": n} for n in range(20)))
    later()
    receipts = [one["receipt"] for one in receive(http, max_messages=20)]
    assert http.post(f"{C}/nack", json={"receipts": receipts, "dead": True}).json() == {"nacked": 20}
    later(120)
    found = rates(http)
    assert found is not None
    assert (found["per_second_in"], found["per_second_out"], found["growth"]) == (0, 0, 0)


@pytest.mark.parametrize("number", [1, 9, 10, 99, 100, 127, 1111])
def test_each_ack_is_counted_once(world18: World, number: int) -> None:
    declare(world18)
    id_ = world18.value("select id from cdcbridge.consumers where name = 'billing'")
    count = f"select cdcbridge_internal.acked_messages({id_})"
    world18.sql.execute("set search_path = cdcbridge, cdcbridge_internal")
    before = world18.value(count)
    world18.sql.execute(f"select count_acked({id_}, {number})".encode())
    world18.sql.execute(f"select count_acked({id_}, {number})".encode())
    assert world18.value(count) == before + 2 * number
