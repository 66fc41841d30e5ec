# PostgreSQL 17 with wal2json, from the PostgreSQL project's own packages.
FROM postgres:17
# The version of wal2json follows that of the server's package repository.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends postgresql-17-wal2json \
    && rm -rf /var/lib/apt/lists/*
