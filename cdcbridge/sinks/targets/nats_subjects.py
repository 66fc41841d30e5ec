"""Compare subjects of NATS, for example the template `shop.{schema}.{table}` with a stream's `shop.>`. Pure.

The rules are described at https://docs.nats.io/nats-concepts/subjects. Never contacts a server.
"""

from __future__ import annotations

import re

_PLACEHOLDER = re.compile(r"\{[^{}]*\}")
_FORBIDDEN = re.compile(r"[\s\x00]")


def pattern_of(template: str) -> str:
    """Return the subjects that a template can have, for example `shop.>` for `shop.{topic}`.

    A value may contain dots, so that everything after the first placeholder is open.
    """
    tokens = template.split(".")
    for index, token in enumerate(tokens):
        if _PLACEHOLDER.search(token):
            return ".".join([*tokens[:index], ">"])
    return template


def overlap(one: str, other: str) -> bool:
    """Return whether a subject exists that fits both patterns. `*` is one token, and a last `>` is one or more."""
    left, right = one.split("."), other.split(".")
    for a, b in zip(left, right, strict=False):
        if ">" in {a, b}:
            return True
        if a != b and "*" not in {a, b}:
            return False
    return len(left) == len(right)


def valid(subject: str) -> bool:
    """Return whether messages can be published to a subject: tokens between dots, without spaces and wildcards."""
    return not _FORBIDDEN.search(subject) and all(token not in {"", "*", ">"} for token in subject.split("."))
