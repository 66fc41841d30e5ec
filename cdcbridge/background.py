"""Work beside the main loop: a thread from entry to exit of a `with` block. Knows nothing of what it does."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Self


class Background(ABC):
    """_work() goes on until `_stop` is set; whoever leaves the block waits a little for that."""

    def __init__(self, name: str) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    @abstractmethod
    def _work(self) -> None:
        """In the thread."""
