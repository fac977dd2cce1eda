"""Sparse attention: exact softmax over fewer pairs."""

from refattn.sparse import longformer

__all__ = ["longformer"]
