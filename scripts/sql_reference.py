"""Print docs/SQL.md, made from the headers of sql/api: python -m scripts.sql_reference."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from cdcbridge.store.sql_files import PublicFunction, code

HEAD = """# SQL functions

<!-- Made by `python -m scripts.sql_reference` from the headers in sql/api. `make docs` runs it, and a test compares. -->

This page is for looking up a SQL function of cdcbridge. In psql, `\\df+ cdcbridge.*` shows the same text.

Every language with a PostgreSQL driver can call these functions. A role needs the right to use the schema `cdcbridge`, and
no right on any table. [docs/ERRORS.md](ERRORS.md) explains the SQLSTATEs of the class CB.
"""
SECTIONS = {
    "Queues": ("receive", "ack", "nack", "extend", "peek"),
    "Dead letters": ("redrive", "purge", "dead_letters"),
    "Publishing": ("publish",),
    "Streams": ("read_stream", "commit_offset", "extend_lease", "seek", "peek_stream", "partition_of"),
    "The gap guard": ("register_sequence_transaction", "max_safe_seq"),
    "Monitoring": ("consumer_lag", "group_lag", "consumer_holders", "show_consumer", "browse_log"),
    "For the Python clients and the command line": (
        "queue_settings",
        "next_visible",
        "give_back",
        "nack_failed",
        "stream_settings",
        "next_readable",
        "follow_stream",
        "seek_partitions",
        "time_of",
        "dead_ids",
        "dead_to_compare",
        "redrive_compared",
    ),
}
_SIGNATURE = re.compile(r"^create or replace function (.*?)\nlanguage ", re.MULTILINE | re.DOTALL)
_PART = re.compile(r"(\w[\w ]*):(?: (.*))?")
_ENTRY = re.compile(r"  (\S.*?)(?:  +(\S.*))?")


def signatures(function: PublicFunction) -> str:
    """Return what follows `create function`, of each form of the function.

    A function with `out` parameters has no part `returns`.
    """
    forms = []
    for form in _SIGNATURE.findall(function.text):
        call, returns, result = " ".join(form.split()).partition(") returns ")
        lines = (call + ")", "returns " + result) if returns else (call,)
        forms.append("\n".join(textwrap.fill(line, 76, subsequent_indent="    ") for line in lines))
    return "\n\n".join(forms)


def body(header: str) -> Iterator[str]:
    """Yield the lines of a header as Markdown: its first sentence, its paragraphs, and a list for each part."""
    first, _, rest = header.partition("\n")
    sentence = first.partition("): ")[2] or first
    yield sentence[0].upper() + sentence[1:] + "\n"
    example: list[str] | None = None
    in_list = True
    for line in rest.split("\n"):
        part = _PART.fullmatch(line)
        entry = _ENTRY.fullmatch(line)
        if example is not None and (line.startswith("  ") or not line):
            example.append(line[2:])
        elif part and part[1] in ("Parameters", "Returns", "Raises", "Locks", "Example", "Examples"):
            example = [] if part[1].startswith("Example") else None
            yield f"\n**{part[1]}**" + ("" if example is not None else f": {part[2]}" if part[2] else "\n")
        elif line.startswith("     "):
            yield "  " + line.strip()
        elif entry:
            yield ("" if in_list else "\n") + f"- `{entry[1]}`" + (f": {entry[2]}" if entry[2] else "")
        else:
            yield line
        in_list = bool(entry) or line.startswith("     ") or not line
    if example is not None:
        yield "\n```sql\n" + "\n".join(example).rstrip() + "\n```"


def reference() -> str:
    """Return the whole page. Raise ValueError if a public function has no place in it."""
    found = {function.name: function for function in code().public}
    listed = [name for names in SECTIONS.values() for name in names]
    if sorted(listed) != sorted(found):
        raise ValueError(f"in no section, or in two: {sorted(set(listed) ^ set(found)) or listed}")
    parts = [HEAD]
    for section, names in SECTIONS.items():
        parts.append(f"\n## {section}\n")
        for name in names:
            text = re.sub(r"\n{3,}", "\n\n", "\n".join(body(found[name].header))).rstrip()
            parts.append(f"\n### {name}\n\n```sql\n{signatures(found[name])}\n```\n\n{text}\n")
    return "".join(parts)


if __name__ == "__main__":
    print(reference(), end="")
