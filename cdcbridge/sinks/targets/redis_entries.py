"""Write messages as XADD commands of Redis.

Never sends them.
"""

from __future__ import annotations

from collections.abc import Iterable

from cdcbridge.sinks.target import Outgoing


def word(text: str | int) -> bytes:
    """Return one word of a command in the form in which it is sent."""
    data = str(text).encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)


class Entries:
    """The form of a sink's entries: `id`, `key`, `topic`, `op` and `body`.

    Args:
        maxlen: About how many entries a stream may have, or None.
        in_lane: True if the seq is the id of the entry. Else Redis chooses the id.
    """

    def __init__(self, maxlen: int | None, *, in_lane: bool) -> None:
        self._limit = b"" if maxlen is None else word("MAXLEN") + word("~") + word(maxlen)
        self._in_lane = in_lane

    def packed(self, messages: Iterable[Outgoing]) -> list[bytes]:
        """Return an XADD for each message. The parts that many messages share are made once."""
        shared: dict[tuple[str, str | None, str | None, bool], tuple[bytes, bytes]] = {}
        found: list[bytes] = []
        in_lane = self._in_lane
        for message in messages:
            headers, key = message.headers, message.key
            topic, op = headers.get("cdcbridge-topic"), headers.get("cdcbridge-op")
            kind = (message.destination, topic, op, key is None)
            if kind not in shared:
                shared[kind] = self._shared(*kind)
            head, middle = shared[kind]
            entry = b"%d-0" % message.seq if in_lane else b"*"
            identity = message.id.encode()
            body = message.body or b""
            text = b"" if key is None else b"$3\r\nkey\r\n" + word(key)
            found.append(
                b"%b$%d\r\n%b\r\n$2\r\nid\r\n$%d\r\n%b\r\n%b%b$4\r\nbody\r\n$%d\r\n%b\r\n"
                % (head, len(entry), entry, len(identity), identity, text, middle, len(body), body)
            )
        return found

    def _shared(self, stream: str, topic: str | None, op: str | None, no_key: bool) -> tuple[bytes, bytes]:
        """Return the beginning of an XADD up to the id, and its fields `topic` and `op`."""
        fields = [(name, value) for name, value in (("topic", topic), ("op", op)) if value is not None]
        number = 3 + 3 * bool(self._limit) + 2 * (2 + len(fields) + (not no_key))
        head = b"*%d\r\n$4\r\nXADD\r\n%b%b" % (number, word(stream), self._limit)
        return head, b"".join(word(name) + word(value) for name, value in fields)
