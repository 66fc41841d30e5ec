"""Make the TLS context of a sink from its configuration. Never contacts a target."""

from __future__ import annotations

import ssl

from cdcbridge.config.sink import Tls
from cdcbridge.sinks.target import Unusable


def client_context(tls: Tls | None) -> ssl.SSLContext | None:
    """Return the context for `sink.tls`, or None if it is not given.

    Raises:
        Unusable: A file of certificates cannot be read.
    """
    if tls is None:
        return None
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ssl.SSLError) as error:
        raise Unusable(f"cannot read the certificates of sink.tls: {error}", hint="correct sink.tls") from None
    return context
