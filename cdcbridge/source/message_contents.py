"""Convert the content of logical messages to UTF-8.

pgoutput sends names and values in the client's encoding, but the content of a logical message in the server's encoding.
"""

from __future__ import annotations

from collections.abc import Callable

import psycopg

from cdcbridge.database import Connection, source_errors


def content_reader(connection: Connection) -> Callable[[bytes], bytes]:
    """Return a function that converts a message's content to UTF-8.

    Content that is not text in the server's encoding is returned unchanged.
    """
    with source_errors():
        row = connection.execute("select getdatabaseencoding()").fetchone()
    encoding = str(row[0]) if row else "UTF8"

    def convert(content: bytes) -> bytes:
        if encoding == "UTF8" or content.isascii():
            return content
        with source_errors():
            try:
                found = connection.execute("select convert(%s, %s, 'UTF8')", (content, encoding)).fetchone()
            except psycopg.DataError:
                return content
        return bytes(found[0]) if found else content

    return convert
