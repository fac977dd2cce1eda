"""Kernel attention: exp(q·k) becomes a product of features φ(q)·φ(k)."""

from refattn.kernel import features, gaussian, linear_transformer, moments, performer, polynomial
from refattn.kernel._feature_map import FeatureMap, elu_plus_one

__all__ = [
    "FeatureMap",
    "elu_plus_one",
    "features",
    "gaussian",
    "linear_transformer",
    "moments",
    "performer",
    "polynomial",
]
