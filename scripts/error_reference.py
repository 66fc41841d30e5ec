"""Print docs/ERRORS.md, made from the error classes and the SQL headers: python -m scripts.error_reference."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from cdcbridge import errors
from cdcbridge.store.sql_files import code

HEAD = """# Errors

<!-- Made by `python -m scripts.error_reference` from the error classes and the SQL headers. `make docs` runs it. -->

This page is for looking up an error: the exit code of a command, the class of a Python exception, or the SQLSTATE of a
SQL function. An error names the failure and the value that caused it. Its hint names the next step, for example:

```text
error: missing.yaml: no such file
hint: `cdcbridge init` creates one. Name another with -c FILE or CDCBRIDGE_CONFIG.
```

## Exit codes and Python exceptions

Each error is a class in `cdcbridge.errors`, and each class has an exit code. All of them are a `CdcbridgeError`, whose
attribute `hint` is the next step, or None. [docs/OPERATIONS.md](OPERATIONS.md#exit-codes), "Exit codes", explains the
codes 0 to 3.

| exception | is a | exit code | meaning |
|---|---|---|---|
"""
STATES = """
## SQLSTATEs of the SQL functions

A SQL function of cdcbridge raises an error with a SQLSTATE of the class CB. Its page, for example
[docs/SQL.md](SQL.md#receive), "receive", names the reasons for each code. Any other SQLSTATE is PostgreSQL's own:
[docs/OPERATIONS.md](OPERATIONS.md#which-errors-are-tried-again), "Which errors are tried again", lists those.

| SQLSTATE | meaning | what to do | raised by |
|---|---|---|---|
"""
# The meaning of each SQLSTATE, and the next step.
MEANINGS = {
    "CB001": ("there is no such consumer", "correct the name. `cdcbridge consumers list` prints the known ones"),
    "CB002": (
        "the consumer is a stream, and the function is for queues, or the reverse",
        "call the other function. For dead letters of a stream with a sink, see docs/SINKS.md",
    ),
    "CB003": ("the text is not a receipt", "pass the receipt as `receive` or `read_stream` returned it"),
    "CB004": ("an argument is wrong", "correct the argument that the message names"),
    "CB005": ("the isolation level is above READ COMMITTED", "begin the transaction with READ COMMITTED"),
    "CB006": (
        "a receipt is stale: its delivery has expired, or was acked or given back before. In a stream, its lease is over",
        "roll back. The message is delivered again, or was already done",
    ),
    "CB007": ("there is no such dead letter", "correct the id. `cdcbridge dead list NAME` prints the known ones"),
    "CB008": ("the consumer belongs to another role", "connect as that role, or as the owner of the store"),
    "CB009": (
        "retention dropped messages that a stream's group had not read",
        "read the missing rows from the tables, then continue with `cdcbridge offsets seek NAME earliest`",
    ),
    "CB010": ("a bridge with a newer epoch leads", "nothing. Only bridges get this error, and start again"),
    "CB011": ("only a NOTICE: no consumer lists the topic of a published message", "add the topic to a consumer"),
}
_MOST = 12  # functions that are listed by name
_RAISES = re.compile(r"^Raises:\n((?:  .*\n?)+)", re.MULTILINE)
_STATE = re.compile(r"^  (CB\d{3})  ", re.MULTILINE)


def classes(of: type[errors.CdcbridgeError] = errors.CdcbridgeError) -> Iterator[type[errors.CdcbridgeError]]:
    """Yield the error classes of the module, each after the class on which it is based."""
    yield of
    for one in of.__subclasses__():
        if one.__module__ == errors.__name__:
            yield from classes(one)


def raised_by(state: str) -> list[str]:
    """Return the public SQL functions whose header lists the SQLSTATE."""
    return [one.name for one in code().public if state in _STATE.findall("".join(_RAISES.findall(one.header)))]


def reference() -> str:
    """Return the whole page."""
    rows = []
    for one in classes():
        meaning = " ".join(inspect.cleandoc(one.__doc__ or "").partition("\n\n")[0].split())
        base = "" if one is errors.CdcbridgeError else f"`{one.__mro__[1].__name__}`"
        rows.append(f"| `{one.__name__}` | {base} | {one.exit_code} | {meaning} |\n")
    rows.append(STATES)
    for state, (meaning, then) in MEANINGS.items():
        names = raised_by(state)
        functions = ", ".join(f"[`{name}`](SQL.md#{name})" for name in names)
        functions = (
            functions if len(names) <= _MOST else f"{len(names)} functions, which name it in their part **Raises**"
        )
        rows.append(f"| {state} | {meaning} | {then} | {functions} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(reference(), end="")
