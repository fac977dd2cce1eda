"""Commands that print measured figures: `python -m benchmarks`, and its modules `evidence`, `broken` and `replay`."""
