"""Commands that print measured figures: `python -m benchmarks` (speed, memory) and `python -m benchmarks.evidence`."""
