"""`cdcbridge`, whose threads have their names in the kernel as well: python -m tests.harness.named ARGUMENTS.

Read them in /proc/PID/task/TID/comm, whose first 15 bytes count. Threads without a name there were not made by Python.
"""

from __future__ import annotations

import threading
from pathlib import Path

from cdcbridge import cli

WIDTH = 15
_run = threading.Thread.run


def _named_run(thread: threading.Thread) -> None:
    Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(thread.name[:WIDTH])
    _run(thread)


def names(pid: int) -> list[str]:
    """The threads of a process that runs this; the first one is `main`."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found.append("main" if task.name == str(pid) else (task / "comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return sorted(found)


if __name__ == "__main__":
    threading.Thread.run = _named_run  # type: ignore[method-assign,assignment]
    cli.main()
