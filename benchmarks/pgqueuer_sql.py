"""Print pgqueuer's own SQL as JSON with the keys install, dequeue and log_job.

The Python that runs this has pgqueuer, but not cdcbridge.
"""

from __future__ import annotations

import json
from datetime import timedelta
from importlib import import_module
from typing import Any
from uuid import UUID


def main() -> None:
    """Print the queries for one entry point `q` without limits, which are the fastest that pgqueuer builds."""
    queries: Any = import_module("pgqueuer.adapters.persistence.qb")
    builder = queries.QueryQueueBuilder()
    dequeue = builder.build_dequeue_query(
        batch_size=1,
        entrypoints=["q"],
        concurrency_limits=[0],
        queue_manager_id=UUID(int=1),
        global_concurrency_limit=None,
        heartbeat_timeout=timedelta(seconds=30),
    )
    install = queries.QueryBuilderEnvironment().build_install_query()
    print(json.dumps({"install": install, "dequeue": dequeue.sql, "log_job": builder.build_log_job_query()}))


if __name__ == "__main__":
    main()
