"""Fetch the jars of a Kafka broker for the tests: python -m scripts.kafka_jars LIST FOLDER.

Each line of the list is a SHA-256 and a path in a Maven repository. The repository is Maven Central, or the one in the
variable MAVEN_REPOSITORY. Never keeps a jar whose checksum differs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CENTRAL = "https://repo.maven.apache.org/maven2"
TRIES = 3


def fetch(repository: str, path: str, checksum: str) -> bytes:
    """Return a file of the repository.

    Raises:
        OSError: The repository does not answer.
        ValueError: The file has another checksum.
    """
    for remaining in reversed(range(TRIES)):
        try:
            with urllib.request.urlopen(f"{repository}/{path}", timeout=60) as answer:  # noqa: S310 - of whoever runs it
                content: bytes = answer.read()
            break
        except OSError:
            if not remaining:
                raise
    if hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError(f"{path} has another checksum than the list")
    return content


def install(listed: Path, folder: Path, repository: str) -> None:
    """Fill the folder with the jars of a list. The file `.installed` in it says that it is complete."""
    lines = [line.split() for line in listed.read_text().splitlines() if not line.startswith("#")]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(8) as pool:
        contents = pool.map(lambda line: (line[1], fetch(repository, line[1], line[0])), lines)
        for path, content in contents:
            (folder / Path(path).name).write_bytes(content)
    (folder / ".installed").touch()


def main() -> int:
    """Install the jars. Without them CI fails, and everybody else tests against librdkafka's mock cluster."""
    listed, folder = map(Path, sys.argv[1:])
    try:
        install(listed, folder, os.environ.get("MAVEN_REPOSITORY", CENTRAL).rstrip("/"))
    except (OSError, ValueError) as error:
        print(f"No Kafka broker ({error}): the tests of Kafka use librdkafka's mock cluster alone.", file=sys.stderr)
        return 1 if os.environ.get("CI") else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
