"""cdcbridge: PostgreSQL's own WAL as durable queues, with PostgreSQL alone."""

__version__ = "0.1.0"
