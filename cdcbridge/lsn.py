"""Convert log sequence numbers (LSNs) between integers and text such as `16/B374D848`.

This module is pure. Never accepts another text form.

Source: PostgreSQL manual, "pg_lsn Type".
"""

from __future__ import annotations

import re

_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


def parse_lsn(text: str) -> int:
    """Return the LSN in a text as an integer: `'16/B374D848'` → 97500059720.

    Raises:
        ValueError: The text is not an LSN.
    """
    match = _LSN.fullmatch(text)
    if match is None:
        raise ValueError(f"not an LSN: {text!r}. Expected two hexadecimal numbers such as 16/B374D848")
    return (int(match[1], 16) << 32) | int(match[2], 16)


def format_lsn(lsn: int) -> str:
    """Return an LSN as text: 97500059720 → `'16/B374D848'`."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
