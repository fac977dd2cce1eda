"""Memory: what came before is kept in part."""

from refattn.memory import segments

__all__ = ["segments"]
