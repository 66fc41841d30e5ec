"""How fast, beside what the parts alone can do: python -m benchmarks."""
