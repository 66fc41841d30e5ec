"""Measure everything and print the tables: python -m benchmarks [--quick].

The two programs of a comparison run on the same WAL in the same run, in turn and several times. Medians and ratios are
printed, and a JSON record is written to benchmarks/out/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from benchmarks import backfill, claims, decode, fan_out, latency, memory, mirrors, rest, routing, sinks, sqs, streams
from cdcbridge.demo.embedded import EmbeddedServer

DEBIAN_15 = Path(os.environ.get("CDCBRIDGE_TEST_PG15", "/usr/lib/postgresql/15/bin"))
PARTS = {
    "decode": decode,
    "fan-out": fan_out,
    "routing": routing,
    "latency": latency,
    "memory": memory,
    "claims": claims,
    "streams": streams,
    "backfill": backfill,
    "sinks": sinks,
    "sqs": sqs,
    "mirrors": mirrors,
    "rest": rest,
}
# Commits are durable, as in production. WAL files are recycled, so that no time is spent on creating new ones.
SETTINGS = {
    "shared_buffers": "1GB",
    "min_wal_size": "4GB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "30min",
    "track_commit_timestamp": "on",
}


def main() -> None:
    """Run all parts, or the one that --only names, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="small sizes and one run each: to see that it works")
    parser.add_argument("--only", choices=list(PARTS))
    options = parser.parse_args()
    record: dict[str, Any] = {"machine": machine(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    with EmbeddedServer(DEBIAN_15, settings=SETTINGS) as server:
        for name, part in PARTS.items():
            if options.only in (None, name):
                print(f"\n## {name}\n", flush=True)
                record[name] = part.measure(server, quick=options.quick)
    folder = Path(__file__).parent / "out"
    folder.mkdir(exist_ok=True)
    target = folder / f"{record['started'].replace(':', '')}.json"
    target.write_text(json.dumps(record, indent=2))
    print(f"\nrecord: {target.relative_to(Path.cwd())}")


def machine() -> dict[str, Any]:
    """Return a description of this machine for the record."""
    memory_kb = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory_kb) / 2**20, 1),
        "python": platform.python_version(),
        "system": platform.system() + " " + platform.release().split("-")[0],
    }


if __name__ == "__main__":
    main()
