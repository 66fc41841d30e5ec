"""Both decoders against mutated input, for as long as one wishes: `make fuzz` (FUZZ=600: ten minutes).

From real captures and one message of each kind: bytes flipped, cut, doubled, spliced, lengths made huge. Whatever comes
in, an event comes out or a DecodeError; anything else is a finding, printed with the seed and the input. Prints its seed.
"""

from __future__ import annotations

import argparse
import base64
import random
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cdcbridge.changes.in_progress import Spill
from cdcbridge.changes.pgoutput import PgoutputDecoder
from cdcbridge.changes.pgtypes import Types
from cdcbridge.changes.wal2json import Wal2jsonDecoder
from cdcbridge.changes.wal2json_file import decode_file
from cdcbridge.errors import DecodeError, SentTooEarly
from tests.golden.test_golden import Catalog
from tests.properties.test_decoders import MESSAGES, Everything

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTHS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1")
TEXTS = (b'"', b"\\", b"{", b"}", b"[", b",", b"null", b"1e999", b'"\\ud800"', b"-", b"NaN", b"\xc3\x28", b'"value":')


def streams() -> dict[str, list[bytes]]:
    """What the mutations begin from: each plugin's capture, whole."""
    captured = [base64.b64decode(line) for line in (GOLDEN / "pgoutput.txt").read_bytes().splitlines()]
    lines = (GOLDEN / "wal2json.txt").read_bytes().splitlines()
    return {
        "pgoutput": captured + [message for plugin, _, message in MESSAGES if plugin == "pgoutput"],
        "progress": in_progress(captured),
        "wal2json": lines + [message for plugin, _, message in MESSAGES if plugin == "wal2json"],
    }


def mutate(chance: random.Random, message: bytes, others: list[bytes], pieces: tuple[bytes, ...]) -> bytes:
    """One to four changes."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(message) + 1)
        end = min(len(message), at + chance.choice((1, 1, 2, 4, 8, 100)))
        what = chance.randrange(6)
        if what == 0:
            message = message[:at] + bytes([chance.randrange(256)]) + message[at + 1 :]
        elif what == 1:
            message = message[:at] + message[end:]
        elif what == 2:
            message = message[:at] + chance.choice(pieces) + message[end:]
        elif what == 3:
            message = message[:end] + message[at:]
        elif what == 4:
            other = chance.choice(others)
            message = message[:at] + other[chance.randrange(len(other) + 1) :]
        else:
            message = message[:at]
    return message


class Arrived:
    """What has arrived, for Spill, which keeps its blocks here."""

    drained = True

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = messages
        self._blocks: dict[tuple[int, int], bytes] = {}
        self._spill = Spill(self, self._put, lambda xid, n: self._blocks[xid, n], lambda xid: None)

    def messages(self, size: int) -> Iterator[bytes]:
        while self._messages:
            yield self._messages.pop(0)

    def _put(self, xid: int, n: int, block: bytes) -> None:
        self._blocks[xid, n] = block
        self._spill.stored(xid, n)

    def in_turn(self) -> Iterator[bytes]:
        while self._messages or not self._spill.drained:
            yield from self._spill.messages(1000)


def in_progress(messages: list[bytes]) -> list[bytes]:
    """The same messages, as they are sent in a transaction that has not committed."""
    rows = [message[:1] + b"\0\0\0\7" + message[1:] for message in messages if message[:1] not in (b"B", b"C", b"O")]
    end = b"c" + struct.pack("!IBQQq", 7, 0, 100, 110, 5)
    return [b"S" + struct.pack("!IB", 7, 1), *rows, b"E", b"A" + struct.pack("!II", 7, 8), end]


def read(plugin: str, messages: list[bytes], catalog: Catalog | Everything) -> Iterator[object]:
    if plugin == "progress":
        return iter(PgoutputDecoder(Types(), catalog, lambda: 1).events(Arrived(messages).in_turn()))
    if plugin == "pgoutput":
        return iter(PgoutputDecoder(Types(), catalog, lambda: 1).events(messages))
    return iter(Wal2jsonDecoder(Types(), catalog, lambda: 1).events(messages))


def attack(chance: random.Random, plugin: str, whole: list[bytes]) -> list[bytes]:
    """A stream of which some messages were changed, or changed places."""
    start = chance.randrange(len(whole))
    messages = whole[: min(start, 31)] + whole[start : start + chance.choice((1, 3, 10))]
    for _ in range(chance.choice((1, 1, 3))):
        index = chance.randrange(len(messages))
        pieces = LENGTHS if plugin in ("pgoutput", "progress") else TEXTS
        messages[index] = mutate(chance, messages[index], whole, pieces)
    if chance.random() < 0.1:
        chance.shuffle(messages)
    return messages


def fuzz(seconds: float, seed: int) -> tuple[int, int]:
    """(streams tried, of which refused with a DecodeError). Any other exception goes through, with its input printed."""
    chance = random.Random(seed)
    whole = streams()
    tried = refused = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        plugin = chance.choice(("pgoutput", "progress", "wal2json", "file"))
        messages = attack(chance, plugin, whole["wal2json" if plugin == "file" else plugin])
        tried += 1
        try:
            if plugin == "file":
                for _ in decode_file(iter([message + b"\n" for message in messages])):
                    pass
            else:
                for _ in read(plugin, messages, chance.choice((Catalog(), Everything()))):
                    pass
        except (DecodeError, SentTooEarly):
            refused += 1
        except BaseException:
            print(f"{plugin}, seed {seed}, stream {tried}:", *messages, sep="\n", file=sys.stderr)
            raise
    return tried, refused


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.fuzz")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    tried, refused = fuzz(options.seconds, options.seed)
    print(f"{tried:,} streams: {refused:,} refused with a DecodeError, the others read")


if __name__ == "__main__":
    main()
