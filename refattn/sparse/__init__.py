"""Sparse attention: exact softmax over fewer pairs."""

from refattn.sparse import local_global, longformer, sparse_transformer

__all__ = ["local_global", "longformer", "sparse_transformer"]
