"""Encrypted connections, as the key `tls` of a sink describes them.

Never connects.
"""

from __future__ import annotations

import ssl

from cdcbridge.config.sink_base import Tls
from cdcbridge.sinks.target import Unusable


def client_context(tls: Tls | None) -> ssl.SSLContext:
    """Return how a connection is encrypted. Without `tls`, the system's authorities are trusted.

    Raises:
        Unusable: A file cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=str(tls.ca) if tls is not None and tls.ca else None)
        if tls is not None and tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except OSError as error:
        raise Unusable(
            f"a file of `tls` cannot be read: {error}", hint="Correct `tls` of the consumer's `sink`."
        ) from error
    return context


def untrusted(server: str, error: Exception) -> Unusable:
    """Return the error for a certificate that does not belong to a trusted authority or to the host.

    Args:
        server: For example `Redis at shop:6380`.
        error: The reason.
    """
    return Unusable(
        f"the certificate of {server} is not trusted: {error}",
        hint="Let `tls: {ca: FILE}` of the consumer's `sink` name the authority that signed it.",
    )
