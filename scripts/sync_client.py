"""Make the synchronous client from the asynchronous one: python -m scripts.sync_client, or `make client`.

Both have one source, so they differ only in the words that WORDS replaces.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parents[1] / "cdcbridge" / "client"
FILES = {
    "_async.py": "_sync.py",
    "_leases_async.py": "_leases.py",
    "_session_async.py": "_session.py",
    "_sessions_async.py": "_sessions.py",
    "_settling_async.py": "_settling.py",
    "_stream_async.py": "_stream.py",
    "_worker_async.py": "_worker.py",
}
WORDS = (
    (
        r"`_\w+\.py` is made from this file by `make client`: change this one\.",
        "Made from `{source}` by `make client`.",
    ),
    (r"asynchronous\.", "synchronous."),
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\b_(worker|session|sessions|settling|stream|leases)_async\b", r"_\1"),
    (r"\bAwaitable\[(T|None|object)\]", r"\1"),
    (r"\bclient\._async\b", "client._sync"),
    (r"\b_tasks\b", "_threads"),
    (r"\bAsyncGenerator\[(\w+), None\]", r"Generator[\1, None, None]"),
    (r"\bAsync(?=[A-Z])", ""),
    (r"__a(enter|exit)__", r"__\1__"),
)


def made(source: str) -> str:
    """Return the synchronous text that is made from one of FILES, formatted by ruff."""
    text = (CLIENT / source).read_text()
    for pattern, words in WORDS:
        text = re.sub(pattern, words.format(source=source) if "{" in words else words, text)
    command = [sys.executable, "-m", "ruff"]
    for step in (["check", "--fix", "--quiet", "--select", "I,F401"], ["format", "--quiet"]):
        where = ["--stdin-filename", str(CLIENT / FILES[source]), "-"]
        text = subprocess.run([*command, *step, *where], input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> None:
    """Write all synchronous files."""
    for source, target in FILES.items():
        (CLIENT / target).write_text(made(source))


if __name__ == "__main__":
    main()
