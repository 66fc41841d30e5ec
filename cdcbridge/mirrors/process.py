"""The process of the mirrors: a thread for each mirror of the file.

It follows the file: a mirror that was added, changed or removed is begun, begun anew or ended. Never reads the slot.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection
from typing import Final

import structlog

from cdcbridge.background import Background
from cdcbridge.config import Config, Mirror
from cdcbridge.errors import ConfigError, UsageError
from cdcbridge.mirrors.applier import Applier

_FILE_EVERY: Final = 1.0  # seconds between two looks at the configuration file
_PATIENCE: Final = 20.0  # seconds for the transactions in progress at the end
log = structlog.get_logger()


def mirrors_of(config: Config, names: Collection[str] = ()) -> dict[str, Mirror]:
    """Return the mirrors of the file, by name.

    Args:
        config: The configuration.
        names: The names of the wanted mirrors. Empty: all.

    Raises:
        UsageError: A name is not one of them, or the file has none.
    """
    found = {one.name: one for one in config.mirrors}
    for name in names:
        if name not in found:
            raise UsageError(f"{config.path} has no mirror {name!r}; it has: {', '.join(sorted(found)) or 'none'}")
    if not found:
        raise UsageError(f"{config.path} has no mirrors", hint="docs/MIRRORS.md shows one.")
    return {name: one for name, one in found.items() if not names or name in names}


class _StdinWatch(Background):
    """A thread that calls a function when stdin ends, which is a pipe from the bridge."""

    def __init__(self, ended: Callable[[], None]) -> None:
        super().__init__("stdin")
        self._ended = ended

    def _work(self) -> None:
        os.read(0, 1)  # nobody writes, so this returns at the end
        self._ended()


class MirrorProcess:
    """All mirrors of a configuration file, in this process.

    Args:
        config: The configuration to begin with.
        reload: Returns the configuration as the file has it now.
        names: The mirrors to apply. Empty: all.
    """

    def __init__(self, config: Config, reload: Callable[[], Config], names: Collection[str] = ()) -> None:
        self._config = config
        self._reload = reload
        self._names = names
        self._stopping = threading.Event()
        self._appliers: dict[str, Applier] = {}
        self._changed_at: float | None = None

    def run(self, *, until_stdin_ends: bool = False) -> None:
        """Apply until SIGTERM or SIGINT, and finish the transactions in progress then.

        Args:
            until_stdin_ends: Also end when stdin ends, which is a pipe from the bridge. So the process ends with the
                bridge, however that ends.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stopping.set())
        if until_stdin_ends:
            _StdinWatch(self._stopping.set).start()
        log.info("mirrors.started", mirrors=sorted(mirrors_of(self._config, self._names)))
        try:
            while not self._stopping.is_set():
                self._follow()
                self._stopping.wait(_FILE_EVERY)
        finally:
            for applier in self._appliers.values():
                applier.stop()
            for applier in self._appliers.values():
                applier.join(_PATIENCE)
        log.info("mirrors.stopped")

    def _follow(self) -> None:
        """Begin, change and end appliers as the file says now. A file that cannot be used is logged, not followed."""
        try:
            changed_at = self._config.path.stat().st_mtime
            if changed_at != self._changed_at:
                self._changed_at = changed_at
                self._config = self._reload()
        except (OSError, ConfigError) as error:
            log.warning("config.kept", error=str(error))
        wanted = {one.name: one for one in self._config.mirrors if not self._names or one.name in self._names}
        for name, applier in list(self._appliers.items()):
            if wanted.get(name) != applier.mirror:
                log.info("mirror.changed", mirror=name)
                applier.stop()
                if applier.join(0):
                    del self._appliers[name]
            elif applier.join(0):
                del self._appliers[name]  # it failed, and the failure is in the log
        for name, mirror in wanted.items():
            if name not in self._appliers:
                self._appliers[name] = Applier(self._config, mirror)
                self._appliers[name].start()
