"""A folder with one file for each topic."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.sinks.case import Case, Received


class FileCase(Case):
    type = "file"
    exactly_once = True
    server = None

    def __init__(self, server: None, name: str, *, partitions: int = 4, path: str = "{topic}.jsonl") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"cdcbridge-{name}-"))
        self.path = path

    def sink(self) -> dict[str, Any]:
        return {"type": "file", "path": str(self.folder / self.path)}

    def received(self) -> list[Received]:
        found = []
        # A rotated file's name begins with the file's name, and the file itself is the newest.
        for path in sorted(self.folder.glob("[!.]*"), key=lambda path: (path.name.split(".jsonl")[0], f"{path.name}~")):
            for line in path.read_bytes().splitlines():
                value = json.loads(line)
                body = json.dumps(value["data"]).encode() if value.keys() == {"id", "seq", "data"} else line
                found.append(Received(value["id"], value.get("key"), body, str(self.folder / self.path)))
        return found

    def close(self) -> None:
        shutil.rmtree(self.folder)
