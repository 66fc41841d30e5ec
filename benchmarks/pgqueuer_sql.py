"""pgqueuer's own SQL: run by a Python that has pgqueuer, and nothing of ours. Prints JSON: install, dequeue, log_job."""

from __future__ import annotations

import json
from datetime import timedelta
from importlib import import_module
from typing import Any
from uuid import UUID


def main() -> None:
    """Its queries for one entry point `q` without limits, which is the fastest of its shapes."""
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
