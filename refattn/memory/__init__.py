"""Attention with a memory: what is left of the keys from before the segment."""

from refattn.memory import memformer

__all__ = ["memformer"]
