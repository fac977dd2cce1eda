"""The engines compiled by Numba: one module for each, float32 and float64. See ``backends/README.md``."""
