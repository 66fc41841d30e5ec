"""What stands in logical messages, as UTF-8. Part of the rim.

pgoutput sends names and values in the client's encoding, and a logical message's content as the server has it.
"""

from __future__ import annotations

from collections.abc import Callable

import psycopg

from cdcbridge.database import Connection, source_errors


def content_reader(connection: Connection) -> Callable[[bytes], bytes]:
    """A function from a message's content to UTF-8. What is no text of the server's encoding stays as it is."""
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
