"""Low-rank attention: keys and values are compressed along the sequence first."""

from refattn.lowrank import linformer, pooling

__all__ = ["linformer", "pooling"]
