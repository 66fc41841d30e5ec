"""Reach the destinations of sinks, and list the problems of each one, with their fixes.

Never delivers a message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from cdcbridge.config import Config, Consumer
from cdcbridge.errors import UsageError
from cdcbridge.problem import Problem
from cdcbridge.sinks.target import Lane
from cdcbridge.sinks.targets import target_class

_LONGEST = 30.0  # seconds for the answer of one destination
_UNREACHABLE = "Start the destination, or correct its address. Also check the network."


def check_sinks(config: Config, consumers: Iterable[Consumer]) -> list[Problem]:
    """Return the problems of the sinks, each with the name of its consumer and a fix."""
    found: list[Problem] = []
    for consumer in consumers:
        for problem in _check(config, consumer):
            fix = problem.fix or (_UNREACHABLE if problem.code == "sink_unreachable" else "")
            found.append(replace(problem, object=consumer.name, fix=fix))
    return found


def _check(config: Config, consumer: Consumer) -> list[Problem]:
    sink = consumer.needed_sink
    try:
        adapter = target_class(sink)
    except UsageError as error:
        return [Problem("sink_package", "error", consumer.name, str(error), error.hint or "")]
    lane = None
    if consumer.mode == "stream":
        # A system of its own, so that the check fences no process that delivers.
        lane = Lane(consumer.name, "check", 0, adapter.lanes(sink, config.store.partitions))

    async def run() -> list[Problem]:
        try:
            async with asyncio.timeout(min(_LONGEST, sink.timeout)):
                return list(await adapter(sink, lane).check())
        except TimeoutError:
            message = f"no answer within {min(_LONGEST, sink.timeout):g} s"
            return [Problem("sink_unreachable", "error", consumer.name, message, "")]

    return asyncio.run(run())
