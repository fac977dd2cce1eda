"""Attention with a memory: what came before the segment is kept in part."""

from refattn.memory import memformer, segments

__all__ = ["memformer", "segments"]
