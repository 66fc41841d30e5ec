"""The demo and its PostgreSQL server, apart from everything else."""
