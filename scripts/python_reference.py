"""Print docs/PYTHON.md, made from the docstrings of the clients: python -m scripts.python_reference."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import cdcbridge

HEAD = """# Python clients

<!-- Made by `python -m scripts.python_reference` from the docstrings. `make docs` runs it, and a test compares. -->

This page is for looking up a method of the Python clients. [docs/CONSUMERS.md](CONSUMERS.md) and
[docs/STREAMS.md](STREAMS.md) explain how to use them.

```python
from cdcbridge import Queue

with Queue.connect("postgresql://app@db/shop", "billing") as queue:
    for message in queue.messages(wait=20):
        with message:
            print(message.topic, message.data)
```

This page shows everything that the package `cdcbridge` exports. A name that begins with an underscore is not for users.

`AsyncQueue`, `AsyncMessage`, `AsyncWorker`, `AsyncStream` and `AsyncBatch` are the twins for asyncio. Their methods are
the same, with `await`, `async for` and `async with`.
"""
MEMBERS: dict[type, tuple[str, ...]] = {
    cdcbridge.Queue: ("connect", "receive", "messages", "worker", "publish", "ack", "nack", "extend", "stop", "close"),
    cdcbridge.Message: ("data", "ack", "nack", "extend"),
    cdcbridge.Worker: ("run",),
    cdcbridge.Seq: (),
    cdcbridge.Stream: ("connect", "read", "messages", "batches", "commit", "seek", "offsets", "stop", "close"),
    cdcbridge.Batch: ("commit", "extend", "release"),
    cdcbridge.LogMessage: ("data",),
    cdcbridge.Standing: (),
    cdcbridge.CdcbridgeError: (),
    cdcbridge.StaleReceipt: (),
    cdcbridge.StoreUnavailable: (),
    cdcbridge.UsageError: (),
    cdcbridge.ClientClosed: (),
    cdcbridge.UnreadableData: (),
    cdcbridge.UnusableHandler: (),
}
_PARTS = ("Args", "Returns", "Raises", "Yields", "Attributes", "Example", "Examples")
_ENTRY = re.compile(r"(\*{0,2}\w+): (.*)")


def markdown(docstring: str) -> Iterator[str]:
    """Yield the lines of a docstring as Markdown, with a list for each of its sections."""
    part = ""
    for line in inspect.cleandoc(docstring).splitlines():
        entry = _ENTRY.fullmatch(line.strip())
        indent = len(line) - len(line.lstrip())
        if line.rstrip(":") in _PARTS and line.endswith(":"):
            part = line.rstrip(":")
            yield f"\n**{'Parameters' if part == 'Args' else part}**\n"
        elif part and line and not indent:
            part = ""
            yield line
        elif part and entry and indent == 4:
            yield f"- `{entry[1]}`: {entry[2]}"
        elif part:
            yield "  " * (indent > 4) + line.strip()
        else:
            yield line


def member(of: type, name: str) -> Any:
    """Return a method or property as the class that defines it wrote it."""
    found = inspect.getattr_static(of, name)
    return found.__func__ if isinstance(found, classmethod | staticmethod) else found


def heading(of: type, name: str) -> str:
    """Return the heading of a member, with the names of its parameters."""
    found = member(of, name)
    if isinstance(found, property):
        return f"{of.__name__}.{name}"
    parameters: list[str] = []
    for parameter in list(inspect.signature(found).parameters.values())[1:]:
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        star = (
            "*"
            if parameter.kind is parameter.VAR_POSITIONAL
            else "**"
            if parameter.kind is parameter.VAR_KEYWORD
            else ""
        )
        if parameter.kind is parameter.KEYWORD_ONLY and not any(one.startswith("*") for one in parameters):
            parameters.append("*")
        parameters.append(f"{star}{parameter.name}{default}")
    return f"{of.__name__}.{name}({', '.join(parameters)})"


def section(level: int, title: str, docstring: str) -> str:
    """Return a heading and the docstring below it."""
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(markdown(docstring))).rstrip()
    return f"\n{'#' * level} {title}\n\n{text}\n"


def reference() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for of, names in MEMBERS.items():
        parts.append(section(2, of.__name__, of.__doc__ or ""))
        parts += [section(3, f"`{heading(of, name)}`", member(of, name).__doc__ or "") for name in names]
    return "".join(parts)


if __name__ == "__main__":
    print(reference(), end="")
