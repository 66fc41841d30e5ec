"""The process of the sinks: it delivers the messages of all consumers of the file that have a sink.

It follows the file: a sink that was added, changed or removed is begun, begun anew or ended. Several such processes
share the work. Never reads the slot.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Final

import structlog

from cdcbridge.config import Config, Consumer
from cdcbridge.errors import CdcbridgeError, ConfigError, UsageError
from cdcbridge.sinks.pace import Backoff
from cdcbridge.sinks.parts import wait_for
from cdcbridge.sinks.runner import Runner
from cdcbridge.sinks.store import SinkStore

_FILE_EVERY: Final = 1.0  # seconds between two looks at the configuration file
_GRACE: Final = 10.0  # seconds that the process has to end beside the longest time limit of its sinks
_SWITCH: Final = 0.0005  # seconds after which the threads of the log and of the targets get the interpreter
_COLLECT_AFTER: Final = (50_000, 20, 20)  # objects, and collections of the younger generation
log = structlog.get_logger()


def with_sinks(config: Config, names: Collection[str] = ()) -> dict[str, Consumer]:
    """Return the consumers of the file that have a sink, by name.

    Args:
        config: The configuration.
        names: The names of the wanted consumers. Empty: all.

    Raises:
        UsageError: A name is not one of them, or the file has none.
    """
    found = {one.name: one for one in config.consumers if one.sink is not None}
    for name in names:
        if name not in found:
            known = ", ".join(sorted(found)) or "none"
            raise UsageError(f"{config.path} has no consumer {name!r} with a sink; it has: {known}")
    if not found:
        raise UsageError(f"{config.path} has no consumer with a sink", hint="docs/SINKS.md shows one of each type.")
    return {name: one for name, one in found.items() if not names or name in names}


class SinkProcess:
    """All sinks of a configuration file, in this process.

    Args:
        config: The configuration to begin with.
        reload: Returns the configuration as the file has it now.
        names: The consumers to deliver for. Empty: all that have a sink.
    """

    def __init__(self, config: Config, reload: Callable[[], Config], names: Collection[str] = ()) -> None:
        self._config = config
        self._reload = reload
        self._names = names
        self._member = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._runners: dict[str, tuple[Runner, asyncio.Task[None]]] = {}
        self._stopping = asyncio.Event()
        self._changed_at: float | None = None

    async def run(self, *, until_stdin_ends: bool = False) -> None:
        """Deliver until SIGTERM or SIGINT, and finish the batches in progress then.

        Args:
            until_stdin_ends: Also end when stdin ends, which is a pipe from the bridge. So the process ends with the
                bridge, however that ends.
        """
        _collect_less()
        sys.setswitchinterval(_SWITCH)
        loop = asyncio.get_running_loop()
        if until_stdin_ends:
            loop.add_reader(sys.stdin.fileno(), self._stdin_ended)  # nobody writes: it is readable at its end
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        log.info("sinks.started", member=self._member, consumers=sorted(with_sinks(self._config, self._names)))
        waker = asyncio.create_task(self._listen())
        try:
            while not self._stopping.is_set():
                self._follow()
                await wait_for(self._stopping, _FILE_EVERY)
        finally:
            self._end_at_the_latest()
            waker.cancel()
            for runner, _ in self._runners.values():
                runner.stop()
            await asyncio.gather(waker, *(task for _, task in self._runners.values()), return_exceptions=True)
        log.info("sinks.stopped")

    def _stdin_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())  # else the loop is woken all the time
        self._stopping.set()

    def _end_at_the_latest(self) -> None:
        """End this process even if a thread of a client library never ends.

        For example, librdkafka waits by the wall clock, and that may have been set back by a day. The batches in
        progress have ended by then, or their results are as unknown as after a kill.
        """
        limit = max((one.sink.timeout for one in self._config.consumers if one.sink is not None), default=0.0) + _GRACE
        timer = threading.Timer(limit, _give_up, [limit])
        timer.daemon = True
        timer.start()

    def _follow(self) -> None:
        """Begin, change and end runners as the file says now. A file that cannot be used is logged and not followed."""
        try:
            changed_at = self._config.path.stat().st_mtime
            if changed_at != self._changed_at:
                self._changed_at = changed_at
                self._config = self._reload()
        except (OSError, ConfigError) as error:
            log.warning("config.kept", error=str(error))
        wanted = {one.name: one for one in self._config.consumers if one.sink is not None}
        wanted = {name: one for name, one in wanted.items() if not self._names or name in self._names}
        for name, (runner, task) in list(self._runners.items()):
            if task.done():
                del self._runners[name]
                task.result()
            elif wanted.get(name) != runner.consumer:
                log.info("sinks.changed", consumer=name)
                runner.stop()
        for name, consumer in wanted.items():
            if name not in self._runners:
                runner = Runner(self._config, consumer, self._member)
                self._runners[name] = (runner, asyncio.create_task(runner.run()))

    async def _listen(self) -> None:
        """Wake the runners when messages arrive for their consumers. A lost session is opened again."""
        backoff = Backoff()
        while True:
            store = SinkStore(self._config.store_dsn, self._config.store.schema_, self._member)
            try:
                session = await store.listen()
                backoff.reset()
                async for heard in session.notifies():
                    self._wake(heard.payload)
            except CdcbridgeError:
                await asyncio.sleep(backoff.next())
            except Exception as error:  # noqa: BLE001 - psycopg's, when the session is lost
                log.debug("sinks.listen", error=str(error))
                await asyncio.sleep(backoff.next())
            finally:
                with suppress(Exception):
                    await store.close()

    def _wake(self, payload: str) -> None:
        ids = payload.split(",")
        for runner, _ in self._runners.values():
            if not payload or str(runner.consumer_id) in ids:
                runner.wake()


def _collect_less() -> None:
    """Look for cycles of objects less often.

    A batch has thousands of tuples, and no cycles. With Python's limits, the collector takes a fifth of the time.
    """
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


def _give_up(seconds: float) -> None:
    log.error("sinks.forced", seconds=seconds)
    os._exit(1)
