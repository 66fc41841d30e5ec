"""Measure how fast cdcbridge is, and compare it with the speed of PostgreSQL's own parts: python -m benchmarks."""
