"""The meaning of each error code of PostgreSQL (SQLSTATE) for the program.

There are three verdicts. `away` means that the server cannot do it now, so the bridge, workers and clients try again.
`wrong` means that the program or its user made a mistake, so the command ends. `operator` means that an operator must
repair something first. For example, 25006 (read-only transaction) is `away`, because a standby that was promoted
accepts writes a moment later.

A class is the first two characters of a code. The verdict on a code overrides the one on its class. docs/OPERATIONS.md
has the same table, and a test compares the two. This module is pure. Never reads the text of an error, which may be
translated.

Source: PostgreSQL manual, Appendix A, "PostgreSQL Error Codes".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

Verdict: TypeAlias = Literal["away", "wrong", "operator"]

CLASSES: Final[Mapping[str, tuple[Verdict, str]]] = {
    "02": ("wrong", "no data"),
    "03": ("wrong", "a statement that is not complete"),
    "08": ("away", "the connection failed, or a pooler ended it"),
    "09": ("wrong", "a trigger failed"),
    "0A": ("wrong", "not supported by this server, such as an extension that is not installed"),
    "0B": ("wrong", "a transaction cannot begin here"),
    "0F": ("wrong", "a bad locator"),
    "0L": ("wrong", "a bad grantor"),
    "0P": ("wrong", "no such role"),
    "0Z": ("wrong", "diagnostics outside of a handler"),
    "10": ("wrong", "a bad XQuery argument"),
    "20": ("wrong", "no branch of a CASE statement fits"),
    "21": ("wrong", "more than one row"),
    "22": ("wrong", "a bad value, such as text that is not JSON"),
    "23": ("wrong", "a constraint is violated"),
    "24": ("wrong", "a bad cursor"),
    "25": ("wrong", "not in this state of a transaction"),
    "26": ("wrong", "no such prepared statement"),
    "27": ("wrong", "a trigger changed the row before"),
    "28": ("away", "the role, its password or pg_hba.conf, perhaps while a password is changed"),
    "2B": ("wrong", "other objects depend on it"),
    "2D": ("wrong", "a transaction cannot end here"),
    "2F": ("wrong", "an SQL function failed"),
    "34": ("wrong", "no such cursor"),
    "38": ("wrong", "an external function failed"),
    "39": ("wrong", "an external function broke its protocol"),
    "3B": ("wrong", "no such savepoint"),
    "3D": ("away", "no such database, perhaps while it is restored"),
    "3F": ("wrong", "no such schema"),
    "40": ("away", "the transaction was rolled back, for example after a deadlock"),
    "42": ("wrong", "syntax, or an object that does not exist"),
    "44": ("wrong", "a row that its view does not show"),
    "53": ("away", "memory, disk or connections are used up"),
    "54": ("wrong", "a limit of PostgreSQL, such as the size of an index entry"),
    "55": ("away", "an object is locked, in use or not ready, for example during recovery"),
    "57": ("away", "the server stops, starts, or ended the session or the statement"),
    "58": ("operator", "files of the server are missing, or exist already"),
    "72": ("away", "a snapshot that is too old (the next transaction has a new one)"),
    "CB": ("wrong", "an error of cdcbridge's own functions (docs/ERRORS.md)"),
    "F0": ("operator", "the server's configuration file"),
    "HV": ("wrong", "a foreign data wrapper failed"),
    "P0": ("wrong", "a PL/pgSQL function or a trigger of the application raised it"),
    "XX": ("wrong", "an internal error of the server"),
}
CODES: Final[Mapping[str, tuple[Verdict, str]]] = {
    "25006": ("away", "a read-only transaction: a standby, or a primary before its promotion"),
    "25P03": ("away", "the session was idle in a transaction for too long, and ended"),
    "25P04": ("away", "the transaction took too long, and its session ended"),
    "42501": ("operator", "a right is missing (`cdcbridge check` prints the grant)"),
    "55P02": ("wrong", "a setting that cannot be changed in a running server"),
    "58000": ("away", "the operating system failed, for example a network disk"),
    "58030": ("away", "reading or writing failed, for example on a network disk"),
    "HV001": ("away", "a foreign data wrapper ran out of memory"),
    "HV00N": ("away", "a foreign data wrapper cannot connect"),
    "XX001": ("operator", "a table is corrupted"),
    "XX002": ("operator", "an index is corrupted"),
}
# 0A000 is `away` if one of these functions of the server raises it, because a later attempt can succeed. The next
# session has new plans, and a standby may be promoted. PostgreSQL has no separate codes for these errors, and their
# texts are translated.
PASSING: Final[Mapping[str, str]] = {
    "RevalidateCachedQuery": "a prepared statement is older than a migration",
    "CheckLogicalDecodingRequirements": "no logical decoding on a standby of PostgreSQL 15 and older",
    "GetSerializableTransactionSnapshot": "no serializable transactions on a standby",
}
_NEW: Final[tuple[Verdict, str]] = ("wrong", "unknown")


def verdict(sqlstate: str, function: str = "") -> Verdict:
    """Return the verdict on a code of five characters. A code of an unknown class is `wrong`.

    Args:
        sqlstate: The code.
        function: The server's function that raised the error (its field ROUTINE), or '' if that is unknown.
    """
    if sqlstate == "0A000" and function in PASSING:
        return "away"
    return CODES.get(sqlstate, CLASSES.get(sqlstate[:2], _NEW))[0]
