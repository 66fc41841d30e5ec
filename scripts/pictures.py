"""Draw the pictures of the pages while the site is built. Zensical calls draw() for each block of Mermaid."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Final

from pymdownx.superfences import SuperFencesException

_SITE: Final = Path(__file__).parent / "site"


def draw(source: str, *_: Any, **__: Any) -> str:
    """Return a picture as SVG, for the page that contains it.

    Args:
        source: The picture in the language of Mermaid.

    Raises:
        SuperFencesException: The picture cannot be drawn, or lacks an arrow or a text of the source.
    """
    command = ["node", str(_SITE / "draw.mjs")]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise SuperFencesException(done.stderr.strip())
    return f"<figure>{done.stdout}</figure>"
