# PostgreSQL 17 with wal2json, from the PostgreSQL project's own packages.
FROM postgres:17
# The version of wal2json follows that of the server's package repository.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends postgresql-17-wal2json \
    && rm -rf /var/lib/apt/lists/*
# Minor releases since CVE-2026-6471 list the output plugins that may be used.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN if postgres --describe-config | grep -c '^output_plugin_libraries' >/dev/null; then \
    echo "output_plugin_libraries = 'pgoutput, test_decoding, wal2json'" >>/usr/share/postgresql/postgresql.conf.sample; fi
