"""The errors that Redis answers, and what they mean for a sink.

Never talks to Redis.
"""

from __future__ import annotations

from typing import Final

from redis import RedisError

from cdcbridge.errors import CdcbridgeError
from cdcbridge.sinks.target import TargetAway, Unusable

URL_HINT: Final = "Correct `url` of the consumer's `sink`, for example redis://user:password@host:6379/0."
# The server is in a state that ends without anybody touching the configuration. With a hint where a person can help.
_AWAY: Final = {
    "LOADING": None,
    "BUSY": "A script blocks Redis. `redis-cli SCRIPT KILL` ends it.",
    "MASTERDOWN": None,
    "CLUSTERDOWN": None,
    "TRYAGAIN": None,
    "ASK": None,
    "OOM": "Raise `maxmemory` of Redis, or let `maxlen` of the sink limit the stream.",
    "READONLY": "This server is a replica. Let `url` of the sink name the primary.",
    "MISCONF": "Redis cannot write to its disk, see its log.",
    "NOREPLICAS": "Redis has fewer replicas than `min-replicas-to-write`.",
}
_LOGIN: Final = ("NOAUTH", "WRONGPASS", "ERR invalid password", "ERR Client sent AUTH", "ERR AUTH ")


def said(answer: RedisError) -> str:
    """Return an answer as Redis gave it. redis-py keeps the first word of some answers apart."""
    return str(answer) if answer.status_code is None else f"{answer.status_code} {answer}"


def first_word(answer: RedisError) -> str:
    """Return the first word of an answer, for example OOM."""
    return said(answer).partition(" ")[0]


def meaning(answer: RedisError, place: str, user: str) -> CdcbridgeError:
    """Return the error that an answer of Redis means for a whole batch.

    Args:
        answer: The answer.
        place: The address of the server that gave it.
        user: The user as whom the sink has logged in.
    """
    answered, word = said(answer), first_word(answer)
    text = f"Redis at {place} answered: {answered}"
    if word in _AWAY:
        return TargetAway(text, hint=_AWAY[word])
    if answered.startswith(_LOGIN):
        return Unusable(text, hint="Correct user and password in `url` of the consumer's `sink`.")
    if word == "NOPERM":
        return Unusable(
            text,
            hint=f"redis-cli ACL SETUSER {user} +@stream +@transaction +append +get +set +type "
            "+wait '~STREAM*' '~cdcbridge:*'",
        )
    if word in {"MOVED", "CROSSSLOT"}:
        return Unusable(
            text,
            hint="In Redis Cluster, let `stream` of the sink have no placeholder but {partition}, "
            "for example shop:{partition} in mode stream, or shop in the modes fifo and queue.",
        )
    if answered.startswith("ERR DB index"):
        return Unusable(text, hint=URL_HINT)
    if word == "WRONGTYPE":
        return Unusable(text, hint="Choose another `stream` for the sink, or remove the key from Redis.")
    if answered.startswith("ERR unknown command"):
        return Unusable(text, hint="The sink needs Redis 5.0 or newer, or Valkey.")
    return TargetAway(text)
