"""Hints for a command that was given a consumer of the other mode: they name the right command.

For example, `receive` is for queues, and `read` for streams. Never connects to a database.
"""

from __future__ import annotations

from typing import Final

import click

# First the commands of queues, which were given a stream. Then the commands of streams, which were given a queue.
_RIGHT: Final = {
    "receive": "`cdcbridge read {name}` shows a stream's messages. Programs call read_stream() instead.",
    "peek": "`cdcbridge read {name}` shows the messages that a stream's group has not read yet.",
    "ack": (
        "A stream has offsets, not receipts: `cdcbridge offsets show {name}` prints them, and commit_offset() moves"
        " them."
    ),
    "nack": "A stream has offsets, not receipts: `cdcbridge offsets seek {name} SEQ` moves them back to a message.",
    "extend": "A stream has leases, not receipts: `cdcbridge offsets show {name}` shows them.",
    "dead": "A stream has no dead letters: `cdcbridge read {name}` shows its messages.",
    "replay": "`cdcbridge offsets seek {name} PLACE` moves a stream back.",
    "read": (
        "`cdcbridge peek {name}` shows the messages of a queue, and `cdcbridge receive {name}` takes messages from it."
    ),
    "tail": (
        "`cdcbridge peek {name}` shows the messages of a queue, and `cdcbridge receive {name} --wait 20s` waits for"
        " them."
    ),
    "show": (
        "A queue has no offsets: `cdcbridge lag` counts the waiting messages, and `cdcbridge peek {name}` shows them."
    ),
    "seek": "A queue has no offsets: `cdcbridge consumers replay {name} --from PLACE` delivers messages again.",
}


def right_command() -> str | None:
    """Return the hint for the command that runs now, or None. For example: "`cdcbridge read audit` shows …"."""
    context = click.get_current_context(silent=True)
    if context is None:
        return None
    group = context.parent.info_name if context.parent else None
    if group == "dead" and context.info_name == "redrive":
        return None  # the function's hint is better: a stream with a sink has dead letters, but cannot redrive them
    mirrors = context.obj.config.mirrors if context.obj is not None else ()
    if any(mirror.name == context.params.get("name") for mirror in mirrors):
        return None  # the function's hint is better: the consumer belongs to a mirror
    hint = _RIGHT.get("dead" if group == "dead" else context.info_name or "")
    return hint and hint.format(name=context.params.get("name"))
