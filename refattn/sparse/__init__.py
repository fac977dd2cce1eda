"""Sparse attention: exact softmax over fewer pairs."""

from refattn.sparse import longformer, sparse_transformer

__all__ = ["longformer", "sparse_transformer"]
