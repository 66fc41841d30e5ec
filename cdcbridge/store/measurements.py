"""Keep the newest measurement and the samples of the last hours, which the dashboard shows.

Never measures anything itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from cdcbridge.database import Connection, store_errors


def note_measurement(store: Connection, lag: Mapping[str, Any]) -> None:
    """Keep a measurement in the place of the one before it, and a sample of it for this minute.

    Args:
        store: A session on the store, as its owner.
        lag: The measurement, as `cdcbridge lag --json` prints it.
    """
    with store_errors():
        store.execute("select note_measurement(%s::json)", (orjson.dumps(lag, default=str).decode(),))
