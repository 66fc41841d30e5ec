"""`run --serve`: the bridge has a process that answers the API. Neither harms the other, and both end together."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress

import httpx

from tests.harness.world import World, eventually
from tests.web.conftest import client
from tests.web.test_rest import publish, receive


def started(world: World) -> None:
    world.consumers = []
    world.consumer("billing", ("public.t",), topics=["t"])
    world.top_settings = {**world.top_settings, "api": {"listen": "127.0.0.1:0"}}
    world.start_process("--serve")


def api(world: World, number: int = 1) -> tuple[int, str]:
    """The pid and the URL of the API, when it listens for the nth time."""

    def look() -> tuple[int, str] | None:
        text = world.log()
        urls = re.findall(r"api\.listening\s+url=(\S+)", text)
        pids = re.findall(r"child\.started\s+command=serve pid=(\d+)", text)
        return (int(pids[number - 1]), urls[number - 1]) if len(urls) >= number else None

    found: tuple[int, str] = eventually(look, "the API listens")
    return found


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def check(world: World, http: httpx.Client) -> None:
    """A change of a table, and a message over HTTP."""
    before = len(receive(http, max_messages=1000))
    world.execute("insert into t values (default)")
    publish(http, {"data": before})
    assert eventually(lambda: len(receive(http, wait=5))) >= 1


def test_both_answer_and_end_together(world18: World) -> None:
    world18.execute("create table t (id int generated always as identity primary key)")
    started(world18)
    pid, url = api(world18)
    eventually(world18.active, "the bridge streams")
    with client(url) as http:
        check(world18, http)
    process = world18._processes[-1]
    process.terminate()
    assert process.wait(20) == 0
    assert not is_alive(pid)


def test_an_api_that_is_killed_is_back(world18: World) -> None:
    world18.execute("create table t (id int generated always as identity primary key)")
    started(world18)
    pid, _ = api(world18)
    eventually(world18.active, "the bridge streams")
    os.kill(pid, signal.SIGKILL)
    again, url = api(world18, 2)
    assert again != pid and world18._processes[-1].poll() is None
    with client(url) as http:
        check(world18, http)


def test_the_api_ends_with_a_bridge_that_is_killed(world18: World) -> None:
    world18.execute("create table t (id int generated always as identity primary key)")
    started(world18)
    pid, url = api(world18)
    world18._processes[-1].send_signal(signal.SIGKILL)
    eventually(lambda: not is_alive(pid), "the API ends")
    with client(url) as http:
        try:
            http.get("/live")
        except httpx.ConnectError:
            return
    raise AssertionError("it still answers")
