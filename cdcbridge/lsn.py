"""Log sequence numbers as plain integers. Pure; knows only the textual form `16/B374D848`.

Source: PostgreSQL manual, "pg_lsn Type".
"""

from __future__ import annotations

import re

_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


def parse_lsn(text: str) -> int:
    """`'16/B374D848'` → 97500059720. Raises ValueError on anything else."""
    match = _LSN.fullmatch(text)
    if match is None:
        raise ValueError(f"not an LSN: {text!r}; expected two hexadecimal numbers such as 16/B374D848")
    return (int(match[1], 16) << 32) | int(match[2], 16)


def format_lsn(lsn: int) -> str:
    """97500059720 → `'16/B374D848'`."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
