"""The sinks of the faults campaign: consumers with a sink of each kind, their targets, and the processes that deliver.

Everybody reaches a target through a proxy, which the campaign cuts, slows and silences. The targets are real servers.
Never looks into a message: tests.campaigns.sink_results does.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from cdcbridge.instants import SinkInstant
from tests.harness.brokers.http import Answer, HttpTarget, Request
from tests.harness.brokers.kafka import Kafka
from tests.harness.brokers.nats import Nats
from tests.harness.brokers.redis import Redis
from tests.harness.brokers.sqs import Ministack
from tests.harness.proxy import Proxy
from tests.harness.world import World, clean_environment
from tests.sinks.case import Case, Received
from tests.sinks.cases.file import FileCase
from tests.sinks.cases.http import HttpCase
from tests.sinks.cases.kafka import KafkaCase
from tests.sinks.cases.nats import NatsCase
from tests.sinks.cases.rabbitmq import RabbitmqStreamCase, steady_rabbitmq
from tests.sinks.cases.redis import RedisCase
from tests.sinks.cases.sqs import SqsCase

TABLES = ("public.pgbench_tellers", "public.probe")  # the ten keys of the first are changed all the time
PARTITIONS = 4
PROCESSES = 2  # `cdcbridge sinks run`, beside the children of the bridges
SETTINGS = {"max_deliveries": 10_000, "retry_delay": {"initial": "100ms", "max": "2s"}}


class Sink(NamedTuple):
    """A consumer, and its destination in a target. `target`: the key of the target, or None for a file.

    `seconds`: the time limit of an answer and of a claim. A slow target needs more of it.
    """

    name: str
    mode: str
    case: Case
    target: str | None
    seconds: int = 5


class Webhook(HttpCase):
    """A webhook that remembers what it has accepted, and refuses while `mood` says so."""

    def __init__(self, server: HttpTarget, name: str, chance: random.Random) -> None:
        super().__init__(server, name, batch=True)
        self._accepted: list[Received] = []
        self._chance = chance
        self.mood: Answer | str = "good"  # or "picky": it lists messages in `failed`
        server.otherwise = self._answer

    def _answer(self, request: Request) -> Answer:
        if isinstance(self.mood, Answer):
            return self.mood
        messages: list[dict[str, Any]] = json.loads(request.body)
        keys: set[str | None] = set()
        if self.mood == "picky":
            keys = {one["key"] for one in messages if self._chance.random() < 0.1}
        taken = [one for one in messages if one["key"] not in keys]
        self._accepted += [Received(one["id"], one["key"], b"", request.path) for one in taken]
        failed = [one["id"] for one in messages if one["key"] in keys]
        return Answer(body=json.dumps({"failed": failed}).encode())

    def received(self) -> list[Received]:
        return list(self._accepted)


class Sinks:
    """The targets from the beginning, the processes from start().

    Args:
        folder: The folder of the configuration files and the log.
        chance: The random numbers of the campaign.
        beside: Ends the servers and the processes.
        world: Gets a consumer for each sink.
        address: An address of this machine that the bridges on their hosts reach, too.
    """

    def __init__(
        self, folder: Path, chance: random.Random, beside: contextlib.ExitStack, world: World, address: str
    ) -> None:
        self._folder, self._world, self._address = folder, world, address
        self.servers: dict[str, Any] = {}
        self.proxies: dict[str, Proxy] = {}
        self.down: set[str] = set()  # targets that are ended, or starting
        self.forgetful: set[str] = set()  # targets that keep nothing when they are ended
        self.processes: list[subprocess.Popen[str]] = []
        self.deaths = 0  # at a named instant
        self.waits: dict[str, float] = {}  # the greatest age of an unfinished message that was seen
        self._ended = threading.Event()
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self.all = self._serve(chance, beside)
        beside.callback(self.close)

    def _serve(self, chance: random.Random, beside: contextlib.ExitStack) -> list[Sink]:
        """Start the targets, and declare the consumers.

        A run has Kafka, RabbitMQ or SQS. Together they need more than a machine has.
        """
        redis, nats, http = Redis(), Nats(), HttpTarget()
        servers: dict[str, Redis | Nats | HttpTarget] = {"redis": redis, "nats": nats, "webhook": http}
        for name, server in servers.items():
            self._add(name, server, server.port, beside)
            beside.enter_context(server)
        sinks = [
            Sink("to_file", "stream", FileCase(None, "faults"), None),
            Sink("to_redis", "stream", RedisCase(redis, "stream", partitions=PARTITIONS), "redis"),
            Sink("to_nats", "stream", NatsCase(nats, "faults"), "nats"),
            chance.choice([self._kafka, self._rabbitmq, self._sqs])(beside),
            Sink("to_webhook", "fifo", Webhook(http, "faults", chance), "webhook"),
            Sink("to_redis_queue", "queue", RedisCase(redis, "queue", partitions=PARTITIONS), "redis"),
        ]
        beside.callback(sinks[0].case.close)
        for sink in sinks:
            self.declare(sink, 100)
        return sinks

    def _kafka(self, beside: contextlib.ExitStack) -> Sink:
        server = Kafka()
        self._add("kafka", server, server.proxied_port, beside)
        own = f"PLAIN://127.0.0.1:{server.port},SASL://127.0.0.1:{server.sasl_port}"
        server.settings["advertised.listeners"] = f"{own},PROXIED://{self._through('kafka')}"
        beside.enter_context(server)
        return Sink("to_kafka", "stream", KafkaCase(server, "faults", partitions=PARTITIONS), "kafka")

    def _rabbitmq(self, beside: contextlib.ExitStack) -> Sink:
        server = beside.enter_context(steady_rabbitmq())
        self._add("rabbitmq", server, server.stream_port, beside)
        server.settings["stream.advertised_host"] = self._address
        server.settings["stream.advertised_port"] = str(self.proxies["rabbitmq"].port)
        server.restart()
        return Sink("to_rabbitmq", "stream", RabbitmqStreamCase(server, "faults"), "rabbitmq")

    def _sqs(self, beside: contextlib.ExitStack) -> Sink:
        """A FIFO queue of ministack, which takes a message once within five minutes, and forgets its queues at its end."""
        server = beside.enter_context(Ministack())
        self._add("sqs", server, server.port, beside)
        self.forgetful.add("sqs")
        return Sink("to_sqs", "fifo", SqsCase(server, "faults"), "sqs", seconds=20)

    def _add(self, name: str, server: Any, port: int, beside: contextlib.ExitStack) -> None:
        """Put a proxy in front of a target's port."""
        self.servers[name], self.proxies[name] = server, beside.enter_context(Proxy(port))

    def _through(self, target: str) -> str:
        return f"{self._address}:{self.proxies[target].port}"

    def declare(self, sink: Sink, batch: int) -> None:
        """Declare the consumer of a sink, with so many messages in a batch. Counts when the files are written."""
        found = json.dumps(sink.case.sink())
        if sink.target is not None:
            server = self.servers[sink.target]
            port = server.stream_port if sink.target == "rabbitmq" else server.port
            found = found.replace(f"127.0.0.1:{port}", self._through(sink.target))
        limit = f"{sink.seconds}s"
        settings: dict[str, Any] = {} if sink.mode == "stream" else {**SETTINGS, "visibility_timeout": limit}
        self._world.consumer(
            sink.name, TABLES, mode=sink.mode, **settings,
            sink={**json.loads(found), "timeout": limit, "batch": {"max_messages": batch}},
        )  # fmt: skip

    # processes

    def write_files(self, dsn: str, stores: Sequence[str]) -> None:
        """Write the file of each process, with the DSN of the source and those of the store as each one reaches it."""
        for number, store in enumerate(stores):
            self._world.settings["dsn"], self._world.store_dsn = dsn, store
            self._world.write_config().rename(self.file(number))

    def file(self, number: int) -> Path:
        return self._folder / f"sinks{number}.yaml"

    def start(self, number: int, crash: tuple[SinkInstant, int] | None = None) -> None:
        """Start a process. `crash`: the instant at which it dies, and the how manieth time."""
        program = ["cdcbridge"] if crash is None else ["tests.harness.crash", crash[0], str(crash[1]), "--"]
        with (self._folder / "sinks.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *program, "-c", str(self.file(number)), "sinks", "run"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, text=True, env=clean_environment(),
                start_new_session=True,
            )  # fmt: skip
        self.processes[number : number + 1] = [process]

    def kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()

    def command(self, *arguments: str) -> int:
        """Run `cdcbridge sinks …`, and return its exit code."""
        program = [sys.executable, "-m", "cdcbridge", "-c", str(self.file(0)), "sinks", *arguments]
        return subprocess.run(program, capture_output=True, check=False, env=clean_environment()).returncode

    # what takes long, beside the faults that follow

    def later(self, act: Callable[[], object]) -> None:
        """Act in a thread. An error is raised by finish()."""

        def run() -> None:
            try:
                act()
            except BaseException as error:
                self._failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def restart(self, target: str) -> None:
        """Start a target that was ended."""
        self.servers[target].start()
        self.down.discard(target)

    def watch(self, dsn: str) -> None:
        """Note every second how old the oldest unfinished message of each sink is."""
        query = b"select name, oldest_age_seconds from cdcbridge.consumer_lag() where oldest_age_seconds is not null"
        while not self._ended.wait(1):
            with contextlib.suppress(psycopg.Error), psycopg.connect(dsn, autocommit=True) as session:
                for name, seconds in session.execute(query).fetchall():
                    self.waits[name] = max(seconds, self.waits.get(name, 0.0))

    def finish(self) -> None:
        """Wait for what was begun by later(). Raise the first error of it."""
        for thread in self._threads:
            thread.join()
        for failure in self._failures:
            raise failure

    def close(self) -> None:
        self._ended.set()
        for process in self.processes:
            process.kill()
            process.wait()
