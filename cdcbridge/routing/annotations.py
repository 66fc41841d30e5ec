"""Add an annotation to the changes that follow it in its transaction.

An application writes the annotation into the WAL, for example {"reverts": {"seqs": [17]}}. Each `data` then has it as
the member `annotation`. The module is pure. Never annotates a change of another transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from cdcbridge.changes.events import Row
from cdcbridge.routing.copy_format import encode_data
from cdcbridge.routing.logical_messages import TOPIC_PREFIX, read_json

ANNOTATE: Final = "annotate"  # a reserved topic
PREFIX: Final = TOPIC_PREFIX + ANNOTATE
# Makes `data` from op, record, old and unchanged.
Encoder: TypeAlias = Callable[[str, "Row | None", "Row | None", Sequence[str]], bytes]
PLAIN: Final[Encoder] = encode_data  # for changes without an annotation


def read_annotation(content: bytes) -> tuple[Encoder, str | None]:
    """Return the encoder of the changes after an annotation, and why the annotation cannot be read or None."""
    annotation, malformed = read_json(content)
    return (PLAIN if malformed else annotating(annotation)), malformed


def annotating(annotation: bytes) -> Encoder:
    """Return the encoder of the changes that follow an annotation in its transaction.

    Args:
        annotation: JSON text, which becomes the member `annotation` of each `data`.
    """
    end = b',"annotation":%b}' % annotation

    def encode(op: str, record: Row | None, old: Row | None, unchanged: Sequence[str]) -> bytes:
        return encode_data(op, record, old, unchanged)[:-1] + end

    return encode
