"""A host of its own for a process: a network namespace with a line to the source and one to the store, which can be cut.

A proxy would not do: its kernel goes on to answer for it, and what is tested is who notices that nobody answers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from typing import Self

_numbers = itertools.count(1)


class Host:
    """From entry to exit of its `with` block. `source` and `store`: two addresses of this machine, as seen from there."""

    def __init__(self) -> None:
        self._number = next(_numbers) % 100
        self.name = f"cb{os.getpid()}x{self._number}"
        self.source, self.store = (self._address(line, 1) for line in (0, 1))

    def _address(self, line: int, end: int) -> str:
        return f"10.{64 + os.getpid() % 128}.{2 * self._number + line}.{end}"

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self.name)
            for line in (0, 1):
                outside, inside = f"{self.name}o{line}", f"{self.name}i{line}"
                _ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", self.name)
                _ip("address", "add", f"{self._address(line, 1)}/24", "dev", outside)
                _ip("link", "set", outside, "up")
                _ip("-n", self.name, "address", "add", f"{self._address(line, 2)}/24", "dev", inside)
                _ip("-n", self.name, "link", "set", inside, "up")
            _ip("-n", self.name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for line in (0, 1):
            with contextlib.suppress(RuntimeError):
                _ip("link", "del", f"{self.name}o{line}")
        with contextlib.suppress(RuntimeError):
            _ip("netns", "del", self.name)

    @property
    def prefix(self) -> list[str]:
        """What runs a command there."""
        return ["ip", "netns", "exec", self.name]

    def route(self, address: str) -> None:
        """Let the host reach another address of this machine, over its line to the store."""
        _ip("-n", self.name, "route", "add", f"{address}/32", "via", self.store)

    def cut(self, *addresses: str) -> None:
        """Nothing comes through any more, in either direction, and nobody says so."""
        for address in addresses:
            _ip("link", "set", self._line(address), "down")

    def heal(self, *addresses: str) -> None:
        for address in addresses:
            _ip("link", "set", self._line(address), "up")

    def _line(self, address: str) -> str:
        return f"{self.name}o{(self.source, self.store).index(address)}"


def _ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {result.stderr.strip()}; it needs root and iproute2")
